"""The targets: outside of a target, only this module imports one."""

from __future__ import annotations

from torchjac.compiler.codegen.c.target import CTarget
from torchjac.compiler.codegen.target import Target

# The target of the machine that torch runs on.
HOST: Target = CTarget()
