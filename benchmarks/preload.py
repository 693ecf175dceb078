"""What the fork server imports once, so that no worker has to: only imports, no tensors.

The first call of a `torch.func` transform imports torch._dynamo, the first compilation imports
Inductor; together several seconds, which every worker process would pay again.
"""

import contextlib

import torch._decomp
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401

import benchmarks.methods
import benchmarks.workloads  # noqa: F401

with contextlib.suppress(ImportError):
    import torchjac  # noqa: F401
