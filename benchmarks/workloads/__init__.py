"""The registry: named workloads at the sizes that the table shows, and the way to other sizes.

``build("arm7")`` takes a registered name; ``build("arm(joints=12, poses=100)")`` calls the family
of that name with other arguments, from Python and from the command line alike.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from types import MappingProxyType

from benchmarks.workloads.base import Workload
from benchmarks.workloads.bundle import bundle, bundle_full
from benchmarks.workloads.forum import forum
from benchmarks.workloads.kinematics import arm
from benchmarks.workloads.mesh import finite_volume
from benchmarks.workloads.networks import mlp, pinn, residuals, waist
from benchmarks.workloads.physics import brusselator, chemistry, nbody

__all__ = ["FAMILIES", "QUICK", "REGISTRY", "Workload", "build"]

FAMILIES: Mapping[str, Callable[..., Workload]] = MappingProxyType(
    {
        family.__name__: family
        for family in (
            forum, arm, mlp, pinn, residuals, waist, nbody, brusselator, chemistry,
            finite_volume, bundle, bundle_full,
        )
    }
)  # fmt: skip
"""Functions that build one workload each, by name."""

REGISTRY: Mapping[str, str] = MappingProxyType(
    {
        "forum": "forum()",
        "forum-graph": "forum(graph=True)",
        "arm7": "arm(joints=7)",
        "arm30": "arm(joints=30)",
        "arm7-x4096": "arm(joints=7, poses=4096)",
        "arm30-x4096": "arm(joints=30, poses=4096)",
        "mlp-3-64-64-5": "mlp()",
        "pinn-x1024": "pinn()",
        "residuals-576x84": "residuals(576, 2, 21)",
        "residuals-2000x321": "residuals(2000, 3, 64, True)",
        "residuals-10000x1001": "residuals(10000, 18, 50, True)",
        "waist-1000-20-1000": "waist()",
        "nbody-128": "nbody()",
        "brusselator-32": "brusselator()",
        "volumes-600": "finite_volume()",
        "chemistry-20": "chemistry()",
        "chemistry-20-x1024": "chemistry(batch=1024)",
        "bundle-x31843": "bundle()",
        "bundle-full-5-60-200": "bundle_full()",
    }
)
"""Workload name -> the call that builds it; the rows of the table, in its order."""

QUICK: tuple[str, ...] = (
    "forum",
    "forum-graph",
    "arm7",
    "arm(joints=7, poses=64)",
    "mlp-3-64-64-5",
    "residuals(64, 2, 8)",
    "nbody(bodies=12)",
    "brusselator(n=6)",
    "chemistry-20",
)
"""What ``--quick`` runs: small versions of the registry, under a minute in all."""


def build(spec: str) -> Workload:
    """The workload of a registered name or of a family call such as ``"nbody(bodies=64)"``.

    Raises:
        ValueError: If `spec` is neither, or an argument is not a literal.
    """
    call = REGISTRY.get(spec, spec)
    try:
        node = ast.parse(call, mode="eval").body
    except SyntaxError:
        node = None
    if (
        not isinstance(node, ast.Call)
        or not isinstance(node.func, ast.Name)
        or node.func.id not in FAMILIES
    ):
        known = ", ".join(REGISTRY)
        calls = ", ".join(f"{name}(...)" for name in FAMILIES)
        raise ValueError(f"no workload {spec!r}; names: {known}; other sizes: {calls}")
    args = [ast.literal_eval(arg) for arg in node.args]
    kwargs = {kw.arg: ast.literal_eval(kw.value) for kw in node.keywords if kw.arg}
    return FAMILIES[node.func.id](*args, **kwargs)
