"""The system's C compiler, and its cache."""

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

from torchjac.compiler.codegen.target import COMPILE_SECONDS
from torchjac.errors import PlanRefused
from torchjac.host import cache_dir as disk
from torchjac.host import system, toolchain

_DIGEST = hashlib.sha256().digest_size


class NoCompiler(PlanRefused):
    """This machine has no C compiler."""


def compile_library(text: str, level: int, limit: float = COMPILE_SECONDS) -> Any:
    """A library of C functions, compiled for this machine, or loaded from the cache.

    Args:
        text: The source.
        level: The optimization level.
        limit: Seconds that compiling may take.

    Raises:
        NoCompiler: There is no compiler.
        PlanRefused: Compiling fails or takes too long, or this system has no kernels.
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
        except PlanRefused:  # without OpenMP the library runs in one thread
            pass
    return _by_choice(text, command, flags, limit)


def _by_choice(text: str, command: tuple[str, ...], flags: list[str], limit: float) -> Any:
    """The library, compiled with the best flags that the compiler accepts."""
    tuned = _known(command)
    if tuned is not None:
        return _compile_cached(text, command, [*flags, *tuned], limit)
    try:  # the first choice is likely: this text is a test as good as any
        library = _compile_cached(text, command, [*flags, *toolchain.choices()[0]], limit)
    except _TooLong:
        raise
    except PlanRefused:
        tuned = _tuned(command)
        if tuned == toolchain.choices()[0]:
            raise
        return _compile_cached(text, command, [*flags, *tuned], limit)
    _keep(command, toolchain.choices()[0])
    return library


def _compile_cached(text: str, command: Sequence[str], flags: Sequence[str], limit: float) -> Any:
    about = "\0".join([text, *command, *flags, _version(tuple(command)), system.processor()])
    file = f"kernel-{hashlib.sha256(about.encode()).hexdigest()[:32]}{system.shared_suffix()}"
    library = _load_cached(file)
    if library is None:
        data = _compile(command, flags, text, limit)
        disk.write(file, data + hashlib.sha256(data).digest())
        library = _load_cached(file) or _loaded_from_memory(data)
    return library


@functools.cache
def _command() -> tuple[str, ...] | None:
    """The command of the compiler."""
    requested = os.environ.get("CC")
    for candidate in ([requested] if requested else []) + list(toolchain.COMPILERS):
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
    """The cached flags of a compiler for this machine; None without cache."""
    if command in _flags_of:
        return _flags_of[command]
    known = (disk.read(_flags_file(command)) or b"").decode(errors="replace")
    return next((flags for flags in toolchain.choices() if " ".join(flags) == known), None)


def _keep(command: tuple[str, ...], flags: tuple[str, ...]) -> None:
    """Caches the flags of a compiler: on disk only if they are the first choice.

    A worse choice may be due to a busy machine.
    """
    _flags_of[command] = flags
    if flags == toolchain.choices()[0]:
        disk.write(_flags_file(command), " ".join(flags).encode())


_flags_of: dict[tuple[str, ...], tuple[str, ...]] = {}


def _tuned(command: tuple[str, ...]) -> tuple[str, ...]:
    """The flags of a compiler, by trial."""
    for flags in toolchain.choices():
        try:
            _compile(command, flags, "int torchjac_nothing(void) { return 1; }\n", 10.0)
        except PlanRefused:
            continue
        break
    else:
        flags = ("-lm",)
    _keep(command, flags)
    return flags


def _compile(command: Sequence[str], flags: Sequence[str], text: str, limit: float) -> bytes:
    """A shared object, as bytes."""
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
    """The output of a command.

    Raises:
        PlanRefused: The command cannot be run, fails, or takes too long; it is killed then.
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
    except BaseException:  # interrupted: the command must not survive
        _end(process)
        raise
    if process.returncode:
        text = complaint.decode(errors="replace").strip().split("\n", 1)[0]
        raise PlanRefused(f"the C compiler failed: {text or f'exit status {process.returncode}'}")
    return printed


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):
        process.kill()
    process.communicate()


def _load_cached(file: str) -> Any:
    """A library from the cache, if its checksum is right; None for the rest."""
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


def _loaded_from_memory(data: bytes) -> Any:
    """A library that is not cached."""
    with tempfile.TemporaryDirectory(prefix="torchjac-") as folder:
        path = Path(folder) / f"kernel{system.shared_suffix()}"
        path.write_bytes(data)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise PlanRefused(f"what the C compiler made cannot be loaded: {error}") from error
