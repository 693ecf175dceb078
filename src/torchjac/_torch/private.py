"""Private parts of torch (and of Python), and whether the running version has them.

torch renames and changes private parts between versions. `private` resolves a path, and returns a
placeholder where the part is gone, so that an import of this package never fails. A `Corner` is a
private part with a contract, the behavior on which torchjac relies. A check at the first use tests
the contract. If the check fails, the caller takes a slower public way, one log line says so, and
every `Record` of the process names the corner.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch

_log = logging.getLogger("torchjac")


class Gone:
    """A private part that this version of torch lacks."""

    def __init__(self, path: str):
        """Keeps the path."""
        self._path = path

    def __getattr__(self, name: str) -> Gone:
        """A part of a missing part is missing too."""
        if name.startswith("__"):  # protocols of Python, such as copy and pickle
            raise AttributeError(name)
        return type(self)(f"{self._path}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raises an error, as the function is missing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"torch {torch.__version__} has no {self._path}")

    def __repr__(self) -> str:
        """Names the path."""
        return f"<gone: {self._path}>"


@functools.cache  # one object per path, as tables use it as a key
def private(path: str) -> Any:
    """The object at a private path of torch, or a `Gone`.

    Args:
        path: Dotted names, beginning with `torch`.
    """
    return _resolve(path, Gone(path))


@functools.cache
def private_type(path: str, base: type = object) -> Any:
    """As `private`, for a class; a missing class is replaced by an empty class without instances.

    Args:
        path: Dotted names, beginning with `torch`.
        base: Base class of the empty class.
    """
    name = path.rsplit(".", 1)[-1]
    return _resolve(path, type(name, (base,), {"__doc__": f"Not in torch {torch.__version__}."}))


def private_function(path: str, public: Callable[..., Any]) -> Callable[..., Any]:
    """As `private`, for a fast private function with a public equivalent.

    Args:
        path: Dotted names of the private function, beginning with `torch`.
        public: The public equivalent, which replaces a missing function.
    """
    function: Callable[..., Any] = _resolve(path, public)
    return function


def _resolve(path: str, fallback: Any) -> Any:
    names = path.split(".")
    value: Any = torch
    for count, name in enumerate(names[1:], start=2):
        try:
            value = getattr(value, name)
        except AttributeError:
            try:
                value = importlib.import_module(".".join(names[:count]))
            except ImportError:
                return fallback
    return value


class Corner:
    """A private part of torch with a contract, checked once, when the part is first used.

    Attributes:
        name: The part, in words.
        instead: Consequence of a broken contract, in words.
        known: Whether the contract holds; None before the check. Callers on a hot path read this
            attribute first: `if corner.known or corner.holds():`.
    """

    def __init__(self, name: str, instead: str, check: Callable[[], bool]):
        """Registers the corner in `CORNERS`."""
        self.name = name
        self.instead = instead
        self.known: bool | None = None
        self.check = check
        CORNERS.append(self)

    def holds(self) -> bool:
        """Whether the contract holds for this version of torch."""
        if self.known is None:
            check_contracts(self)
        return bool(self.known)

    def record(self, reason: str | None) -> None:
        """Records the result of the check: the reason of a broken contract, or None."""
        if reason is not None:
            _log.warning(
                "%s is not as torchjac expects (%s), so %s",
                self._versions(),
                reason,
                self.instead,
            )
        self.known = reason is None

    def __str__(self) -> str:
        """The corner and the consequence of its broken contract, for a record."""
        return f"{self._versions()} is not as torchjac expects, so {self.instead}"

    def _versions(self) -> str:
        return f"torch {torch.__version__}, Python {platform.python_version()}: {self.name}"


CORNERS: list[Corner] = []


def corner(name: str, instead: str) -> Callable[[Callable[[], bool]], Corner]:
    """Decorates the check of a contract, and returns the corner.

    The check returns whether the contract holds. An error means that the contract is broken.

    Args:
        name: The part of torch, in words.
        instead: Consequence of a broken contract, in words: "Jacobians are ...".
    """
    return lambda check: Corner(name, instead, check)


def failures() -> tuple[str, ...]:
    """The corners with a broken contract, in words."""
    return tuple(str(c) for c in CORNERS if c.known is False)


class _Checks(threading.local):
    """Whether this thread is in a check, which may run another check."""

    active = False


_checks = _Checks()
_lock = threading.Lock()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """A lock around checks, reentrant for a check within a check."""
    if _checks.active:
        yield
        return
    with _lock:
        yield


@contextmanager
def checking_here() -> Iterator[None]:
    """A context in which this thread checks contracts, for those independent of any mode."""
    before, _checks.active = _checks.active, True
    try:
        yield
    finally:
        _checks.active = before


def _reset_lock() -> None:
    """Replaces the lock in a forked process, as another thread may have held the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_lock)


def check_contracts(*corners: Corner) -> None:
    """Checks all contracts that were not checked before.

    If a check needs a thread and none can be started (at the end of the process), the contract
    stays unknown, without a log line.
    """
    with _one_at_a_time():
        unknown = [c for c in corners if c.known is None]
        if not unknown or sys.is_finalizing():
            return

        def run() -> None:
            for part in unknown:
                if part.known is None:  # an earlier check may have run this one
                    part.record(_failure_of(part.check))

        with suppress(RuntimeError):
            _run_isolated(run)


def contract_failure(check: Callable[[], bool]) -> str | None:
    """The reason of a broken contract; None if the contract holds.

    Raises:
        RuntimeError: No thread can be started.
    """
    reasons: list[str | None] = []
    _run_isolated(lambda: reasons.append(_failure_of(check)))
    return reasons[0] if reasons else "its check did not end"


def _failure_of(check: Callable[[], bool]) -> str | None:
    try:
        return None if check() else "its contract does not hold"
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        return f"{type(error).__name__}: {first}"


def _run_isolated(run: Callable[[], None]) -> None:
    """Runs checks outside of all modes and transforms of the caller.

    Checks run in this thread if no mode or transform is active, else in a new thread (0.1 ms, and
    more on a busy machine). Settings of the process hold in every thread, so a check names dtypes
    and devices.

    Raises:
        RuntimeError: No thread can be started.
    """
    if _checks.active:  # a check within a check
        run()
    elif _is_isolated():
        with checking_here():
            run()
    else:
        thread = threading.Thread(target=_run_active, args=(run,), name="torchjac-contract")
        thread.daemon = True
        thread.start()
        thread.join()


def _run_active(run: Callable[[], None]) -> None:
    _checks.active = True
    run()


def _is_isolated() -> bool:
    """Whether no mode and no transform is active in this thread; False if torch does not tell."""
    try:
        return (
            torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
            and not any(read() for read in _DEPTHS)
            and _hooks(False) is None
            and bool(_hooks_are_enabled())
        )
    except Exception:
        return False


_DEPTHS = tuple(
    private(f"torch._C.{name}")
    for name in (
        "_len_torch_function_stack",
        "_len_torch_dispatch_stack",
        "_is_any_autocast_enabled",
        "_functorch.peek_interpreter_stack",
    )
)
_hooks = private("torch._C._autograd._top_saved_tensors_default_hooks")
_hooks_are_enabled = private("torch._C._autograd._saved_tensors_hooks_is_enabled")
