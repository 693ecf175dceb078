"""The table of operators: every row has a fact, every fact a row, and torch agrees."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

import torchjac
from torchjac import ops
from torchjac._torch.operators import aten, known
from torchjac._torch.trace.op_traits import FILLED
from torchjac.ops import IN_PLACE, OPS, Fact, operators_with

ROOT = Path(torchjac.__file__).parent
# Facts that others imply.
IMPLIED = [
    (Fact.FILL, Fact.MOVE),
    (Fact.SIZED, Fact.PER_SAMPLE),
    (Fact.UNIFORM, Fact.SIZED),
    (Fact.BY_PLACE, Fact.PER_SAMPLE),
    (Fact.NORM, Fact.PER_SAMPLE),
    (Fact.LOOPED_PRODUCT, Fact.PRODUCT),
    (Fact.CHAIN_PRODUCT, Fact.LOOPED_PRODUCT),
]
# Views that start a chain of their own, or end one: see `Fact.VIEW`.
NOT_CHAINED = known(
    {
        aten._reshape_alias.default,
        aten.alias.default,
        aten.as_strided.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.diagonal.default,
        aten.movedim.int,
        aten.reshape.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.unfold.default,
    }
)
# Tables of operators that stay where they are: this has Python bindings beside its operator; the
# values of that are functions.
ELSEWHERE = {
    "compiler/program/peephole.py: _MULTIPLY",
    "linear/known_values.py: FACTOR_RULES",
}

# Facts of operators whose results hold one number.
FILLED_FACTS = (Fact.FILL, Fact.UNIFORM, Fact.SHAPE_ONLY, Fact.ZEROS, Fact.ONES)

X = torch.arange(1.0, 7.0).reshape(2, 3)
PLACES = torch.tensor([[1, 0, 1], [0, 0, 1]])
# Arguments by the names of parameters that have no default.
ARGUMENTS: dict[str, Any] = {
    "self": X,
    "tensors": [X, X + 6],
    "src": X + 6,
    "value": 2.0,
    "fill_value": 2.0,
    "s": 2.0,
    "size": [2, 3],
    "shape": [2, 3],
    "stride": [3, 1],
    "physical_layout": [0, 1],
    "dim": 0,
    "dim0": 0,
    "dim1": 1,
    "source": 0,
    "destination": 1,
    "dims": [1, 0],
    "shifts": [1, 2],
    "repeats": [2, 1],
    "split_size": 1,
    "split_sizes": [1, 1],
    "index": PLACES,
    "indices": [PLACES[0]],
}
# Arguments of operators that use these names in another way, or need more.
SPECIAL: dict[Any, dict[str, Any]] = known(
    {
        aten.index_select.default: {"index": PLACES[0]},
        aten.roll.default: {"dims": [0, 1]},
        aten.select.int: {"index": 0},
        aten.squeeze.dims: {"dim": [0]},
        aten.view.default: {"size": [3, 2]},
        aten._unsafe_view.default: {"size": [3, 2]},
        aten.select_scatter.default: {"index": 0, "src": X[0] + 6},
        aten.unfold.default: {"dimension": 1, "size": 2, "step": 1},
    }
)
# Numbers by the types of parameters, for elementwise operators.
NUMBERS = {"number": 0.5, "Scalar": 0.5, "bool": False}


def ran(operator: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that an operator is given here, and those that it gives."""
    needed = {a.name for a in operator._schema.arguments if not a.has_default_value()}
    args = {name: x for name, x in ARGUMENTS.items() if name in needed} | SPECIAL.get(operator, {})
    result = operator(**args)
    lists = [a if isinstance(a, list) else [a] for a in args.values()]
    tensors = [x for one in lists for x in one if isinstance(x, Tensor)]
    return tensors, list(result) if isinstance(result, (list, tuple)) else [result]


def having_any(*facts: Fact) -> list[Any]:
    """The operators that have one of these facts, in the order of their names."""
    return sorted({o for fact in facts for o in operators_with(fact)}, key=str)


def numbers(tensors: list[Tensor]) -> set[float]:
    """All numbers of floating-point tensors."""
    return {n for x in tensors if x.is_floating_point() for n in x.reshape(-1).tolist()}


class TestTable:
    def test_every_row_has_a_fact(self) -> None:
        assert not [str(o) for o, facts in OPS.items() if not facts]

    @pytest.mark.parametrize("fact", list(Fact), ids=lambda f: f.name)
    def test_every_fact_has_a_row_and_a_reader(self, fact: Fact) -> None:
        """A fact that no room asks for is no fact of this library."""
        assert operators_with(fact)
        assert f"        {fact.name}: " in (Fact.__doc__ or "")
        texts = [p.read_text() for p in ROOT.rglob("*.py") if p.name != "ops.py"]
        assert any(f"Fact.{fact.name}" in text for text in texts)

    def test_one_row_each(self) -> None:
        """A second row for an operator would hide the first."""
        for node in ast.walk(ast.parse(Path(ops.__file__).read_text())):
            if isinstance(node, ast.Dict):
                names = Counter(ast.unparse(k) for k in node.keys if k is not None)
                assert not [name for name, times in names.items() if times > 1]

    @pytest.mark.parametrize(("fact", "other"), IMPLIED, ids=str)
    def test_implied(self, fact: Fact, other: Fact) -> None:
        assert operators_with(fact) <= operators_with(other)
        assert operators_with(fact | other) == operators_with(fact)

    def test_no_facts_elsewhere(self) -> None:
        """Sets of operators stand in `ops`, but for those of the tracer and of rules."""
        sets = set()
        for path in ROOT.rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            if place == "ops.py" or place.startswith(("_torch/", "linear/rules/")):
                continue
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and _is_set(node.value):
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    sets.add(f"{place}: {ast.unparse(target)}")
        assert sets == ELSEWHERE


def _is_set(value: ast.expr | None) -> bool:
    """Whether an expression holds a set or tuple of operators."""
    return value is not None and any(
        isinstance(part, (ast.Set, ast.Tuple, ast.List))
        and any(ast.unparse(e).lstrip("*(").startswith(("aten.", "prims.")) for e in part.elts)
        for part in ast.walk(value)
        if not isinstance(value, ast.Dict)
    )


class TestAgainstTorch:
    def test_views(self) -> None:
        """Schemas say which results share memory. (`_unsafe_view` does, and does not say so.)"""
        views = {
            o
            for o in OPS
            if any(r.alias_info and not r.alias_info.is_write for r in o._schema.returns)
        }
        assert operators_with(Fact.VIEW) - views == known({aten._unsafe_view.default})
        assert views - operators_with(Fact.VIEW) == NOT_CHAINED

    @pytest.mark.parametrize("operator", having_any(Fact.VIEW), ids=str)
    def test_views_begin_where_their_argument_does(self, operator: Any) -> None:
        arguments, (result,) = ran(operator)
        assert result.data_ptr() == arguments[0].data_ptr()

    @pytest.mark.parametrize("operator", having_any(Fact.MOVE), ids=str)
    def test_moves(self, operator: Any) -> None:
        """All numbers of results are numbers of arguments, or the one that fills."""
        if operator in operators_with(Fact.UNINITIALIZED):
            return
        arguments, results = ran(operator)
        if operator in operators_with(Fact.FILL):
            assert numbers(results) <= {0.0, ARGUMENTS["fill_value"]}
        else:
            assert numbers(results) <= numbers(arguments) | {ARGUMENTS["value"]}

    @pytest.mark.parametrize(
        "operator",
        having_any(*FILLED_FACTS),
        ids=str,
    )
    def test_filled(self, operator: Any) -> None:
        """Every element is the same number: 0, 1, or the one that is given."""
        if operator in operators_with(Fact.UNINITIALIZED):
            return
        zeros, ones = operator in operators_with(Fact.ZEROS), operator in operators_with(Fact.ONES)
        assert (zeros, ones) == ("zeros" in str(operator), "ones" in str(operator))
        assert numbers(ran(operator)[1]) == {0.0 if zeros else 1.0 if ones else 2.0}

    def test_uninitialized(self) -> None:
        named = {o for o in OPS if o._schema.name.startswith(("aten::empty", "aten::new_empty"))}
        assert operators_with(Fact.UNINITIALIZED) == named

    def test_the_tracer_knows_the_same(self) -> None:
        """`op_traits.FILLED` lies below `ops`; it has whatever takes the shape of a tensor."""
        rows = operators_with(Fact.SHAPE_ONLY) | operators_with(Fact.UNINITIALIZED)
        assert {o for o in rows if o._schema.arguments[0].name == "self"} == FILLED

    def test_fresh(self) -> None:
        for operator in operators_with(Fact.FRESH):
            first, *rest = operator._schema.arguments
            assert first.name == "size"
            assert all(a.kwarg_only for a in rest)
            assert operator in operators_with(Fact.ZEROS) | operators_with(Fact.UNINITIALIZED)

    @pytest.mark.parametrize("operator", having_any(Fact.MOVE, Fact.BY_STRIDES), ids=str)
    def test_strides(self, operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same numbers with other strides give something else, or an error; nowhere else."""
        if operator in operators_with(Fact.FILL):
            return
        _, before = ran(operator)
        monkeypatch.setitem(ARGUMENTS, "self", X.t().contiguous().t())
        try:
            same = all(map(torch.equal, before, ran(operator)[1]))
        except RuntimeError:
            same = False
        assert same == (operator not in operators_with(Fact.BY_STRIDES))

    def test_pointwise(self) -> None:
        """A row is for what torch has no tag for; the tag is asked otherwise."""
        assert not [o for o in operators_with(Fact.POINTWISE) if torch.Tag.pointwise in o.tags]

    @pytest.mark.parametrize("operator", having_any(Fact.POINTWISE), ids=str)
    def test_pointwise_rows(self, operator: Any) -> None:
        """Elements in another order give results in that order."""
        order, tensors = torch.randperm(6), {}
        for place, a in enumerate(operator._schema.arguments):
            tensors[a.name] = torch.linspace(-4, 4, 6).roll(place)
        if operator is aten.fill.Tensor:
            tensors["value"] = torch.tensor(2.0)

        def result(of: Any) -> list[Tensor]:
            args = [
                of(tensors[a.name]) if str(a.type) == "Tensor" else NUMBERS[str(a.type)]
                for a in operator._schema.arguments
            ]
            results = operator(*args)
            return list(results) if isinstance(results, tuple) else [results]

        moved = result(lambda x: x[order] if x.ndim else x)
        for before, after in zip(result(lambda x: x), moved, strict=True):
            if before.numel():  # a buffer that is not used has no elements
                assert torch.equal(before[order], after)

    def test_products(self) -> None:
        """Torch counts these as products of matrices, but for two."""
        counted = {o for o in operators_with(Fact.PRODUCT) if o.overloadpacket in flop_registry}
        assert operators_with(Fact.PRODUCT) - counted == known(
            {aten.mv.default, aten.matmul.default}
        )
        plain = {o for o in operators_with(Fact.PRODUCT) if len(o._schema.arguments) == 2}
        assert operators_with(Fact.CHAIN_PRODUCT) == plain - known({aten.matmul.default})

    def test_several_results(self) -> None:
        for operator in operators_with(Fact.ALL_DIFFERENTIABLE):
            returns = operator._schema.returns
            assert len(returns) > 1 or str(returns[0].type) == "List[Tensor]"

    def test_arguments(self) -> None:
        """Facts about arguments are about arguments that are there."""
        named = {o: {a.name for a in o._schema.arguments} for o in OPS}
        sizes = {"size", "shape", "input_sizes"}
        without = {o for o in operators_with(Fact.SIZED) if not named[o] & sizes}
        assert without == known({aten.scalar_tensor.default})
        assert all({"dim", "index"} <= named[o] for o in operators_with(Fact.BY_PLACE))
        assert {o for o in OPS if "normalized_shape" in named[o]} == operators_with(Fact.NORM)

    def test_in_place(self) -> None:
        """Its argument is written to; the other operator has its name and no memory to write to."""
        for operator, other in IN_PLACE.items():
            assert operator._schema.arguments[0].alias_info.is_write
            assert operator._schema.name == f"{other._schema.name}_"
            assert operator._schema.overload_name == other._schema.overload_name
            assert not any(a.alias_info for a in other._schema.arguments)
