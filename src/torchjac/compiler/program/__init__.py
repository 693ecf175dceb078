"""The tensor program: a straight line of tensor operations, optimized, counted and serialized."""
