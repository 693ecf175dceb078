"""What torchjac uses of PyTorch beyond its public API, one module per private corner.

Nothing outside this package imports a private name of torch. `tests/test_torch_contracts.py` pins
the behavior that is relied on.
"""
