"""Matrices on the parameters of layers, known by their products and solves."""
