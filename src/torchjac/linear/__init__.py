"""Linear maps and rules: the local Jacobian of each operation."""
