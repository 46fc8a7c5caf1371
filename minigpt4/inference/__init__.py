"""Using a trained model: the Python API, answers to many conversations at once, captions of many images."""
