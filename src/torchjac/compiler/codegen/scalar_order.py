"""In which order expressions of one lane are written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from torchjac.compiler.codegen.scalar_ir import ONE, Expression

# Calls of a function of the math library that are worth one call for all.
_GROUP = 3
# A group: the same function of several numbers.
Group = tuple[int, ...]


def needed(every: Sequence[Expression], wanted: Iterable[int]) -> list[int]:
    """The expressions that some need, these included, in the order in which they were made."""
    stack, seen = list(wanted), set()
    while stack:
        number = stack.pop()
        if number not in seen:
            seen.add(number)
            stack += [a for a, _ in every[number].arguments]
    return sorted(seen)


def grouped(
    every: Sequence[Expression], numbers: Sequence[int], vectorized: frozenset[str]
) -> Iterator[Group]:
    """Expressions of one lane, functions of the math library together where they can be.

    Otherwise in the order in which they were made: compilers keep to the order of the text where
    there are few registers, and it has what belongs together closer than a search from each result.

    Args:
        every: All expressions.
        numbers: Which ones are needed, in the order in which they were made.
        vectorized: Functions of which the target computes several at once.
    """
    numbers = [n for n in numbers if every[n].lanes is ONE]
    level: dict[int, int] = {}
    functions: defaultdict[tuple[int, str, str], list[int]] = defaultdict(list)
    for number in numbers:
        found = every[number]
        level[number] = max(
            [level[a] + (every[a].kind in vectorized) for a, _ in found.arguments], default=0
        )
        if found.kind in vectorized:
            functions[level[number], found.kind, found.dtype].append(number)
    groups = {min(group): tuple(group) for group in functions.values() if len(group) >= _GROUP}
    if not groups:
        yield from [(number,) for number in numbers]
        return
    within = {number for group in groups.values() for number in group}
    # What a level's functions are of comes first, then these, then what takes them.
    order = sorted(numbers, key=lambda n: (level[n], every[n].kind in vectorized, n))
    for number in order:
        if number in groups:
            yield groups[number]
        elif number not in within:
            yield (number,)
