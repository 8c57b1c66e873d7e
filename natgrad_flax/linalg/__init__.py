"""Dense solves, and where the costly parts of them run."""
