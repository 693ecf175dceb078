"""Sparsity detection, timed beside asdex: ``python -m benchmarks.detection``."""
