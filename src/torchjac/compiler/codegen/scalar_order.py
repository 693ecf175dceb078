"""The order of scalar statements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from torchjac.compiler.codegen.scalar_ir import SCALAR, Expression

_GROUP = 3  # calls of one math function: fewer are not worth a SIMD call
# A call group: calls of one math function on several numbers.
CallGroup = tuple[int, ...]


def reachable(every: Sequence[Expression], wanted: Iterable[int]) -> list[int]:
    """The expressions that some expressions need, themselves included, in order of creation."""
    stack, seen = list(wanted), set()
    while stack:
        number = stack.pop()
        if number not in seen:
            seen.add(number)
            stack += [a for a, _ in every[number].arguments]
    return sorted(seen)


def call_groups(
    every: Sequence[Expression], numbers: Sequence[int], vectorized: frozenset[str]
) -> Iterator[CallGroup]:
    """Scalar expressions in order, with calls of one math function grouped where possible.

    Other expressions keep the order of creation: compilers follow the order of the text where
    registers are few, and creation order keeps related statements closer than depth-first order.

    Args:
        every: All expressions.
        numbers: The expressions that are needed, in order of creation.
        vectorized: The functions that the target calls on several numbers at once.
    """
    numbers = [n for n in numbers if every[n].domain is SCALAR]
    level: dict[int, int] = {}
    functions: defaultdict[tuple[int, str, str], list[int]] = defaultdict(list)
    for number in numbers:
        expression = every[number]
        level[number] = max(
            [level[a] + (every[a].kind in vectorized) for a, _ in expression.arguments], default=0
        )
        if expression.kind in vectorized:
            functions[level[number], expression.kind, expression.dtype].append(number)
    groups = {min(group): tuple(group) for group in functions.values() if len(group) >= _GROUP}
    if not groups:
        yield from [(number,) for number in numbers]
        return
    within = {number for group in groups.values() for number in group}
    # At each level come the arguments of its functions, then these, then their users.
    order = sorted(numbers, key=lambda n: (level[n], every[n].kind in vectorized, n))
    for number in order:
        if number in groups:
            yield groups[number]
        elif number not in within:
            yield (number,)
