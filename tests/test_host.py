"""Other systems than the one that runs the tests, faked: what would be done there."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchjac
from laws import oracle_jacobian, same, value
from torchjac._torch import native
from torchjac.compiler.codegen.c import cpython_entry as entry
from torchjac.compiler.codegen.c import guard_reads as readings
from torchjac.compiler.codegen.c import toolchain as compiler
from torchjac.errors import PlanRefused
from torchjac.host import cache_dir as disk
from torchjac.host import system, toolchain

CACHED = (
    compiler._command,
    compiler._version,
    compiler._flags_file,
    entry.has_native_calls,
    native._library,
    native._symbol,
    native._context,
    readings._library,
    system.processor,
)
NAMES = {"macos": "darwin", "windows": "win32", "other": "freebsd14"}


@contextlib.contextmanager
def faked(name: str, tmp_path: Path, machine: str = "arm64") -> Iterator[pytest.MonkeyPatch]:
    """A process that takes its system for another one, and finds nothing of Linux there."""
    importlib.import_module("torch._dynamo")  # torch's own: not to be imported in disguise
    real = Path.read_text

    def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(path)
        return real(path, *args, **kwargs)

    for cached in CACHED:
        cached.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", NAMES[name])
        patch.setattr(platform, "machine", lambda: machine)
        patch.setattr(Path, "read_text", read_text)
        patch.setattr(compiler, "_flags_of", {})
        patch.setenv("TORCHJAC_CACHE_DIR", str(tmp_path / "cache"))
        if name == "windows":
            for missing in ("getuid", "sysconf", "killpg"):
                patch.delattr(os, missing)
        yield patch
    for cached in CACHED:
        cached.cache_clear()


def f(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * x.sum()


@pytest.mark.parametrize("name", NAMES)
def test_jacobians(name: str, tmp_path: Path) -> None:
    """Right everywhere. Kernels: where a C compiler is expected to make them."""
    x = value(5)
    with faked(name, tmp_path):
        J = torchjac.jacobian(f, compile=True)
        for k in range(3):
            same(J(x + k), oracle_jacobian(f)(x + k))
        same(torchjac.jacobian(f, layout=torch.sparse_csr)(x).to_dense(), oracle_jacobian(f)(x))
        record = J.explain(x)
        if name == "windows":
            with pytest.raises(PlanRefused, match="kernels are not compiled on Windows"):
                compiler.compile_library("int f(void) { return 7; }", 1)
    if name == "windows":
        assert "kernel" not in record.mode
        if record.engine == "accumulate":  # where passes are faster there is no need of a kernel
            assert "not compiled on Windows" in dict(record.refusals)["kernel"]
    else:
        assert "kernel" in record.mode, record


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str, tmp_path: Path) -> None:
    with faked(name, tmp_path):
        assert system.system() == name
        suffix = {"macos": ".dylib", "windows": ".dll"}.get(name, ".so")
        assert system.shared_suffix() == suffix
        assert system.torch_library().endswith(suffix)
        assert native._library() is None or name == "other"  # the file has another name here
        assert native.setting(torch.is_grad_enabled) is None or name == "other"
        assert not entry.has_native_calls()
        assert system.processor().startswith("arm64")
    assert system.system() == "linux" or sys.platform != "linux"


def test_memory(tmp_path: Path) -> None:
    with faked("macos", tmp_path):
        assert 2**28 < system.free_memory() < 2**50
    with faked("windows", tmp_path):
        assert system.free_memory() == system._ASSUMED_MEMORY


def test_caches(tmp_path: Path) -> None:
    """The directory that each system has for them; `XDG_CACHE_HOME` everywhere."""
    with faked("macos", tmp_path) as patch:
        patch.delenv("TORCHJAC_CACHE_DIR")
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setenv("HOME", str(tmp_path))
        assert disk.directory() == tmp_path / "Library" / "Caches" / "torchjac"
    with faked("windows", tmp_path) as patch:
        patch.delenv("TORCHJAC_CACHE_DIR")
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
        assert disk.directory() == tmp_path / "Local" / "torchjac"
        assert disk.write("a", b"one")
        assert disk.read("a") == b"one"
        patch.delenv("LOCALAPPDATA")
        patch.setenv("HOME", str(tmp_path))
        assert disk.directory() == tmp_path / "AppData" / "Local" / "torchjac"
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert disk.directory() == tmp_path / "xdg" / "torchjac"


@pytest.mark.parametrize(
    ("name", "machine", "tuned"),
    [("macos", "arm64", "-mcpu=native"), ("macos", "x86_64", "-march=native")],
)
def test_flags(name: str, machine: str, tuned: str, tmp_path: Path) -> None:
    """Clang's: no library of vectorized functions, no parameters of GCC."""
    with faked(name, tmp_path, machine) as patch:
        log = tmp_path / "log"
        real = shutil.which("cc")
        clang = tmp_path / "clang"
        arguments = '$(echo "$@" | sed s/-mcpu.native//)'  # GCC for x86 does not take it
        clang.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} {arguments}\n')
        clang.chmod(0o755)
        patch.setenv("CC", str(clang))
        assert compiler.compile_library("int f(void) { return 7; }", 1).f() == 7
        (library,) = (tmp_path / "cache").glob("kernel-*")
        assert library.suffix == ".dylib"
        line = log.read_text().splitlines()[-1].split()
        assert tuned in line
        assert "-lmvec" not in line
        assert not [word for word in line if word.startswith("--param")]


class TestFreeThreaded:
    """A build without a global lock, faked: kernels are refused, the rest runs."""

    def test_kernels_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
        readings._library.cache_clear()
        J = torchjac.jacobian(f, compile=True)
        x = value(4)
        same(J(x), oracle_jacobian(f)(x))
        record = J.explain(x)
        assert "kernel" not in record.mode
        if record.engine == "accumulate":
            assert "free-threaded" in dict(record.refusals)["kernel"]
        with pytest.raises(PlanRefused, match="free-threaded"):
            compiler.compile_library("int f(void) { return 7; }", 1)
        assert readings._library() is None
        readings._library.cache_clear()

    def test_usual_builds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
        assert system.has_gil()
        monkeypatch.delattr(sys, "_is_gil_enabled")  # before Python 3.13
        assert system.has_gil()


def test_this_system() -> None:
    """What is found here is what is here."""
    assert (system.system() == "linux") == sys.platform.startswith("linux")
    library = Path(torch.__file__).parent / "lib" / system.torch_library()
    assert library.exists()
    assert ctypes.CDLL(str(library)) is not None
    assert toolchain.refused() is None
    assert len(set(toolchain.choices())) == len(toolchain.choices())
