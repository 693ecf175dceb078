"""Adapters to PyTorch beyond its public API, one module per private corner.

No module outside this package imports a private name of torch. `tests/test_torch_contracts.py` pins
the behavior on which torchjac relies.
"""
