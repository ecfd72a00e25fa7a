"""ops.int8_linear on every backend, and the weight's integers that it keeps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from op_checks import Case, check_compiles, check_parity, check_repeatable, skip_unless_available, without_gradients
from torch import Tensor

from vitfast import ops
from vitfast.ops import weight_cache
from vitfast.ops.arguments import ACTIVATIONS
from vitfast.ops.int8_linear import int8_linear_ref
from vitfast.ops.quantize import quantize_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = ["torch", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(shape: tuple[int, ...], outputs: int, *, permuted: bool = False, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(outputs)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = randn(outputs, shape[-1]) / max(shape[-1], 1) ** 0.5
    with_residual = options.pop("residual", False)
    return Case(
        op=without_gradients(partial(ops.int8_linear, **options)),
        ref=without_gradients(partial(int8_linear_ref, **options)),
        tensors={
            "x": randn(*shape).transpose(0, 1).contiguous().transpose(0, 1) if permuted else randn(*shape),
            "weight": weight.t().contiguous().t() if permuted else weight,
            "bias": randn(outputs),
            "residual": randn(*shape[:-1], outputs) if with_residual else None,
            "scale": randn(outputs) if with_residual else None,
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "made",
    [
        case((2, 17, 48), 70),
        case((5, 33), 24, residual=True),
        case((3, 7, 40), 64, permuted=True, residual=True),
        case((0, 4, 16), 32),
        *(case((2, 9, 20), 40, activation=activation) for activation in ACTIVATIONS),
    ],
)
def test_parity(made: Case, backend: str, dtype: torch.dtype) -> None:
    check_parity(made, "int8_linear", backend, dtype)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    norm = {"norm_weight": torch.randn(64) + 1, "norm_bias": torch.randn(64)}
    made = {"x": torch.randn(3, 50, 64) * 2 + 1, "weight": torch.randn(96, 64) / 8, "bias": torch.randn(96), **norm}
    return {name: t.to(dtype) for name, t in made.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm(backend: str, dtype: torch.dtype) -> None:
    """LayerNorm's rounding decides which of two levels some numbers get, so only the whole error can be compared."""
    skip_unless_available("int8_linear", backend, dtype)
    given = tensors(dtype)
    wide = {name: t.double() for name, t in given.items()}
    exact = torch.nn.functional.layer_norm(wide["x"], (64,), wide["norm_weight"], wide["norm_bias"], 1e-6)
    exact = torch.nn.functional.linear(exact, wide["weight"], wide["bias"])

    def error(out: Tensor) -> float:
        return float((out.double() - exact).norm() / exact.norm())

    best = error(int8_linear_ref(**wide))
    assert error(ops.int8_linear(**given, dtype=torch.float32, backend=backend)) < 1.02 * best


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_repeats(backend: str) -> None:
    for made in (case((2, 9, 20), 40, activation="gelu"), case((2, 9, 20), 40, residual=True)):
        check_compiles(made, "int8_linear", backend)
        check_repeatable(made, "int8_linear", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    skip_unless_available("int8_linear", backend)
    given = tensors()
    x, weight, bias = given["x"], given["weight"], given["bias"]
    norm, residual, scale = (given["norm_weight"], given["norm_bias"]), torch.randn(3, 50, 96), torch.randn(96)
    for args in (
        (x, *norm, 1e-6, weight, bias, "swiglu", None, None, torch.bfloat16, backend),
        (x, None, None, 1e-6, weight, None, "none", residual, scale, torch.float32, backend),
    ):
        torch.library.opcheck(torch.ops.vitfast.int8_linear.default, args)


def test_levels_are_the_nearest() -> None:
    x = torch.randn(20, 30, dtype=torch.float64)
    integers, scale = quantize_rows(x)
    assert integers.abs().amax(-1).eq(127).all()
    assert integers.eq(integers.round()).all()
    assert float(((x - integers * scale).abs() / scale).max()) < 0.5 + 1e-5
    x[3, 4], x[5, 6], x[7] = float("nan"), float("inf"), 0.0
    integers, scale = quantize_rows(x)
    assert scale[[3, 5]].isnan().all()
    assert integers[7].eq(0).all()
    assert integers.isfinite().all()
    assert quantize_rows(torch.zeros(2, 0))[0].shape == (2, 0)


def test_the_weight_is_quantised_once_and_again_when_it_changes() -> None:
    skip_unless_available("int8_linear", "cpu")
    given = tensors()
    weight = given["weight"] = torch.nn.Parameter(given["weight"])
    weight_cache.clear()

    def run() -> Tensor:
        return ops.int8_linear(**given, backend="cpu")

    with torch.no_grad():
        first = run()
        size = weight_cache.size_bytes()
        assert size == 96 * 64 + 4 * (96 + 96)  # a byte for each number, a sum and a scale for each output
        assert torch.equal(run(), first)
        assert weight_cache.size_bytes() == size
        weight.mul_(2)
        given["bias"].zero_()
        doubled = run()
        weight.mul_(0.5)
        assert torch.equal(doubled, 2 * run())
        assert weight_cache.size_bytes() == size
    del weight
    given.clear()
    assert weight_cache.size_bytes() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(96, 63)}, "weight has shape"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"norm_bias": None}, "norm_weight and norm_bias go together"),
        ({"norm_weight": torch.zeros(3)}, "norm_weight has shape"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"activation": "swiglu", "weight": torch.zeros(95, 64), "bias": None}, "95 rows"),
        ({"scale": torch.ones(96)}, "scale goes with a residual"),
        ({"residual": torch.zeros(3, 50, 95)}, "residual has shape"),
        ({"residual": torch.zeros(3, 50, 96), "activation": "gelu"}, "residual goes with activation 'none'"),
        ({"residual": torch.zeros(3, 50, 96), "dtype": torch.bfloat16}, "residual goes with .* its own dtype"),
        ({"backend": "cuda2"}, "backend is 'cuda2'"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.int8_linear(**tensors() | change)


def test_no_gradient() -> None:
    given = tensors()
    with pytest.raises(RuntimeError, match="int8_linear has no gradient"):
        ops.int8_linear(**given | {"weight": given["weight"].requires_grad_()})
    with torch.no_grad():
        assert not ops.int8_linear(**given).requires_grad
