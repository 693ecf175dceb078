"""Structure: what is known of a program's Jacobian before it is evaluated."""

from torchjac.structure.detect import (
    global_pattern,
    is_independent,
    pattern_of_function,
    pattern_of_graph,
)
from torchjac.structure.graph import Graph, Profile, coarsest, profile, survey
from torchjac.structure.pattern import Pattern, given_pattern
from torchjac.structure.shape import Structure, analyze

__all__ = [
    "Graph",
    "Pattern",
    "Profile",
    "Structure",
    "analyze",
    "coarsest",
    "given_pattern",
    "global_pattern",
    "is_independent",
    "pattern_of_function",
    "pattern_of_graph",
    "profile",
    "survey",
]
