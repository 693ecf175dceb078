"""Sparsity: the pattern of a Jacobian, read off its linear program."""
