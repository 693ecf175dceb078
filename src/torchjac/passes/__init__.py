"""Passes over the autograd graph: modes, candidates, and the choice among them."""
