"""Ops without gradients: a block's halves in one call, and the way past PyTorch's dispatcher."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate_checks import Calls
from op_checks import BACKENDS, Case, check_compiles, check_parity, check_repeatable, without_gradients
from test_units import norm_mlp_case
from torch import Tensor

from vitfast import ops
from vitfast.ops.norm_attention import norm_attention_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm_attention_case(shape: tuple[int, int, int], heads: int, extras: bool = True) -> Case:
    D = shape[-1]

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (
            torch.randn(size, generator=torch.Generator().manual_seed(len(size) + size[0]), dtype=torch.double) * scale
        )

    return Case(
        op=without_gradients(partial(ops.norm_attention, num_heads=heads)),
        ref=without_gradients(partial(norm_attention_ref, num_heads=heads)),
        tensors={
            "x": randn(*shape),
            "norm_weight": randn(D) + 1,
            "norm_bias": randn(D),
            "qkv_weight": randn(3 * D, D, scale=D**-0.5),
            "qkv_bias": randn(3 * D) if extras else None,
            "proj_weight": randn(D, D, scale=D**-0.5),
            "proj_bias": randn(D) if extras else None,
            "scale": randn(D) if extras else None,
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "heads"), [((2, 17, 48), 3), ((1, 5, 40), 1), ((0, 4, 16), 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_attention(backend: str, shape: tuple[int, int, int], heads: int, dtype: torch.dtype) -> None:
    check_parity(norm_attention_case(shape, heads), "norm_attention", backend, dtype)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_norm_attention_without_biases_and_scale(backend: str) -> None:
    check_parity(norm_attention_case((2, 17, 48), 3, extras=False), "norm_attention", backend, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_norm_attention_compiles_and_repeats(backend: str) -> None:
    check_compiles(norm_attention_case((2, 9, 48), 3), "norm_attention", backend)
    check_repeatable(norm_attention_case((2, 9, 48), 3), "norm_attention", backend)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_mlp(backend: str, dtype: torch.dtype, activation: str) -> None:
    case = norm_mlp_case((3, 17, 40), activation=activation)
    del case.tensors["drop_path"]  # as in a model at inference
    case.op, case.ref = without_gradients(case.op), without_gradients(case.ref)
    check_parity(case, "norm_mlp", backend, dtype)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 32), (2, 33, 64), (1, 197, 96), (3, 17, 40)])
def test_rows_between_products(shape: tuple[int, int, int], dtype: torch.dtype, activation: str) -> None:
    """Widths of whole tiles go from one op to the next product in the tiles' order; 40 is none, 5 rows fill none."""
    case = norm_mlp_case(shape, activation=activation, hidden=2 * shape[-1])
    del case.tensors["drop_path"]
    case.op, case.ref = without_gradients(case.op), without_gradients(case.ref)
    check_parity(case, "norm_mlp", "cpu", dtype)
    for heads in (1, 2, 8):  # heads of 48 lie across tiles, those of 12 are no whole vectors
        check_parity(norm_attention_case(shape, heads), "norm_attention", "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_width_of_several_turns(dtype: torch.dtype) -> None:
    """fp32's parts of 1024 numbers, or bf16's 3072, are more than stay in L2 at a time."""
    case = norm_mlp_case((1, 70, 32), hidden=3072)
    del case.tensors["drop_path"]
    case.op, case.ref = without_gradients(case.op), without_gradients(case.ref)
    check_parity(case, "norm_mlp", "cpu", dtype)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_under_autocast(backend: str) -> None:
    """An fp32 residual stream with bf16 products."""
    case = norm_attention_case((2, 17, 48), 3)

    def cast(run: Any) -> Any:
        def inner(**tensors: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=tensors["x"].dtype == torch.float32):
                return run(**tensors)

        return inner

    wide = Case(cast(case.op), cast(case.ref), case.tensors, wide=tuple(case.tensors))
    check_parity(wide, "norm_attention", backend, torch.bfloat16)


def test_a_wanted_gradient_is_refused() -> None:
    inputs = norm_attention_case((2, 5, 16), 2).inputs(torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="norm_attention has no gradient"):
        ops.norm_attention(**inputs, num_heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads is 5"),
        ({"x": torch.randn(5, 16)}, r"x has shape \(5, 16\); allowed: \(B, L, D\)"),
        ({"qkv_bias": torch.randn(3)}, r"qkv_bias has shape \(3,\)"),
        ({"proj_weight": torch.randn(8, 16)}, r"proj_weight has shape \(8, 16\)"),
        ({"scale": torch.randn(1)}, r"scale has shape \(1,\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = norm_attention_case((2, 5, 16), 2).inputs(torch.float32, "cpu", grad=False)
    with pytest.raises(ValueError, match=message):
        ops.norm_attention(**(inputs | {"num_heads": 2} | change))


def test_opcheck() -> None:
    tensors = list(norm_attention_case((2, 5, 16), 2).inputs(torch.float32, "cpu", grad=False).values())
    op = torch.ops.vitfast.norm_attention.default
    torch.library.opcheck(op, (*tensors, 2, 0.3, 1e-6, torch.float32, "torch"))
    mlp = list(norm_mlp_case((2, 3, 8)).inputs(torch.float32, "cpu", grad=False).values())
    op = torch.ops.vitfast.norm_mlp.default
    torch.library.opcheck(op, (*mlp, 1e-6, "gelu", torch.float32, "inference", "torch"))


def test_what_watches_the_dispatcher_still_sees_the_ops() -> None:
    x, one, zero = torch.randn(2, 8), torch.ones(8), torch.zeros(8)
    with torch.no_grad(), Calls() as calls:
        ops.layer_norm(x, one, zero)
    assert calls["layer_norm"] == 1
    with torch.no_grad(), torch.profiler.profile() as profile:
        ops.layer_norm(x, one, zero)
    assert any(event.key == "vitfast::layer_norm" for event in profile.key_averages())
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, one, zero)]
    with torch.no_grad():
        assert isinstance(ops.layer_norm(*fakes), torch._subclasses.FakeTensor)
