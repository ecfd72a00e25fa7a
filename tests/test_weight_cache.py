"""What is made from a weight is made once, and again after every kind of change."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitfast.ops import weight_cache


class Doubler:
    """Twice the weight, counting the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * 2

    def of(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return weight_cache.derived(weight, "double", self)


@pytest.fixture
def double() -> Iterator[Doubler]:
    weight_cache.clear()
    yield Doubler()
    weight_cache.limit_bytes(None)
    weight_cache.clear()


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 32)


def test_made_once(double: Doubler, linear: nn.Linear) -> None:
    first = double.of(linear.weight)
    assert torch.equal(first, linear.weight * 2)
    assert double.of(linear.weight) is first
    assert double.of(linear.weight.detach()) is first  # as an op gets it
    assert double.calls == 1
    assert weight_cache.size_bytes() == 32 * 64 * 4


def test_kinds_and_views_are_apart(double: Doubler, linear: nn.Linear) -> None:
    weight, other = linear.weight.detach(), lambda w: w * 3
    with torch.no_grad():
        assert torch.equal(weight_cache.derived(weight, "triple", other), weight * 3)
    for view in (weight, weight.t(), weight[:16], weight[16:], weight.view(64, 32), weight.view(torch.int32)):
        assert torch.equal(double.of(view), view * 2)
        assert torch.equal(double.of(view), view * 2)
    assert double.calls == 6


def step(linear: nn.Linear) -> None:
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
    linear(torch.ones(2, 64)).sum().backward()
    optimizer.step()


def in_inference_mode(linear: nn.Linear) -> None:
    with torch.inference_mode():
        linear.weight.add_(1)


def swap_data(linear: nn.Linear) -> None:
    linear.weight.data = torch.randn(32, 64)


def resize(linear: nn.Linear) -> None:
    storage = linear.weight.untyped_storage()
    storage.resize_(0)
    blocker = torch.randn(32, 64)
    storage.resize_(32 * 64 * 4)
    linear.weight.detach().copy_(blocker)


CHANGES: list[Callable[[nn.Linear], object]] = [
    step,
    in_inference_mode,
    swap_data,
    resize,
    lambda m: nn.init.zeros_(m.weight),
    lambda m: m.weight.detach().view(-1)[5].fill_(7.0),
    lambda m: m.load_state_dict(nn.Linear(64, 32).state_dict()),
    lambda m: m.load_state_dict(nn.Linear(64, 32).state_dict(), assign=True),
    lambda m: m.double(),
    lambda m: m.to(torch.bfloat16),
    lambda m: m.weight.data.mul_(0.9).add_(0.1),
    lambda m: m.weight.detach().numpy().__imul__(3),
]


@pytest.mark.parametrize("change", CHANGES)
def test_notices(double: Doubler, linear: nn.Linear, change: Callable[[nn.Linear], object]) -> None:
    before = double.of(linear.weight).clone()
    change(linear)
    after = double.of(linear.weight)
    assert torch.equal(after, linear.weight * 2)
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert double.of(linear.weight) is after


def test_an_address_used_again_is_another_weight(double: Doubler) -> None:
    """Freed memory comes back at the same address with the same version: only the storage tells the weights apart."""
    for i in range(20):
        weight = torch.full((1000,), float(i % 2))
        weight.view(-1)[:: 1000 // 7] = 5.0  # much alike
        assert torch.equal(double.of(weight), weight * 2)
        del weight
    assert double.calls == 20


def test_values_die_with_the_weight(double: Doubler) -> None:
    linear = nn.Linear(64, 32)
    parameter, value = weakref.ref(linear.weight), weakref.ref(double.of(linear.weight))
    del linear
    gc.collect()
    assert parameter() is None
    assert value() is None
    assert weight_cache.size_bytes() == 0
    linear = nn.Linear(64, 32)
    value = weakref.ref(double.of(linear.weight))
    linear.to(torch.bfloat16)
    assert value() is None  # and with the old storage


def test_views_of_the_weight_are_not_kept(double: Doubler) -> None:
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        weight_cache.derived(linear.weight, "cast", lambda w: w.float())
    assert weight_cache.size_bytes() == 0
    parameter = weakref.ref(linear.weight.untyped_storage())
    del linear
    gc.collect()
    assert parameter() is None


def test_not_saved_nor_copied(double: Doubler, linear: nn.Linear) -> None:
    def saved() -> tuple[bytes, list[str]]:
        buffer = io.BytesIO()
        torch.save(linear, buffer)
        return buffer.getvalue(), list(linear.state_dict())

    before = saved()
    double.of(linear.weight)
    assert saved() == before
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        twin.weight.add_(1)
    assert torch.equal(double.of(twin.weight), twin.weight * 2)
    assert torch.equal(double.of(linear.weight), linear.weight * 2)
    assert double.calls == 2


def test_survives_conversion_by_swapping(double: Doubler, linear: nn.Linear) -> None:
    """torch refuses to swap a parameter that something refers to weakly."""
    double.of(linear.weight)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        linear.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(double.of(linear.weight), linear.weight * 2)


def test_gradients_pass(double: Doubler, linear: nn.Linear) -> None:
    double.of(linear.weight)
    weight_cache.derived(linear.weight, "double", double).sum().backward()
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, torch.full_like(linear.weight, 2.0))
    frozen = linear.weight.detach()
    assert weight_cache.derived(frozen, "double", double) is double.of(frozen)  # gradients on, but none of this


def test_inference_mode(double: Doubler, linear: nn.Linear) -> None:
    with torch.inference_mode():
        value = double.of(linear.weight)
        assert double.of(linear.weight) is value
        assert not value.is_inference()  # so that it can be used outside
        made_here = torch.randn(100)
        assert torch.equal(double.of(made_here), made_here * 2)
        made_here[0] = 7.0  # not counted, nor sampled
        assert torch.equal(double.of(made_here), made_here * 2)


def test_not_used_while_tracing(double: Doubler, linear: nn.Linear) -> None:
    real = double.of(linear.weight)
    with FakeTensorMode() as mode:
        assert type(double.of(mode.from_tensor(linear.weight))) is not Tensor
    assert double.of(linear.weight) is real
    rows = linear.weight.detach()
    assert torch.equal(torch.vmap(lambda w: weight_cache.derived(w, "double", double))(rows), rows * 2)

    @torch.compile(backend="eager", fullgraph=True)
    def traced(weight: Tensor) -> Tensor:
        return weight_cache.derived(weight, "double", lambda w: w * 2)

    for _ in range(2):
        assert torch.equal(traced(rows), rows * 2)
        rows.add_(1)
    assert weight_cache.size_bytes() == real.nbytes


def test_limit(double: Doubler) -> None:
    weights = [torch.randn(100) for _ in range(3)]
    weight_cache.limit_bytes(800)
    for weight in weights * 2:
        assert torch.equal(double.of(weight), weight * 2)
    assert (double.calls, weight_cache.size_bytes()) == (4, 800)  # the third does not fit
    weights[0].add_(1)
    double.of(weights[0])  # takes its own old place
    assert (double.calls, weight_cache.size_bytes()) == (5, 800)
    weight_cache.limit_bytes(500)
    assert weight_cache.size_bytes() == 400
    weight_cache.limit_bytes(0)
    assert weight_cache.size_bytes() == 0
    for _ in range(2):
        double.of(weights[0])
    assert (double.calls, weight_cache.size_bytes()) == (7, 0)
    with pytest.raises(ValueError, match="limit is -1"):
        weight_cache.limit_bytes(-1)


def test_size_counts_tuples(double: Doubler) -> None:
    weight = torch.randn(10, 20)
    weight_cache.derived(weight, "parts", lambda w: (w.to(torch.int8), (w.sum(1), None)))
    assert weight_cache.size_bytes() == 200 + 40


def test_a_value_from_a_value(double: Doubler) -> None:
    """``make`` may ask for another value of the same weight."""
    weight = torch.randn(100)

    def quadruple(w: Tensor) -> Tensor:
        return double.of(w) * 2

    for limit in (None, 0, None):
        weight_cache.limit_bytes(limit)
        assert torch.equal(weight_cache.derived(weight, "quadruple", quadruple), weight * 4)
    assert weight_cache.size_bytes() == 800


def test_threads_make_it_once(double: Doubler) -> None:
    weight, start, values = torch.randn(100), threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        for _ in range(50):
            values.append(double.of(weight))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert double.calls == 1
    assert len({id(value) for value in values}) == 1
