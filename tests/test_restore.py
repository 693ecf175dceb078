"""What a function assigns while it is traced is put back."""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchjac.call import Call
from torchjac.guards.rollback import restoring

count = 0
registry: dict[str, Any] = {"a": 1}


def closure() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    last = None

    def f(x: Any) -> Any:
        nonlocal last
        last = x
        return x

    return f, lambda: last


def global_variable() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    def f(x: Any) -> Any:
        global count, created_inside
        count += 1
        created_inside = x
        return x

    return f, lambda: (count, "created_inside" in globals())


def global_dict() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    def f(x: Any) -> Any:
        registry["b"] = x
        del registry["a"]
        return x

    return f, lambda: list(registry.items())


def attribute() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    class Model:
        instances = 0

        def __init__(self) -> None:
            self.calls, self.gone, self.parts = 0, 1, [1, {"a": [2]}]

        def __call__(self, x: Any) -> Any:
            self.calls += 1
            self.last = x
            self.parts[1]["a"].append(x)
            del self.gone
            type(self).instances += 1
            return x

    model = Model()
    return model, lambda: (sorted(vars(model)), model.calls, repr(model.parts), Model.instances)


def function_attribute() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    def f(x: Any) -> Any:
        f.calls = x  # type: ignore[attr-defined]
        return x

    return f, lambda: dict(vars(f))


def deque_of_a_bound_method() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    class Model:
        def __init__(self) -> None:
            self.seen = collections.deque([1], maxlen=2)

        def f(self, x: Any) -> Any:
            self.seen.append(x)
            self.seen.append(x)
            return x

    model = Model()
    return model.f, lambda: list(model.seen)


def buffer_of_a_submodule() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            self.total = self.total + 1
            self.extra = nn.Linear(1, 1)
            return x

    net = nn.Sequential(Inner())
    total = net[0].total
    return net, lambda: (net[0].total is total, [n for n, _ in net.named_modules()])


def next_to_what_is_not_understood() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    class Model:
        def __init__(self) -> None:
            self.stream, self.last = sys.stdout, None

        def __call__(self, x: Any) -> Any:
            self.stream.flush()
            self.last = x
            return x

    model = Model()
    return model, lambda: model.last


class Slotted:
    __slots__ = ("__own", "created", "gone", "last")

    def __init__(self) -> None:
        self.last, self.gone, self.__own = None, 1, 2

    def __setattr__(self, name: str, value: object) -> None:
        assert not hasattr(self, "created"), "not to be called while things are put back"
        object.__setattr__(self, name, value)

    def __call__(self, x: Any) -> Any:
        self.last, self.__own = x, x
        del self.gone
        self.created = x
        return x

    def state(self) -> Any:
        return self.last, self.__own, hasattr(self, "gone"), hasattr(self, "created")


def slots() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    model = Slotted()
    return model, model.state


def attributes_of_containers() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    class Items(list):  # type: ignore[type-arg]
        last = None

        def extend(self, values: Any) -> None:
            raise AssertionError("not to be called while things are put back")

    class Table(dict):  # type: ignore[type-arg]
        last = None

    items, table = Items([1]), Table(a=1)

    def f(x: Any) -> Any:
        items.last = table.last = x
        items.append(x)
        table["b"] = x
        return x

    return f, lambda: (list(items), items.last, dict(table), table.last)


def ordered() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    held = collections.OrderedDict(a=1, b=2)

    def f(x: Any) -> Any:
        held.move_to_end("a")
        held["c"] = x
        return x

    return f, lambda: list(held.items())


def a_set() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    held = {1}

    def f(x: Any) -> Any:
        held.add(x)
        return x

    return f, lambda: set(held)


def variable_of_a_module() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    module = types.ModuleType("state_of_mine")
    module.last = module.unread = None  # type: ignore[attr-defined]

    def f(x: Any) -> Any:
        module.last = module.created = x  # type: ignore[attr-defined]
        return x

    return f, lambda: (module.last, module.unread, hasattr(module, "created"))


@pytest.mark.parametrize(
    "case",
    [
        a_set,
        attribute,
        attributes_of_containers,
        next_to_what_is_not_understood,
        buffer_of_a_submodule,
        closure,
        deque_of_a_bound_method,
        function_attribute,
        global_dict,
        global_variable,
        ordered,
        slots,
        variable_of_a_module,
    ],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_is_as_it_was(case: Callable[[], Any], fails: bool) -> None:
    f, state = case()
    before = state()
    x = torch.ones(3)

    def run() -> None:
        with restoring(Call(f, 0, False, (x,), {}))():
            f(x)
            assert state() != before, "the case does assign"
            if fails:
                raise ValueError("mine")

    if fails:
        with pytest.raises(ValueError, match="mine"):
            run()
    else:
        run()
    assert state() == before


def test_containers_stay_the_same_objects() -> None:
    items = [1]

    def f(x: Any) -> Any:
        items.append(x)
        return x

    cell = f.__closure__[0]
    with restoring(Call(f, 0, False, (1,), {}))():
        f(2)
    assert cell.cell_contents is items
    assert items == [1]


def test_arguments_are_restored() -> None:
    batch = {"x": torch.ones(1), "log": []}

    def f(b: dict[str, Any]) -> Any:
        b["log"].append(1)
        b["y"] = b["x"]
        return b["x"]

    with restoring(Call(f, 0, False, (batch,), {}))():
        f(batch)
    assert list(batch) == ["x", "log"]
    assert batch["log"] == []


def test_what_is_refused_is_walked_too() -> None:
    items: list[Any] = []

    def f(x: Any) -> Any:
        globals()["registry"]
        items.append(x)
        return x

    with restoring(Call(f, 0, False, (1,), {}))():
        f(2)
    assert items == []


def test_a_module_that_was_imported_stays() -> None:
    module = types.ModuleType("package_of_mine")

    def f(x: Any) -> Any:
        module.part = types.ModuleType("package_of_mine.part")  # type: ignore[attr-defined]
        return x

    with restoring(Call(f, 0, False, (1,), {}))():
        f(2)
    assert module.part is not None
