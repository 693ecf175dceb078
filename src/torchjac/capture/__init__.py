"""Capture: a function and its arguments, or tensors with a graph, become a graph."""
