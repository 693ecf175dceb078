"""The tensor program: a straight line of tensor operations, and what makes it shorter."""
