"""Plan: which engine, mode and chunk evaluate a program, chosen by predicted then measured cost."""

from torchjac.plan.memory import default_budget
from torchjac.plan.plan import Batching, Mode, Plan
from torchjac.plan.race import Race, forced_plan, race_for, single_pass

__all__ = [
    "Batching",
    "Mode",
    "Plan",
    "Race",
    "default_budget",
    "forced_plan",
    "race_for",
    "single_pass",
]
