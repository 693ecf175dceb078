"""Layout: slabs become the tensors that the user asked for, nested as outputs x inputs."""

from torchjac.layout.arrange import Arranged, arrange, check_layout

__all__ = ["Arranged", "arrange", "check_layout"]
