"""Private parts of torch (and of Python), and whether the version that runs has them.

torch renames and changes private parts between versions. `private` finds one by its path and gives
a placeholder where it is gone, so that importing this package never fails. A `Corner` is a private
part together with its contract: a check at the first use tells whether that part still does what
torchjac relies on. Where the check fails, the caller takes a slower public way, one log line says
so, and every `Record` of this process names the corner.
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
        """Everything in it is gone as well."""
        if name.startswith("__"):  # protocols of Python, such as copy and pickle
            raise AttributeError(name)
        return type(self)(f"{self._path}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raises an error, as there is nothing to run.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"torch {torch.__version__} has no {self._path}")

    def __repr__(self) -> str:
        """Names the path."""
        return f"<gone: {self._path}>"


@functools.cache  # one object a path: tables may have it as a key
def private(path: str) -> Any:
    """What torch has at a private path; a `Gone` where it has nothing there.

    Args:
        path: Dotted names, beginning with `torch`.
    """
    return _resolve(path, Gone(path))


@functools.cache
def private_type(path: str, base: type = object) -> Any:
    """As `private`, for a class: an empty class, of which there are no objects, where it is gone.

    Args:
        path: As for `private`.
        base: What the empty class derives from.
    """
    name = path.rsplit(".", 1)[-1]
    return _resolve(path, type(name, (base,), {"__doc__": f"Not in torch {torch.__version__}."}))


def private_function(path: str, public: Callable[..., Any]) -> Callable[..., Any]:
    """As `private`, for a function that has a public equivalent.

    Args:
        path: Dotted names of the private function, which is faster.
        public: The public function, which does the same.
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
        instead: What runs where the contract does not hold, in words.
        known: Whether the contract holds; None before it was checked. Callers on a hot path read
            this first: `if corner.known or corner.holds():`.
    """

    def __init__(self, name: str, instead: str, check: Callable[[], bool]):
        """Enters the corner into `CORNERS`."""
        self.name = name
        self.instead = instead
        self.known: bool | None = None
        self.check = check
        CORNERS.append(self)

    def holds(self) -> bool:
        """Whether this version of torch keeps the contract."""
        if self.known is None:
            check_contracts(self)
        return bool(self.known)

    def record(self, reason: str | None) -> None:
        """Notes why the contract does not hold; None: it does."""
        if reason is not None:
            _log.warning(
                "%s is not as torchjac expects (%s), so %s",
                self._versions(),
                reason,
                self.instead,
            )
        self.known = reason is None

    def __str__(self) -> str:
        """The corner and what runs instead, for a record."""
        return f"{self._versions()} is not as torchjac expects, so {self.instead}"

    def _versions(self) -> str:
        return f"torch {torch.__version__}, Python {platform.python_version()}: {self.name}"


CORNERS: list[Corner] = []


def corner(name: str, instead: str) -> Callable[[Callable[[], bool]], Corner]:
    """Makes a corner of a function that checks its contract.

    The function returns whether the contract holds. An error says that it does not.

    Args:
        name: The part of torch, in words.
        instead: What runs where the contract does not hold, in words: "Jacobians are ...".
    """
    return lambda check: Corner(name, instead, check)


def failures() -> tuple[str, ...]:
    """The corners whose contract was found not to hold, in words."""
    return tuple(str(c) for c in CORNERS if c.known is False)


class _Checks(threading.local):
    """Whether this thread checks a contract, whose check may ask for another one."""

    active = False


_checks = _Checks()
_lock = threading.Lock()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """One check at a time; a check within a check goes on."""
    if _checks.active:
        yield
        return
    with _lock:
        yield


@contextmanager
def checking_here() -> Iterator[None]:
    """Within it contracts are checked in this thread: those that no mode of a caller matters to."""
    before, _checks.active = _checks.active, True
    try:
        yield
    finally:
        _checks.active = before


def _reset_lock() -> None:
    """A process that was forked during a check of another thread."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_lock)


def check_contracts(*corners: Corner) -> None:
    """Checks contracts that were not checked yet.

    Where that would take a thread and none can be started (at the end of the process), nothing is
    found out, and nothing is said.
    """
    with _one_at_a_time():
        unknown = [c for c in corners if c.known is None]
        if not unknown or sys.is_finalizing():
            return

        def run() -> None:
            for part in unknown:
                if part.known is None:  # not found out on the way
                    part.record(_failure_of(part.check))

        with suppress(RuntimeError):
            _run_isolated(run)


def contract_failure(check: Callable[[], bool]) -> str | None:
    """Why a contract does not hold; None if it does.

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
    """Runs checks where no modes, transforms and settings surround them.

    That is here if there are none, else a thread of its own, to which those of the caller do not
    belong: to start one takes 0.1 ms, and several on a busy machine. Settings of the process are
    everywhere: a check names dtypes and devices.

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
    """Whether this thread is in no mode and no transform; False where torch does not tell."""
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
