"""The system's C compiler, and what it has made before."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchjac.compiler.codegen.target import LIMIT
from torchjac.errors import PlanRefused
from torchjac.host import cache_dir as disk
from torchjac.host import system, toolchain

_DIGEST = hashlib.sha256().digest_size


class NoCompiler(PlanRefused):
    """This machine has no C compiler."""


def compiled(text: str, level: int, limit: float = LIMIT) -> Any:
    """Functions in C, compiled for this machine; what was compiled before is loaded.

    Args:
        text: The source.
        level: How much to optimize.
        limit: Seconds that this may take.

    Raises:
        NoCompiler: There is none.
        PlanRefused: It fails, or takes too long, or there are no kernels on this system.
    """
    refused = toolchain.refused()
    if refused is not None:
        raise PlanRefused(refused)
    command = _command()
    if command is None:
        raise NoCompiler("there is no C compiler (CC, cc, gcc, clang)")
    flags = [f"-O{level}", *toolchain.flags()]
    if "#pragma omp parallel" in text:
        try:
            return _by_choice(text, command, [*flags, "-fopenmp"], limit)
        except _TooLong:
            raise
        except PlanRefused:  # there is no OpenMP: it runs in one thread
            pass
    return _by_choice(text, command, flags, limit)


def _by_choice(text: str, command: tuple[str, ...], flags: list[str], limit: float) -> Any:
    """The functions, with what else the compiler takes."""
    tuned = _known(command)
    if tuned is not None:
        return _compiled(text, command, [*flags, *tuned], limit)
    try:  # most probably the first choice: this text tells as well as any other
        found = _compiled(text, command, [*flags, *toolchain.choices()[0]], limit)
    except _TooLong:
        raise
    except PlanRefused:
        tuned = _tuned(command)
        if tuned == toolchain.choices()[0]:
            raise
        return _compiled(text, command, [*flags, *tuned], limit)
    _keep(command, toolchain.choices()[0])
    return found


def _compiled(text: str, command: Sequence[str], flags: Sequence[str], limit: float) -> Any:
    about = "\0".join([text, *command, *flags, _version(tuple(command)), system.processor()])
    file = f"kernel-{hashlib.sha256(about.encode()).hexdigest()[:32]}{system.shared_suffix()}"
    found = _kept(file)
    if found is None:
        made = _made(command, flags, text, limit)
        disk.write(file, made + hashlib.sha256(made).digest())
        found = _kept(file) or _loaded_from_memory(made)
    return found


@functools.cache
def _command() -> tuple[str, ...] | None:
    """The compiler."""
    given = os.environ.get("CC")
    for candidate in ([given] if given else []) + list(toolchain.COMPILERS):
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return tuple(words)
    return None


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        return _run([*command, "--version"], 10.0).decode(errors="replace")
    except PlanRefused:
        return ""


@functools.cache
def _flags_file(command: tuple[str, ...]) -> str:
    known = map(" ".join, toolchain.choices())
    about = "\0".join([*command, _version(command), system.processor(), *known])
    return f"flags-{hashlib.sha256(about.encode()).hexdigest()[:32]}"


def _known(command: tuple[str, ...]) -> tuple[str, ...] | None:
    """Flags for this machine that the compiler takes, and libraries, if they are known."""
    if command in _found:
        return _found[command]
    known = (disk.read(_flags_file(command)) or b"").decode(errors="replace")
    return next((flags for flags in toolchain.choices() if " ".join(flags) == known), None)


def _keep(command: tuple[str, ...], flags: tuple[str, ...]) -> None:
    """Notes flags that the compiler takes, from run to run if they are the ones to be wished for.

    Others may be due to a machine that was busy.
    """
    _found[command] = flags
    if flags == toolchain.choices()[0]:
        disk.write(_flags_file(command), " ".join(flags).encode())


_found: dict[tuple[str, ...], tuple[str, ...]] = {}


def _tuned(command: tuple[str, ...]) -> tuple[str, ...]:
    """Flags that the compiler takes, by trial."""
    for flags in toolchain.choices():
        try:
            _made(command, flags, "int torchjac_nothing(void) { return 1; }\n", 10.0)
        except PlanRefused:
            continue
        break
    else:
        flags = ("-lm",)
    _keep(command, flags)
    return flags


def _made(command: Sequence[str], flags: Sequence[str], text: str, limit: float) -> bytes:
    """A shared object."""
    with tempfile.TemporaryDirectory(prefix="torchjac-") as folder:
        source, target = Path(folder) / "kernel.c", Path(folder) / f"kernel{system.shared_suffix()}"
        source.write_text(text, encoding="utf-8")
        before = [f for f in flags if not f.startswith("-l")]
        libraries = [f for f in flags if f.startswith("-l")]
        if "-shared" not in before:
            before += ["-shared", "-fPIC"]
        _run([*command, *before, str(source), "-o", str(target), *libraries], limit)
        try:
            return target.read_bytes()
        except OSError as error:
            raise PlanRefused(f"the compiler wrote nothing: {error}") from error


class _TooLong(PlanRefused):
    """Other flags would not help."""


def _run(command: Sequence[str], limit: float) -> bytes:
    """What a command prints.

    Raises:
        PlanRefused: It cannot be run, fails, or takes too long; it is ended then.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise PlanRefused(f"the C compiler cannot be run: {error}") from error
    try:
        printed, complaint = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as error:
        _end(process)
        raise _TooLong(f"the C compiler took more than {limit:.0f} s") from error
    except BaseException:  # interrupted: it is not left behind
        _end(process)
        raise
    if process.returncode:
        text = complaint.decode(errors="replace").strip().split("\n", 1)[0]
        raise PlanRefused(f"the C compiler failed: {text or f'exit status {process.returncode}'}")
    return printed


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):
        process.kill()
    process.communicate()


def _kept(file: str) -> Any:
    """What was compiled before, if it is whole."""
    path = disk.place(file)
    if path is None:
        return None
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _loaded_from_memory(made: bytes) -> Any:
    """A shared object that is not kept."""
    with tempfile.TemporaryDirectory(prefix="torchjac-") as folder:
        path = Path(folder) / f"kernel{system.shared_suffix()}"
        path.write_bytes(made)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise PlanRefused(f"what the C compiler made cannot be loaded: {error}") from error
