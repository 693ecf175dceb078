"""Functions, and changes of the numbers, containers, tensors and functions that they read."""

from __future__ import annotations

import collections
import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

D = torch.float64

Change = Callable[[], object]
Case = tuple[Callable[..., Any], Change]

# Globals of the functions below.
k = 2.0
unrelated = 1
table = {"a": 2.0, "b": [1.0, 3.0]}
tensor = torch.tensor([1.0, 2.0, 3.0], dtype=D)


def helper(x: Tensor) -> Tensor:
    return x.sin() * k


_helper = helper


def reset() -> None:
    """Global variables as they were before any change."""
    set_global("k", 2.0)
    set_global("unrelated", 1)
    set_global("helper", _helper)
    set_global("table", {"a": 2.0, "b": [1.0, 3.0]})
    set_global("tensor", torch.tensor([1.0, 2.0, 3.0], dtype=D))


def set_global(name: str, value: object) -> None:
    globals()[name] = value


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def closure_number() -> Case:
    c = 2

    def change() -> None:
        nonlocal c
        c = 3

    return lambda x: c * x.sin(), change


def closure_type() -> Case:
    c: Any = 3

    def change() -> None:
        nonlocal c
        c = 3.0

    return lambda x: x * (7 if isinstance(c, int) else 8), change


def closure_sign_of_zero() -> Case:
    c = 0.0

    def change() -> None:
        nonlocal c
        c = -0.0

    return lambda x: x * (7 if str(c) == "0.0" else 8), change


def closure_tensor_in_place() -> Case:
    c = torch.ones(3, dtype=D)
    return lambda x: c * x.sin(), lambda: c.add_(1)


def closure_tensor_through_view() -> Case:
    c = torch.ones(3, dtype=D)
    return lambda x: c * x.sin(), lambda: c[1:].mul_(5)


def closure_tensor_replaced() -> Case:
    c = torch.ones(3, dtype=D)

    def change() -> None:
        nonlocal c
        c = torch.full((3,), 2.0, dtype=D)

    return lambda x: c * x.sin(), change


def closure_tensor_data_replaced() -> Case:
    c = torch.ones(3, dtype=D)

    def change() -> None:
        c.data = torch.full((3,), 2.0, dtype=D)

    return lambda x: c * x.sin(), change


def closure_list() -> Case:
    c = [1.0, 2.0]
    return lambda x: x.sin() * sum(c), lambda: c.append(3.0)


def closure_nested_dict() -> Case:
    c = {"a": {"b": [1.0, {"c": 2.0}]}}

    def change() -> None:
        c["a"]["b"][1]["c"] = 5.0  # type: ignore[index]

    return lambda x: x.sin() * c["a"]["b"][1]["c"], change  # type: ignore[index]


def closure_array() -> Case:
    c = np.array([1.0, 2.0, 3.0])

    def change() -> None:
        c[1] = 7.0

    return lambda x: x.sin() * torch.from_numpy(c.copy()), change


def closure_numpy_scalar() -> Case:
    c = np.float64(2)

    def change() -> None:
        nonlocal c
        c = np.float64(3)

    return lambda x: x.sin() * float(c), change


def closure_set() -> Case:
    c = {1.0}
    return lambda x: x.sin() * len(c), lambda: c.add(2.0)


def closure_deque() -> Case:
    c = collections.deque([1.0], maxlen=3)
    return lambda x: x.sin() * c[-1], lambda: c.append(4.0)


def closure_defaultdict() -> Case:
    c: dict[str, float] = collections.defaultdict(float, a=2.0)
    return lambda x: x.sin() * c["a"], lambda: c.update(a=3.0)


def closure_namedtuple() -> Case:
    Point = collections.namedtuple("Point", "u v")
    c = Point(1.0, [2.0])
    return lambda x: x.sin() * c.v[0], lambda: c.v.append(1.0) or c.v.reverse()


def closure_key_of_another_type() -> Case:
    class Text(str):
        pass

    held = {"a": 2.0}

    def change() -> None:
        held.clear()
        held[Text("a")] = 2.0

    return lambda x: x.sin() * (2 if type(next(iter(held))) is str else 7), change


class Disguised:
    """Says of itself that it is a number, as proxies do."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __rmul__(self, other: Any) -> Any:
        return 7 * other


def closure_disguised() -> Case:
    held: list[Any] = [3]

    def change() -> None:
        held[0] = Disguised()

    return lambda x: x.sin() * held[0], change


def closure_enum() -> Case:
    c = Color.RED

    def change() -> None:
        nonlocal c
        c = Color.BLUE

    return lambda x: x.sin() * c.value, change


def closure_function() -> Case:
    def g(x: Tensor) -> Tensor:
        return x.sin()

    def change() -> None:
        nonlocal g
        g = torch.cos

    return lambda x: g(x), change


def code_replaced() -> Case:
    def g(x: Tensor) -> Tensor:
        return x.sin()

    def change() -> None:
        g.__code__ = (lambda x: x.cos()).__code__

    return g, change


def global_number() -> Case:
    return lambda x: x.sin() * k, lambda: set_global("k", 3.0)


def global_of_called() -> Case:
    return lambda x: helper(x), lambda: set_global("k", 3.0)


def global_in_comprehension() -> Case:
    return lambda x: sum(x.sin() * k for _ in range(2)), lambda: set_global("k", 3.0)


def global_function_replaced() -> Case:
    return lambda x: helper(x), lambda: set_global("helper", torch.cos)


def global_dict() -> Case:
    return lambda x: x.sin() * table["a"], lambda: table.update(a=5.0)


def global_tensor() -> Case:
    return lambda x: x.sin() * tensor, lambda: tensor.mul_(2)


def global_shadows_builtin() -> Case:
    def change() -> None:
        scope["abs"] = lambda x: 5 * x

    scope: dict[str, Any] = {"__name__": "user"}
    exec("def f(x): return abs(x).sin()", scope)
    return scope["f"], change


def user_module_attribute() -> Case:
    module = types.ModuleType("settings_of_a_user")
    module.k = 2.0  # type: ignore[attr-defined]
    return lambda x: x.sin() * module.k, lambda: setattr(module, "k", 3.0)


def default_argument() -> Case:
    def g(x: Tensor, c: float = 2.0) -> Tensor:
        return x.sin() * c

    return g, lambda: setattr(g, "__defaults__", (3.0,))


def default_argument_mutable() -> Case:
    def g(x: Tensor, c: list[float] = [2.0]) -> Tensor:  # noqa: B006
        return x.sin() * c[0]

    return g, lambda: g.__defaults__[0].insert(0, 4.0)


def keyword_default() -> Case:
    def g(x: Tensor, *, c: float = 2.0) -> Tensor:
        return x.sin() * c

    return g, lambda: g.__kwdefaults__.update(c=3.0)


def function_attribute() -> Case:
    def g(x: Tensor) -> Tensor:
        return x.sin() * g.k  # type: ignore[attr-defined]

    g.k = 2.0  # type: ignore[attr-defined]
    return g, lambda: setattr(g, "k", 3.0)


def partial_argument() -> Case:
    c = [2.0]
    return functools.partial(lambda x, c: x.sin() * c[0], c=c), lambda: c.insert(0, 3.0)


def decorated() -> Case:
    c = [2.0]

    @torch.enable_grad()
    @functools.wraps(helper)
    def g(x: Tensor) -> Tensor:
        return x.sin() * c[0]

    return g, lambda: c.insert(0, 3.0)


def cached_function() -> Case:
    @functools.lru_cache
    def g(scale: float) -> float:
        return scale * k

    def change() -> None:
        set_global("k", 3.0)
        g.cache_clear()

    return lambda x: x.sin() * g(1.0), change


def vmapped() -> Case:
    return torch.vmap(lambda x: x.sin() * k), lambda: set_global("k", 3.0)


def unrelated_global() -> Case:
    return lambda x: x.sin() * k, lambda: set_global("unrelated", 2)


def same_number() -> Case:
    return lambda x: x.sin() * k, lambda: set_global("k", float("2.0"))


MATTERS = [
    closure_number,
    closure_type,
    closure_sign_of_zero,
    closure_tensor_in_place,
    closure_tensor_through_view,
    closure_tensor_replaced,
    closure_tensor_data_replaced,
    closure_list,
    closure_nested_dict,
    closure_array,
    closure_numpy_scalar,
    closure_set,
    closure_deque,
    closure_defaultdict,
    closure_namedtuple,
    closure_key_of_another_type,
    closure_disguised,
    closure_enum,
    closure_function,
    code_replaced,
    global_number,
    global_of_called,
    global_in_comprehension,
    global_function_replaced,
    global_dict,
    global_tensor,
    global_shadows_builtin,
    user_module_attribute,
    default_argument,
    default_argument_mutable,
    keyword_default,
    function_attribute,
    partial_argument,
    decorated,
    cached_function,
    vmapped,
]
IRRELEVANT = [
    unrelated_global,
    same_number,
]
