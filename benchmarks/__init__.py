"""Measurements of the library: `python -m benchmarks.core` (or `make bench`)."""
