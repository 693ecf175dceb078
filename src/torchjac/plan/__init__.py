"""Plan: which engine, mode and chunk evaluate a program, chosen by predicted then measured cost."""

from torchjac.plan.cost import plain_seconds
from torchjac.plan.grouping import Grouping, column_groups, row_groups
from torchjac.plan.memory import default_budget
from torchjac.plan.plan import Batching, Mode, Plan
from torchjac.plan.race import Race, forced, forced_plan, is_forced, race_for, single_pass

__all__ = [
    "Batching",
    "Grouping",
    "Mode",
    "Plan",
    "Race",
    "column_groups",
    "default_budget",
    "forced",
    "forced_plan",
    "is_forced",
    "plain_seconds",
    "race_for",
    "row_groups",
    "single_pass",
]
