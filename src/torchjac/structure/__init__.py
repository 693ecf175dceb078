"""Structure: what is known of a program's Jacobian before it is evaluated."""

from torchjac.structure.graph import Graph, Profile, coarsest, profile, survey
from torchjac.structure.shape import Structure, analyze

__all__ = ["Graph", "Profile", "Structure", "analyze", "coarsest", "profile", "survey"]
