"""Steps: the natural gradient of a batch, and the transformations that take it in training."""
