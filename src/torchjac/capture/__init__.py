"""Capture: a function and its arguments, or tensors with a graph, become a `Program`."""

from torchjac.capture.function import Call, capture_function
from torchjac.capture.graph import capture_graph
from torchjac.capture.nesting import differentiating
from torchjac.capture.program import Nest, Program

__all__ = ["Call", "Nest", "Program", "capture_function", "capture_graph", "differentiating"]
