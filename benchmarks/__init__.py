"""Side-by-side benchmarks of torchjac and its peers: ``python -m benchmarks``."""
