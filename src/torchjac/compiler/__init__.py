"""The compiler: from a linear program to a compiled Jacobian."""
