"""A torch that nobody tested: operators are gone, private parts are gone or do something else.

torchjac imports, gives the same Jacobians by slower ways, and says which. `hidden.py` runs where
torch lacks something from the start.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import hidden
import torchjac
from laws import oracle_jacobian, same, value
from torchjac._torch import private, pytree, state
from torchjac._torch.operators import MissingOperator, aten, known
from torchjac._torch.private import CORNERS, Corner

ROOT = Path(torchjac.__file__).parent
NAMED = sorted(
    {
        name
        for path in ROOT.rglob("*.py")
        for name in re.findall(r"\b(?:aten|prims)\.\w+\.\w+", path.read_text())
        if path.name != "operators.py"
    }
)
PARTS = 8


def told(*arguments: str) -> str:
    """What `hidden.py` prints."""
    done = subprocess.run(
        [sys.executable, hidden.__file__, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestOperators:
    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="hidden.py forks a process for each")
    @pytest.mark.parametrize("part", range(PARTS))
    def test_each_may_be_missing(self, part: int) -> None:
        """Each that torchjac names, one at a time."""
        assert told("operators", *NAMED[part::PARTS]) == ""

    def test_names_lead_to_operators(self) -> None:
        assert len(NAMED) > 400
        assert aten.sin.default is torch.ops.aten.sin.default
        assert aten.add.Tensor is torch.ops.aten.add.Tensor
        assert aten.sin(torch.zeros(1)).item() == 0
        assert set(aten.add.overloads()) == set(torch.ops.aten.add.overloads())

    def test_a_missing_one(self) -> None:
        for missing in (aten.no_such_operator.default, aten.sin.no_such_overload):
            assert isinstance(missing, MissingOperator)
            assert missing is not torch.ops.aten.sin.default
            with pytest.raises(NotImplementedError, match=r"has no aten\.\w+\.\w+"):
                missing(torch.zeros(1))
        assert aten.no_such_operator.overloads() == []
        assert aten.no_such_operator is aten.no_such_operator

    def test_tables_leave_it_out(self) -> None:
        gone, there = aten.no_such_operator.default, torch.ops.aten.sin.default
        assert known({gone, there}) == {there}
        assert known((gone, there)) == (there,)
        assert dict(known({gone: 1, there: 2})) == {there: 2}


class TestPrivateParts:
    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="hidden.py forks a process for each")
    def test_each_may_be_missing(self) -> None:
        paths = told("private").split()
        assert len(paths) > 50
        assert told("private", *paths) == ""

    def test_what_is_gone(self) -> None:
        gone = private.private("torch._no_such_part")
        assert gone is private.private("torch._no_such_part")
        assert repr(gone.inside) == "<gone: torch._no_such_part.inside>"
        with pytest.raises(NotImplementedError, match=r"has no torch\._no_such_part"):
            gone()
        assert not isinstance(torch.zeros(1), private.private_type("torch._NoSuchType"))
        assert private.private_function("torch._no_such", len) is len

    def test_what_is_there(self) -> None:
        assert private.private("torch._C._functorch") is torch._C._functorch
        assert private.private("torch.utils._pytree") is torch.utils._pytree


class TestCorners:
    """Parts whose contract does not hold."""

    @pytest.mark.parametrize("part", CORNERS, ids=lambda c: c.name.replace(" ", "-"))
    def test_holds(self, part: Corner) -> None:
        """In the versions that are tested every contract holds: a failure names the corner."""
        assert private.contract_failure(part.check) is None

    @pytest.mark.parametrize("part", CORNERS, ids=lambda c: c.name.replace(" ", "-"))
    def test_fails(
        self, part: Corner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """All results are right; one line of the log and the record say what runs instead."""
        monkeypatch.setattr(part, "known", None)
        monkeypatch.setattr(part, "check", lambda: False)
        with caplog.at_level(logging.WARNING, "torchjac"):
            part.holds()
            part.holds()
            hidden.check()
            hidden.check_inside()
        assert [r.getMessage() for r in caplog.records if part.instead in r.getMessage()] == [
            f"torch {torch.__version__}, Python {platform.python_version()}: {part.name} is not as "
            f"torchjac expects (its contract does not hold), so {part.instead}"
        ]
        x = value(3)
        J = torchjac.jacobian(lambda x: x.sin() * x.sum(), compile=True)
        same(J(x), oracle_jacobian(lambda x: x.sin() * x.sum())(x))
        record = J.explain(x)
        assert record.degraded == (str(part),)
        assert f"degraded {part}" in str(record)
        if "nothing is planned" in part.instead:
            assert record.engine == "plain"
            assert part.name in str(record.refusals)

    def test_each_is_documented(self) -> None:
        page = Path(__file__).parents[1] / "docs" / "versions.md"
        text = page.read_text(encoding="utf-8")
        assert not [c.name for c in CORNERS if f"| {c.name} | {c.instead} |" not in text]

    def test_an_error_is_a_failure(self, caplog: pytest.LogCaptureFixture) -> None:
        def check() -> bool:
            raise AttributeError("it has moved")

        part = Corner("a part", "another runs", check)
        CORNERS.remove(part)
        with caplog.at_level(logging.WARNING, "torchjac"):
            assert not part.holds()
        assert "a part is not as torchjac expects (AttributeError: it has moved)" in caplog.text

    def test_what_surrounds_the_caller_does_not_matter(self) -> None:
        """Contracts are checked where a user's modes and transforms are not."""

        def checked(x: torch.Tensor) -> torch.Tensor:
            assert not [c.name for c in CORNERS if private.contract_failure(c.check)]
            return x

        with torch.inference_mode(), torch.device("meta"):
            torch.vmap(checked)(torch.zeros(2, device="cpu"))
        for surrounding in (
            torch.autocast("cpu"),
            torch.no_grad(),
            torch.autograd.graph.save_on_cpu(),
            torch.autograd.graph.disable_saved_tensors_hooks("none here"),
        ):
            with surrounding:
                checked(torch.zeros(2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_settings_of_the_process_do_not_matter(self, dtype: torch.dtype) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(True)
        try:
            assert not [c.name for c in CORNERS if private.contract_failure(c.check)]
        finally:
            torch.set_default_dtype(before)
            torch.use_deterministic_algorithms(False)

    def test_precisions_that_differ(self) -> None:
        """torch raises where it is asked for one precision: that is a setting like others."""
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        x = value(3)
        J = torchjac.jacobian(lambda x: x.sin() * x.sum(), compile=True)
        J(x)
        matmul.fp32_precision = "bf16"
        try:
            assert not [c.name for c in CORNERS if private.contract_failure(c.check)]
            for _ in range(5):
                same(J(x), oracle_jacobian(lambda x: x.sin() * x.sum())(x))
            different = state.ambient()
        finally:
            matmul.fp32_precision = before
        assert state.ambient() != different

    def test_many_threads_at_once(self) -> None:
        """The first use of a process: no contract fails, and warnings are as they were."""
        text = (
            "import sys, threading, warnings, torch, torchjac\n"
            "from torchjac._torch.private import CORNERS\n"
            "sys.setswitchinterval(1e-5)\n"
            "before = list(warnings.filters)\n"
            "start = threading.Barrier(4)\n"
            "def work():\n"
            "    start.wait()\n"
            "    x = torch.ones(3, requires_grad=True)\n"
            "    torchjac.jac(x.sin() * x.sum(), x)\n"
            "    torchjac.jacobian(lambda x: x.sin() * x.sum(), compile=True)(torch.ones(3))\n"
            "threads = [threading.Thread(target=work) for _ in range(4)]\n"
            "[t.start() for t in threads], [t.join() for t in threads]\n"
            "assert not [c.name for c in CORNERS if c.known is False]\n"
            "assert sum(c.known is True for c in CORNERS) > 5\n"
            "assert ('ignore', None, Warning, None, 0) not in warnings.filters\n"
        )
        for _ in range(3):
            command = [sys.executable, "-X", "faulthandler", "-c", text]  # a crash shows its stack
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

    def test_where_no_thread_can_be_started(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Results are right; nothing is found out, so that it is asked again."""

        def fail(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        for part in CORNERS:
            monkeypatch.setattr(part, "known", None)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "torchjac"):
            patch.setattr(threading.Thread, "start", fail)
            hidden.check_inside()
            x = value(3)
            with torch.no_grad():  # so that a thread is needed
                same(torchjac.jacobian(torch.sin)(x), x.cos().diag())
        assert not [r for r in caplog.records if "contract" in r.getMessage()]
        assert not [part for part in CORNERS if part.known is False]
        assert all(part.holds() for part in CORNERS)

    def test_after_a_fork_during_a_check(self) -> None:
        """A lock that another thread held is not held in the child."""
        private._lock.acquire()
        try:
            if not os.fork():
                part = Corner("a part", "another runs", lambda: True)
                os._exit(0 if part.holds() else 1)
            assert os.wait()[1] == 0
        finally:
            private._lock.release()


class TestPytree:
    """What stands in for torch's pytree, against it."""

    TREES = (
        1,
        (1, [2, {"b": 3, "a": (4,)}], None),
        {},
        [(), []],
        {"k": {1: "x"}},
    )

    @pytest.mark.parametrize("tree", TREES, ids=str)
    def test_is_like_torchs(self, tree: object) -> None:
        own, torchs = hidden.importlib.import_module("torchjac._torch.containers"), pytree._torch
        leaves, spec = own.tree_flatten(tree)
        assert sorted(map(str, leaves)) == sorted(map(str, torchs.tree_leaves(tree)))
        assert own.tree_unflatten(leaves, spec) == tree
        assert own.tree_map(str, tree) == torchs.tree_map(str, tree)
        assert spec.num_leaves == torchs.tree_structure(tree).num_leaves
        assert spec.is_leaf() == torchs.tree_structure(tree).is_leaf()
        own_names = {own.keystr(path) for path, _ in own.tree_flatten_with_path(tree)[0]}
        names = {torchs.keystr(path) for path, _ in torchs.tree_flatten_with_path(tree)[0]}
        assert own_names == names

    def test_named_tuples(self) -> None:
        own = hidden.importlib.import_module("torchjac._torch.containers")
        result = torch.zeros(2, 2).max(0)
        leaves, spec = own.tree_flatten(result)
        assert len(leaves) == 1  # no Python class of a named tuple: as a leaf
        assert spec.is_leaf()
