"""The other systems, in a Python of their own: which methods there are, and which workloads."""

from __future__ import annotations

JAX_PORTS = frozenset(
    {
        "forum", "arm", "mlp", "residuals", "waist", "nbody", "brusselator", "chemistry",
        "finite_volume", "bundle", "bundle_full",
    }
)  # fmt: skip
CASADI_PORTS = frozenset({"forum", "arm", "brusselator", "chemistry", "bundle"})

PEER_METHODS: dict[str, tuple[str, frozenset[str]]] = {
    "jax-jacrev": ("JAX jit jacrev", JAX_PORTS),
    "jax-jacfwd": ("JAX jit jacfwd", JAX_PORTS),
    "asdex": ("asdex (sparse)", JAX_PORTS),
    "casadi": ("CasADi", CASADI_PORTS),
}
"""Method key -> head of its column and the ports it has."""
