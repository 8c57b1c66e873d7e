"""Detours around faults of XLA, and the solver that its CPU backend needs."""
