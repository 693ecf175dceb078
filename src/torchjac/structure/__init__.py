"""Structure: what is known of a program's Jacobian before it is evaluated."""

from torchjac.structure.profile import Profile, collect, fingerprint, profile
from torchjac.structure.shape import Structure, analyze

__all__ = ["Profile", "Structure", "analyze", "collect", "fingerprint", "profile"]
