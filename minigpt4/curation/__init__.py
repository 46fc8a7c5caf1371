"""Making stage-2 data: images, generated descriptions, and what is kept of them."""
