"""Functions that read by detours, and changes of what they reach by them."""

from __future__ import annotations

import abc
import builtins
import dataclasses
import enum
import functools
import importlib
import inspect
import logging
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from changes import Case

D = torch.float64

# Globals of the functions below.
k = 2.0
NAME = "held"


def set_global(name: str, value: object) -> None:
    globals()[name] = value


def module(name: str, source: str = "", **variables: object) -> Any:
    """A module of a user's, as if it had been imported."""
    imported = types.ModuleType(name)
    vars(imported).update(variables)
    exec(source, vars(imported))
    sys.modules[name] = imported
    return imported


settings = module("settings_of_mine", k=2.0)
log = logging.getLogger("torchjac.changes_detours")


@torch.enable_grad()
def decorated(x: Tensor) -> Tensor:
    return x.sin() * k


@functools.lru_cache
def remembers(scale: float) -> float:
    return scale * settings.k


@functools.singledispatch
def dispatched(value: object) -> float:
    return 2.0


class Abstract(abc.ABC):  # noqa: B024
    pass


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Held:
    held: float


class Matched:
    __match_args__ = ("held",)

    def __init__(self, held: float):
        self.held = held


class Leafy:
    def __init__(self) -> None:
        self.held = 2.0


pytree.register_pytree_node(Leafy, lambda v: ([v.held], None), lambda leaves, _: Leafy())


def decorated_of_a_module() -> Case:
    return lambda x: decorated(x), lambda: set_global("k", 3.0)


def class_pattern() -> Case:
    held = Matched(2.0)

    def f(x: Tensor) -> Tensor:
        match held:
            case Matched(found):
                return x.sin() * found
        return x

    return f, lambda: setattr(held, "held", 3.0)


def names_of_a_class_pattern() -> Case:
    class Two:
        __match_args__ = ("a",)

        def __init__(self) -> None:
            self.a, self.b = 2.0, 3.0

    held = Two()

    def f(x: Tensor) -> Tensor:
        match held:
            case Two(found):
                return x.sin() * found
        return x

    return f, lambda: setattr(Two, "__match_args__", ("b",))


def attrgetter() -> Case:
    held = Held(2.0)
    return lambda x: x.sin() * operator.attrgetter(NAME)(held), lambda: setattr(held, NAME, 3.0)


def attrgetter_of_a_namespace() -> Case:
    held = types.SimpleNamespace(held=2.0)
    return lambda x: x.sin() * operator.attrgetter(NAME)(held), lambda: setattr(held, NAME, 3.0)


def methodcaller() -> Case:
    class Caller:
        scale = 2.0

        def held(self) -> float:
            return self.scale

    held = Caller()
    return lambda x: x.sin() * operator.methodcaller(NAME)(held), lambda: setattr(
        Caller, "scale", 3
    )


def format_of_an_attribute() -> Case:
    held, template = types.SimpleNamespace(held=2.0), "{0.held}"
    return lambda x: x.sin() * float(template.format(held)), lambda: setattr(held, NAME, 3.0)


def computed_name_in_a_module() -> Case:
    return lambda x: x.sin() * getattr(settings, NAME[:0] + "k"), lambda: setattr(settings, "k", 3)


def relative_import() -> Case:
    source = "def f(x):\n    from .types import k\n    return x.sin() * k"
    module("pack_of_mine", __path__=[])
    inner = module("pack_of_mine.types", k=2.0)
    f = module("pack_of_mine.main", source, __package__="pack_of_mine").f
    return f, lambda: setattr(inner, "k", 3.0)


def relative_import_of_a_module() -> Case:
    source = "def f(x):\n    from . import types\n    return x.sin() * types.k"
    inner = module("box_of_mine.types", k=2.0)
    module("box_of_mine", __path__=[], types=inner)
    f = module("box_of_mine.main", source, __package__="box_of_mine").f
    return f, lambda: setattr(inner, "k", 3.0)


def module_of_a_package() -> Case:
    source = "import crate_of_mine.types\ndef f(x): return x.sin() * crate_of_mine.types.k"
    inner = module("crate_of_mine.types", k=2.0)
    module("crate_of_mine", __path__=[], types=inner)
    return module("user_of_crate", source).f, lambda: setattr(inner, "k", 3.0)


def module_under_the_name_of_a_standard_one() -> Case:
    imported = module(
        "colorsys", "def f(x): return x.sin() * k", k=2.0, __file__="/elsewhere/colorsys.py"
    )
    f = imported.f
    return lambda x: imported.f(x) + f(x), lambda: setattr(imported, "k", 3.0)


def code_that_says_it_is_of_torch() -> Case:
    space: dict[str, Any] = {"__name__": "torch.mine", "k": 2.0}
    exec("def f(x): return x.sin() * k", space)
    return space["f"], lambda: space.update(k=3.0)


def new_builtin() -> Case:
    builtins.size_of_mine = 2.0  # type: ignore[attr-defined]
    return (
        lambda x: x.sin() * size_of_mine,  # type: ignore[name-defined]  # noqa: F821
        lambda: setattr(builtins, "size_of_mine", 3.0),
    )


def replaced_builtin() -> Case:
    return lambda x: x.sin() * abs(-2.0), lambda: setattr(builtins, "abs", lambda v: 3.0)


def forgotten_result() -> Case:
    settings.k = 2.0
    remembers.cache_clear()
    remembers(1.0)
    settings.k = 3.0
    return lambda x: x.sin() * remembers(1.0), lambda: remembers.cache_clear()


def forgotten_result_of_an_unlimited_cache() -> Case:
    held = [2.0]

    @functools.cache
    def scale() -> float:
        return held[0]

    scale()
    held[0] = 3.0
    return lambda x: x.sin() * scale(), scale.cache_clear


def result_that_is_written_to() -> Case:
    @functools.lru_cache
    def grid(n: int) -> Tensor:
        return torch.ones(n, dtype=D)

    grid(3)
    return lambda x: x.sin() * grid(x.numel()), lambda: grid(3).mul_(2)


def result_of_a_cached_method() -> Case:
    class Model:
        def __init__(self) -> None:
            self.scales = [2.0]

        @functools.lru_cache  # noqa: B019
        def scale(self, n: int) -> list[float]:
            return [self.scales[0] * n]

        def __call__(self, x: Tensor) -> Tensor:
            return x.sin() * self.scale(1)[0]

    model = Model()
    model.scale(1)
    return model, lambda: model.scale(1).insert(0, 5.0)


def leaves_of_an_object() -> Case:
    held = Leafy()
    return lambda x: x.sin() * pytree.tree_leaves(held)[0], lambda: setattr(held, "held", 3.0)


def gradient_that_is_read() -> Case:
    weight = torch.ones(3, dtype=D, requires_grad=True)
    weight.grad = torch.ones(3, dtype=D)
    grad = weight.grad

    def f(x: Tensor) -> Tensor:
        return x.sin() * (1.0 if weight.grad is None else weight.grad)

    return f, lambda: grad.mul_(2)


def gradient_that_is_gone() -> Case:
    weight = nn.Parameter(torch.ones(3, dtype=D))
    return (
        lambda x: x.sin() * (2.0 if weight.grad is None else 3.0),
        lambda: setattr(weight, "grad", torch.ones(3, dtype=D)),
    )


def attribute_of_a_tensor() -> Case:
    weight = torch.ones(3, dtype=D)
    return (
        lambda x: x.sin() * weight * getattr(weight, "tag", 1.0),
        lambda: setattr(weight, "tag", 2.0),
    )


def attribute_of_a_member() -> Case:
    Level.HIGH.extra = 2.0  # type: ignore[attr-defined]
    return (
        lambda x: x.sin() * Level.HIGH.extra,  # type: ignore[attr-defined]
        lambda: setattr(Level.HIGH, "extra", 3.0),
    )


def member_of_an_integer_enumeration() -> Case:
    class Order(enum.IntEnum):
        TWO = 2
        FIVE = 5

    held = Held(Order.TWO)
    return lambda x: x.sin() * held.held, lambda: setattr(held, "held", Order.FIVE)


def what_a_method_of_a_member_reads() -> Case:
    class Kind(enum.Enum):
        ONE = 1

        def scale(self) -> float:
            return k * self.value

    kind = Kind.ONE
    return lambda x: x.sin() * kind.scale(), lambda: set_global("k", 3.0)


def registered_class() -> Case:
    class Kind(Abstract):
        pass

    class Other:
        pass

    other = Other()
    return (
        lambda x: x.sin() * (3.0 if isinstance(other, Abstract) else 2.0),
        lambda: Kind.register(Other),
    )


def level_of_a_logger() -> Case:
    log.setLevel(logging.WARNING)
    return (
        lambda x: x.sin() * (3.0 if log.isEnabledFor(logging.INFO) else 2.0),
        lambda: log.setLevel(logging.INFO),
    )


def precision() -> Case:
    return lambda x: x.sin() * k, lambda: (torch.set_float32_matmul_precision("high"), set_k())


def set_k() -> None:
    set_global("k", 3.0)


NOTICED: list[Callable[[], Case]] = [
    attrgetter,
    attrgetter_of_a_namespace,
    attribute_of_a_tensor,
    attribute_of_a_member,
    class_pattern,
    code_that_says_it_is_of_torch,
    computed_name_in_a_module,
    decorated_of_a_module,
    forgotten_result,
    forgotten_result_of_an_unlimited_cache,
    format_of_an_attribute,
    gradient_that_is_gone,
    gradient_that_is_read,
    leaves_of_an_object,
    level_of_a_logger,
    member_of_an_integer_enumeration,
    methodcaller,
    module_of_a_package,
    module_under_the_name_of_a_standard_one,
    names_of_a_class_pattern,
    new_builtin,
    precision,
    registered_class,
    relative_import,
    relative_import_of_a_module,
    replaced_builtin,
    result_of_a_cached_method,
    result_that_is_written_to,
    what_a_method_of_a_member_reads,
]

# What cannot be seen, with a word of the reason.
REFUSED: list[tuple[Callable[..., Any], str]] = [
    (lambda x: x * sys.modules["settings_of_mine"].k, "sys.modules"),
    (lambda x: x * sys.modules[__name__].k, "sys.modules"),
    (lambda x: x * importlib.import_module("settings_of_mine").k, "import_module"),
    (lambda x: x * __import__("settings_of_mine").k, "__import__"),
    (lambda x: x * globals()["k"], "globals"),
    (lambda x: x * decorated.__globals__["k"], "__globals__"),
    (lambda x: x * sys._getframe().f_globals["k"], "_getframe"),
    (lambda x: x * inspect.currentframe().f_globals["k"], "currentframe"),  # type: ignore[union-attr]
    (lambda x: x * dispatched(1), "key"),
    (lambda x, loaded=sys.modules: x * loaded["settings_of_mine"].k, "every module"),
]
