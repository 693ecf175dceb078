"""Code generation: from a tensor program to native code."""
