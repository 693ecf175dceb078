"""Every error and warning torchjac raises on purpose.

All errors are `RuntimeError`s, because that is what `torch.autograd` and `torch.func` raise in the
same places; the second base says what kind of mistake it is.
"""

from __future__ import annotations


class TorchjacError(RuntimeError):
    """Base of every error that torchjac raises on purpose."""


class ArgumentError(TorchjacError, ValueError):
    """An argument of a torchjac call is not what the call takes."""


class DtypeError(TorchjacError, TypeError):
    """A Jacobian was asked of tensors that have none here: integer, bool or complex ones."""


class UnusedInputError(TorchjacError):
    """No output depends on an input whose derivative was asked for."""


class CoupledBatchError(TorchjacError):
    """`batched=True` was promised, but one sample's output depends on another sample's input."""


class PlanError(TorchjacError):
    """A plan cannot be saved or loaded."""


class PlanRefused(TorchjacError):
    """A plan cannot be run on this program; the message is the reason.

    Raised by engines and caught by the planner, which goes on to the next candidate. Users see it
    only when they force a plan (`torchjac.testing.force_plan`).

    Attributes:
        lasting: Whether it will not run on other values either; if not, it is tried again.
        user_code: Whether code of the user runs in the backward pass (or may).
        operation: The operation that torch has no batching rule for, where that is the reason.
    """

    lasting = True
    user_code = True
    operation: str | None = None


class RefusedHere(PlanRefused):
    """A plan cannot be run at these values."""

    lasting = False


class NotKnownLinear(PlanRefused):
    """The backward pass is not known to be linear in the cotangent."""


class Disagrees(PlanRefused):
    """The result of a plan is not what a pass of autograd gives.

    Attributes:
        report: What the issue tracker needs to know.
    """

    report: str | None = None


class CaptureRefused(TorchjacError):
    """A program cannot be captured as a graph; the message is the reason.

    Caught where a program can be differentiated without being captured.
    """


class PatternError(TorchjacError, ValueError):
    """A sparsity pattern does not fit the program, or does not fit into memory."""


class PatternMissed(PatternError):
    """A pattern lacks an entry that is not zero.

    Attributes:
        place: Name of the input leaf, and the element of it, whose column lacks an entry.
    """

    def __init__(self, name: str, element: int):
        super().__init__(
            f"torchjac: the pattern misses a nonzero: the column of element {element} of {name} "
            f"differs from what a plain backward pass gives. Every entry that can be nonzero must "
            f"be in the pattern; torchjac.jacobian(f).pattern(...) finds them."
        )
        self.place = (name, element)


class CompressionFailed(TorchjacError):
    """Rows or columns that share a pass do not come out as they do alone; caught and warned of."""


class PatternWarning(UserWarning):
    """A pattern could not be used; the result was computed without it, row by row."""


class LocalPatternWarning(UserWarning):
    """A pattern could be found for the given values only, not for every input."""


class UnusedInputWarning(UserWarning):
    """No output depends on an input of a function; its Jacobian is zero."""


class LoopWarning(UserWarning):
    """torch has no batching rule for an operation, so rows are evaluated in a loop."""
