"""Every error and warning that torchjac raises on purpose.

All errors are `RuntimeError`s, as those of `torch.autograd` and `torch.func` in the same places. A
second base class (`ValueError`, `TypeError`) names the kind of mistake.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

# Files of torchjac, which no warning names.
_HERE = str(Path(__file__).parent)


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the line that called torchjac: Python shows a warning once for each line."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class TorchjacError(RuntimeError):
    """Base of every error that torchjac raises on purpose."""


class ArgumentError(TorchjacError, ValueError):
    """An argument of a torchjac call has a wrong type, value or shape."""


class DtypeError(TorchjacError, TypeError):
    """The Jacobian of integer, bool or complex tensors was requested."""


class UnusedInputError(TorchjacError):
    """No output depends on an input whose derivative was requested."""


class CoupledBatchError(TorchjacError):
    """With `batched=True` the output of one sample depends on the input of another sample."""


class PlanError(TorchjacError):
    """A plan cannot be saved or loaded."""


class PlanRefused(TorchjacError):
    """A plan cannot run on a program; the message is the reason.

    Engines raise it, and the next candidate runs instead. Users see it only when they force a plan
    (`torchjac.testing.force_plan`).

    Attributes:
        lasting: Whether the plan is refused at other values as well; if not, it is tried again.
        user_code: Whether code of the user runs, or may run, in the backward pass.
        operation: The operation without a batching rule in torch; None for another reason.
    """

    lasting = True
    user_code = True
    operation: str | None = None


class RefusedHere(PlanRefused):
    """A plan cannot run at these values."""

    lasting = False


class NotKnownLinear(PlanRefused):
    """The backward pass is not proved to be linear in the cotangent."""


class Disagrees(PlanRefused):
    """The result of a plan differs from that of a pass of autograd.

    Attributes:
        report: A bug report for the issue tracker; None if there is none.
    """

    report: str | None = None


class CaptureRefused(TorchjacError):
    """A program cannot be captured as a graph; the message is the reason.

    Callers catch it if they can differentiate the program without a capture.
    """


class PatternError(TorchjacError, ValueError):
    """A sparsity pattern has a wrong shape for the program, or does not fit into memory."""


class PatternMissed(PatternError):
    """A pattern lacks a nonzero entry.

    Attributes:
        place: The column that lacks an entry: name of the input leaf, and number of its element.
    """

    def __init__(self, name: str, element: int):
        super().__init__(
            f"torchjac: the pattern misses a nonzero: the column of element {element} of {name} "
            f"differs from what a plain backward pass gives. Every entry that can be nonzero must "
            f"be in the pattern; torchjac.jacobian(f).pattern(...) finds them."
        )
        self.place = (name, element)


class CompressionFailed(TorchjacError):
    """Compressed passes differ from plain ones; caught, with a warning."""


class PatternWarning(UserWarning):
    """A pattern is unusable; the result was computed row by row, without the pattern."""


class LocalPatternWarning(UserWarning):
    """A pattern holds for the values of the arguments only, not for every input."""


class UnusedInputWarning(UserWarning):
    """No output depends on an input of a function; its Jacobian is zero."""


class LoopWarning(UserWarning):
    """torch has no batching rule for an operation, so rows are evaluated in a loop."""
