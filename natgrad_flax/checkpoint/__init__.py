"""Runs saved and restored bit for bit."""

from natgrad_flax.checkpoint.checkpoint import FORMAT, restore, save

__all__ = ["FORMAT", "restore", "save"]
