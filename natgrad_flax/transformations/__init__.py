"""Optimizers on gradients of batches alone, as optax transformations: no model, no Fisher."""
