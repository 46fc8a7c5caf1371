"""Training data made with models: descriptions for stage 2, and instructions from captions and boxes."""
