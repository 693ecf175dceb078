"""Layout: slabs become the tensors that the user asked for, nested as outputs x inputs."""

from torchjac.layout.arrange import Arranged, Layout, arrange, check_layout, converted, torch_layout

__all__ = ["Arranged", "Layout", "arrange", "check_layout", "converted", "torch_layout"]
