"""Accumulation: the entries of a Jacobian as a straight line of tensor operations."""
