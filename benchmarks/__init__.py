"""Benchmarks of natgrad: asv suites, and the same measurements from the command line."""
