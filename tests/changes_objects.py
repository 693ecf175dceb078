"""Objects, classes and modules, and changes of what hangs on them."""

from __future__ import annotations

import dataclasses
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import changes
from changes import Case

D = torch.float64
k = 2.0


def set_global(name: str, value: object) -> None:
    globals()[name] = value


def fresh(case: Callable[[], Case]) -> Case:
    """The function and its change, with all global variables as they were."""
    changes.reset()
    set_global("k", 2.0)
    return case()


@dataclasses.dataclass
class Config:
    scale: float
    inner: dict[str, float]
    remark: str = "unread"


class Slotted:
    __slots__ = ("k",)

    def __init__(self, value: float):
        self.k = value

    def f(self, x: Tensor) -> Tensor:
        return x * x * self.k


class Wider(Slotted):
    config: object


class Net(nn.Module):
    factor = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3, dtype=D)
        self.norm = nn.Dropout(0.0)
        self.scale = 2.0
        self.seen: list[int] = []
        self.register_buffer("shift", torch.ones(3, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        out = self.lin(x).tanh() * self.scale * self.factor * self.shift
        return out * 2 if self.training else out


def bound_method() -> Case:
    class Model:
        def __init__(self) -> None:
            self.k = 2.0

        def f(self, x: Tensor) -> Tensor:
            return x.sin() * self.k

    model = Model()
    return model.f, lambda: setattr(model, "k", 3.0)


def callable_object() -> Case:
    class Model:
        scale = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x.sin() * self.scale

    return Model(), lambda: setattr(Model, "scale", 3.0)


def instance_shadows_class() -> Case:
    class Model:
        scale = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x.sin() * self.scale

    model = Model()
    return model, lambda: setattr(model, "scale", 3.0)


def method_replaced() -> Case:
    class Model:
        def f(self, x: Tensor) -> Tensor:
            return x.sin()

        def __call__(self, x: Tensor) -> Tensor:
            return self.f(x)

    return Model(), lambda: setattr(Model, "f", lambda self, x: x.cos())


def base_class_method() -> Case:
    class Base:
        def f(self, x: Tensor) -> Tensor:
            return x.sin() * k

    class Model(Base):
        def f(self, x: Tensor) -> Tensor:
            return super().f(x) * 2

    return Model().f, lambda: set_global("k", 3.0)


def a_property() -> Case:
    class Model:
        _k = 2.0

        @property
        def scale(self) -> float:
            return self._k * k

        def __call__(self, x: Tensor) -> Tensor:
            return x.sin() * self.scale

    return Model(), lambda: set_global("k", 3.0)


def attribute_by_computed_name() -> Case:
    class Model:
        def __init__(self) -> None:
            self.k0 = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x.sin() * getattr(self, f"k{0}")

    model = Model()
    return model, lambda: setattr(model, "k0", 3.0)


def object_of_a_class_called_inside() -> Case:
    class Model:
        def __init__(self) -> None:
            self.k = k

    return lambda x: x.sin() * Model().k, lambda: set_global("k", 3.0)


def slots() -> Case:
    model = Slotted(2.0)
    return model.f, lambda: setattr(model, "k", 3.0)


def a_dataclass() -> Case:
    config = Config(1.0, {"a": 2.0})
    return lambda x: x.sin() * config.inner["a"], lambda: config.inner.update(a=3.0)


def namespace() -> Case:
    config = types.SimpleNamespace(a=types.SimpleNamespace(b=2.0))
    return lambda x: x.sin() * config.a.b, lambda: setattr(config.a, "b", 3.0)


def custom_function() -> Case:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * k

    return lambda x: Scaled.apply(x), lambda: set_global("k", 3.0)


def parameter_in_place() -> Case:
    net = Net()

    def change() -> None:
        with torch.no_grad():
            net.lin.weight.mul_(2)

    return net, change


def parameter_step() -> Case:
    net = Net()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net, torch.optim.SGD(net.parameters(), lr=0.5).step


def parameter_replaced() -> Case:
    net = Net()
    return net, lambda: setattr(net.lin, "weight", nn.Parameter(torch.eye(3, dtype=D)))


def buffer_in_place() -> Case:
    net = Net()
    return net, lambda: net.shift.add_(1)


def buffer_replaced() -> Case:
    net = Net()
    return net, lambda: setattr(net, "shift", torch.zeros(3, dtype=D))


def module_attribute() -> Case:
    net = Net()
    return net, lambda: setattr(net, "scale", 4.0)


def module_training() -> Case:
    net = Net()
    return net, net.eval


def module_replaced() -> Case:
    net = Net()
    return net, lambda: setattr(net, "lin", nn.Identity())


def module_in_closure() -> Case:
    net = Net()
    return lambda x: net(x) + x, lambda: setattr(net, "scale", 4.0)


def forward_hook() -> Case:
    net = Net()
    return net, lambda: net.lin.register_forward_hook(lambda m, i, o: o * 3)


def what_a_hook_reads() -> Case:
    net = Net()
    net.lin.register_forward_hook(lambda m, i, o: o * k)
    return net, lambda: set_global("k", 3.0)


def submodule_added() -> Case:
    net = nn.Sequential(nn.Tanh())
    return net, lambda: net.append(nn.Tanh())


def method_of_an_instance() -> Case:
    net = Net()
    return net, lambda: setattr(net, "forward", lambda x: x.cos())


def loaded_state() -> Case:
    net, other = Net(), Net()
    return net, lambda: net.load_state_dict(other.state_dict())


def unread_attribute() -> Case:
    class Solver:
        def __init__(self) -> None:
            self.k, self.steps, self.history = 2.0, 0, [1.0]

        def residual(self, x: Tensor) -> Tensor:
            return x.sin() * self.k

    solver = Solver()

    def change() -> None:
        solver.steps += 1
        solver.history.append(3.0)
        solver.state = "new"  # type: ignore[attr-defined]

    return solver.residual, change


def unread_attribute_that_cannot_be_understood() -> Case:
    class Solver:
        def __init__(self) -> None:
            self.k, self.log, self.stream = 2.0, sys.stdout, iter([1])

        def save(self) -> None:
            with open("nowhere") as file:
                file.read()

        def __call__(self, x: Tensor) -> Tensor:
            return x.sin() * self.k

    solver = Solver()
    return solver, lambda: next(solver.stream)


def unread_attribute_of_a_module() -> Case:
    net = Net()
    return net, lambda: net.seen.append(1)


def unread_field() -> Case:
    config = types.SimpleNamespace(scale=2.0)
    wider = Wider(2.0)
    wider.config = config
    return lambda x: x.sin() * wider.k, lambda: setattr(config, "remark", "changed")


def equal_method() -> Case:
    model = Slotted(2.0)
    return model.f, lambda: model.f


def gradient_of_a_parameter() -> Case:
    net = Net()

    def change() -> None:
        for p in net.parameters():
            p.grad = torch.ones_like(p)

    return net, change


def hook_of_saving() -> Case:
    net = Net()
    return net, lambda: net.register_state_dict_pre_hook(lambda *_: None)


def lock_is_held() -> Case:
    lock = threading.Lock()

    def f(x: Tensor) -> Tensor:
        with lock:
            return x.sin()

    return f, lambda: None


MATTERS = [
    bound_method,
    callable_object,
    instance_shadows_class,
    method_replaced,
    base_class_method,
    a_property,
    attribute_by_computed_name,
    object_of_a_class_called_inside,
    slots,
    a_dataclass,
    namespace,
    custom_function,
    parameter_in_place,
    parameter_step,
    parameter_replaced,
    buffer_in_place,
    buffer_replaced,
    module_attribute,
    module_training,
    module_replaced,
    module_in_closure,
    forward_hook,
    what_a_hook_reads,
    submodule_added,
    method_of_an_instance,
    loaded_state,
]
IRRELEVANT = [
    unread_attribute,
    unread_attribute_that_cannot_be_understood,
    unread_attribute_of_a_module,
    unread_field,
    equal_method,
    gradient_of_a_parameter,
    hook_of_saving,
    lock_is_held,
]
