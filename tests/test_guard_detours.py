"""What is read by detours is either watched or refused, and what is ordinary is not refused.

As in test_guards.py, each case is a function and a change. The law: either the function cannot be
guarded, or the change is noticed and the answer is that of the function as it is now.
"""

from __future__ import annotations

import builtins
import datetime
import decimal
import os
import pathlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from os import getenv
from pathlib import Path
from random import choice, random
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import changes_detours as detours
from changes import Case
from guarding import call, direct, guarded, reason
from torchjac.guards.bytecode import is_trusted
from torchjac.guards.guard import Unguardable, build_guard
from torchjac.jit.cache import CaptureCache


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Modules, builtins and settings, whatever a case does to them."""
    detours.set_global("k", 2.0)
    detours.settings.k = 2.0
    modules, known = dict(sys.modules), dict(vars(builtins))
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for space, old in ((sys.modules, modules), (vars(builtins), known)):
        for name in [n for n in space if n not in old and "of_mine" in n]:
            del space[name]
    builtins.abs = known["abs"]
    if "colorsys" in sys.modules and "colorsys" not in modules:
        del sys.modules["colorsys"]
    detours.log.setLevel(0)


@pytest.mark.parametrize("case", detours.NOTICED, ids=lambda c: c.__name__)
class TestNoticed:
    def test_the_guard_names_the_change(self, case: Callable[[], Case]) -> None:
        f, change = case()
        guard = guarded(call(f))
        assert guard.mismatch(call(f)) is None
        change()
        mismatch = guard.mismatch(call(f))
        assert mismatch is not None
        assert len(mismatch.reason) > 10
        assert "cannot be compared" not in mismatch.reason

    def test_there_is_a_new_capture(self, case: Callable[[], Case]) -> None:
        f, change = case()
        cache: CaptureCache[Tensor] = CaptureCache()
        before = direct(f)
        assert cache.get_or_create(call(f), lambda: direct(f)) is not None
        assert cache.get_or_create(call(f), lambda: pytest.fail("is used again")) is not None
        change()
        after = cache.get_or_create(call(f), lambda: direct(f))
        assert torch.equal(after, direct(f))
        assert not torch.equal(after, before)


path = Path("nowhere")
local = threading.local()


def package(main: str, **modules: dict[str, Any]) -> Any:
    """A package of a user's with these modules, and a module that imports it."""
    top = detours.module("project_of_mine", __path__=[])
    for name, held in modules.items():
        setattr(top, name, detours.module(f"project_of_mine.{name}", **held))
    return detours.module("main_of_mine", f"import project_of_mine.utils\n{main}").f, top


class TestModulesOfModules:
    def test_only_what_is_read_is_walked(self) -> None:
        """What else there is in a module may be anything, even if names are computed elsewhere."""
        main = (
            "def f(x): return x * project_of_mine.utils.scale(getattr(x, '_k', 1))\n"
            "import os, time\n"
        )
        source = "import os, time, sys\nk = 2.0\ndef scale(v): return v * k\ndef other(): open(os)"
        f, top = package(main, utils={"source": source, "stream": sys.stdout})
        guard = guarded(call(f))
        assert guard.mismatch(call(f)) is None
        top.utils.stream = None
        assert guard.mismatch(call(f)) is None
        top.utils.k = 3.0
        assert guard.mismatch(call(f)) is not None

    @pytest.mark.parametrize("handed", ["project_of_mine", "project_of_mine.utils"])
    def test_a_module_that_is_handed_on_is_read_by_any_name(self, handed: str) -> None:
        last = "utils." if handed == "project_of_mine" else ""
        main = f"def g(m, x): return x * m.{last}k\ndef f(x): return g({handed}, x)"
        f, top = package(main, utils={"k": 2.0})
        guard = guarded(call(f))
        top.utils.k = 3.0
        assert guard.mismatch(call(f)) is not None

    def test_a_module_that_is_replaced(self) -> None:
        f, top = package("def f(x): return x * project_of_mine.utils.k", utils={"k": 2.0})
        guard = guarded(call(f))
        top.utils = types.SimpleNamespace(k=3.0)
        assert guard.mismatch(call(f)) is not None


class TestRefused:
    @pytest.mark.parametrize(
        ("f", "says"), detours.REFUSED, ids=[s.replace(" ", "-") for _, s in detours.REFUSED]
    )
    def test_what_reaches_everything(self, f: Callable[..., Any], says: str) -> None:
        assert says in reason(f)

    @pytest.mark.parametrize(
        ("f", "says"),
        [
            (lambda x: x * float(getenv("N", "1")), "getenv"),
            (lambda x: x * random(), "random"),
            (lambda x: x * choice([1.0]), "choice"),
            (lambda x: x * perf_counter(), "perf_counter"),
            (lambda x: x * datetime.datetime.now().year, "datetime"),
            (lambda x: x * float(os.environ["N"]), "environ"),
            (lambda x: x * float(path.read_text()), "read_text"),
            (lambda x: x * path.exists(), "files"),
            (lambda x: x * float(Path("n").open().read()), "Path"),  # noqa: SIM115
            (lambda x: x * float(pathlib.Path("n").stat().st_size), "pathlib"),
            (lambda x: x * np.loadtxt("n"), "loadtxt"),
            (lambda x: x * torch.load("n"), "torch.load"),
            (lambda x: x * torch.get_num_threads(), "get_num_threads"),
            (lambda x: x * torch.initial_seed(), "initial_seed"),
            (lambda x: x * torch.backends.mkldnn.enabled, "backends"),
            (lambda x: x * (torch.get_float32_matmul_precision() == "high"), "precision"),
            (lambda x: x * decimal.getcontext().prec, "getcontext"),
            (lambda x: x * len(np.geterr()), "geterr"),
            (lambda x: x * len(warnings.filters), "filters"),
            (lambda x: x * len(threading.current_thread().name), "current_thread"),
            (lambda x: x * local.k, "_local"),
            (lambda x: x * len(sys.argv), "argv"),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_what_lies_outside(self, f: Callable[..., Any], says: str) -> None:
        assert says in reason(f)

    @pytest.mark.parametrize("source", ["np", "m.np", "numpy", "m.n"])
    def test_under_another_name(self, source: str) -> None:
        held = types.SimpleNamespace(n=np)
        space: dict[str, Any] = {"np": np, "m": held, "numpy": np}
        held.np = np
        exec(f"def f(x):\n    n = {source}\n    return x * n.random.rand()", space)
        assert "numpy.random" in reason(space["f"])

    def test_operators_of_ones_own(self) -> None:
        @torch.library.custom_op("torchjac_tests::scaled", mutates_args=())
        def scaled(x: Tensor) -> Tensor:
            return x * detours.k

        assert "torchjac_tests" in reason(lambda x: torch.ops.torchjac_tests.scaled(x))
        packet = torch.ops.torchjac_tests.scaled
        assert "torchjac_tests" in reason(lambda x: packet(x))
        assert "torchjac_tests" in reason(lambda x: packet.default(x))
        ops = torch.ops
        assert "torchjac_tests" in reason(lambda x: ops.torchjac_tests.scaled(x))
        assert isinstance(build_guard(call(lambda x: scaled(x))), Unguardable)

    def test_modules_that_compute_their_attributes(self) -> None:
        lazy = detours.module("lazy_of_mine", "def __getattr__(name): return 2.0")
        assert "computes" in reason(lambda x: x * lazy.k)

        class Lazy(types.ModuleType):
            k = property(lambda self: 2.0)

        other = Lazy("other_of_mine")
        assert "computes" in reason(lambda x: x * other.k)

    def test_attributes_of_tensors(self) -> None:
        weight, x = torch.ones(3), torch.ones(3)
        weight.tag = x.tag = 2.0  # type: ignore[attr-defined]
        assert "no part of a tensor" in reason(lambda x: x * weight.tag)  # type: ignore[attr-defined]
        assert "args[0]" in reason(lambda x: x * x.tag, x)

    def test_relative_import_without_a_package(self) -> None:
        space: dict[str, Any] = {}
        exec("def f(x):\n    from .a import k\n    return x * k", space)
        assert "relative" in reason(space["f"])


class Rolls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class TestModes:
    @pytest.mark.parametrize(
        "mode",
        [Rolls, Dispatches, torch.autograd.graph.save_on_cpu],
        ids=["function", "dispatch", "saved"],
    )
    def test_a_mode_is_not_trusted(self, mode: Callable[[], Any]) -> None:
        before = guarded(call(torch.sin))
        with mode():
            assert "mode" in reason(torch.sin)
            assert before.mismatch(call(torch.sin)) is not None
        assert before.mismatch(call(torch.sin)) is None

    def test_a_default_device_is_a_setting(self) -> None:
        with torch.device("cpu"):
            guard = guarded(call(torch.sin))
        assert guard.mismatch(call(torch.sin)) is not None

    @pytest.mark.parametrize(
        "change",
        [
            lambda: torch.backends.mkldnn.flags(enabled=False),
            lambda: torch.backends.cudnn.flags(enabled=False),
            lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ],
        ids=["mkldnn", "cudnn", "attention"],
    )
    @pytest.mark.filterwarnings("ignore:TF32")  # what torch says of its own switch
    def test_kernels(self, change: Callable[[], Any]) -> None:
        guard = guarded(call(torch.sin))
        with change():
            mismatch = guard.mismatch(call(torch.sin))
        assert mismatch is not None
        assert "kernels" in mismatch.reason


class TestWhatIsOfTheStandardLibrary:
    def test_by_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert is_trusted("wave")
        assert is_trusted("collections.abc")
        for file in ("/home/me/wave.py", os.path.dirname(torch.__file__) + "/../wave.py"):
            mine = types.ModuleType("wave")
            mine.__file__ = file
            monkeypatch.setitem(sys.modules, "wave", mine)
            assert not is_trusted("wave")

    def test_which_modules_are_trusted(self) -> None:
        assert is_trusted("torch.nn")
        assert is_trusted("builtins")
        assert not is_trusted(__name__)
        assert not is_trusted(None)
