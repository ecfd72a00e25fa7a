"""The ops around the matrix products: linear, mlp, norm_linear, linear_residual, norm_mlp, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from op_checks import PRODUCT_BACKENDS, Case, check_compiles, check_gradients, check_parity, check_repeatable, randn
from torch import Tensor
from torch.nn import functional

from vitfast import ops
from vitfast.ops.linear_residual import linear_residual_ref
from vitfast.ops.mlp import mlp_ref
from vitfast.ops.norm_linear import norm_linear_ref
from vitfast.ops.norm_mlp import norm_mlp_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 5, 24), (1, 1, 8), (3, 17, 40), (0, 4, 16)]


def mlp_case(shape: tuple[int, ...], activation: str = "gelu", bias: bool = True, hidden: int | None = None) -> Case:
    D = shape[-1]
    F = 2 * D + 8 if hidden is None else hidden
    H = 2 * F if activation == "swiglu" else F
    return Case(
        op=partial(ops.mlp, activation=activation),
        ref=partial(mlp_ref, activation=activation),
        tensors={
            "x": randn(*shape),
            "fc1_weight": randn(H, D, seed=1, scale=D**-0.5),
            "fc1_bias": randn(H, seed=2) if bias else None,
            "fc2_weight": randn(D, F, seed=3, scale=F**-0.5),
            "fc2_bias": randn(D, seed=4) if bias else None,
        },
    )


def norm_mlp_case(
    shape: tuple[int, ...],
    recompute: str = "fused",
    extras: bool = True,
    activation: str = "gelu",
    hidden: int | None = None,
) -> Case:
    D = shape[-1]
    inner = mlp_case(shape, activation, extras, hidden).tensors
    factor = torch.tensor([0.0, 2.0, 1.25])[: shape[0]]
    return Case(
        op=partial(ops.norm_mlp, recompute=recompute, activation=activation),
        ref=partial(norm_mlp_ref, activation=activation),
        tensors={
            "x": inner.pop("x"),
            "norm_weight": randn(D, seed=5) + 1,
            "norm_bias": randn(D, seed=6),
            **inner,
            "scale": randn(D, seed=7) if extras else None,
            "drop_path": factor if extras else None,
        },
        constants=("drop_path",),
    )


def norm_linear_case(shape: tuple[int, ...], recompute: str = "fused", bias: bool = True) -> Case:
    D = shape[-1]
    return Case(
        op=partial(ops.norm_linear, recompute=recompute),
        ref=norm_linear_ref,
        tensors={
            "x": randn(*shape),
            "norm_weight": randn(D, seed=5) + 1,
            "norm_bias": randn(D, seed=6),
            "weight": randn(3 * D, D, seed=1, scale=D**-0.5),
            "bias": randn(3 * D, seed=2) if bias else None,
        },
    )


def linear_residual_case(shape: tuple[int, ...], extras: bool = True) -> Case:
    D = shape[-1]
    return Case(
        op=ops.linear_residual,
        ref=linear_residual_ref,
        tensors={
            "residual": randn(*shape, seed=8),
            "x": randn(*shape[:-1], D + 8),
            "weight": randn(D, D + 8, seed=1, scale=D**-0.5),
            "bias": randn(D, seed=2) if extras else None,
            "scale": randn(D, seed=7) if extras else None,
            "drop_path": torch.tensor([0.0, 2.0, 1.25])[: shape[0]] if extras else None,
        },
        constants=("drop_path",),
    )


def linear_case(shape: tuple[int, ...]) -> Case:
    tensors = linear_residual_case(shape).tensors
    return Case(
        op=ops.linear,
        ref=functional.linear,
        tensors={n: tensors[n] for n in ("x", "weight", "bias")},
    )


UNITS: dict[str, Callable[..., Case]] = {
    "linear": linear_case,
    "mlp": mlp_case,
    "norm_linear": norm_linear_case,
    "linear_residual": linear_residual_case,
    "norm_mlp": norm_mlp_case,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", UNITS)
@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_parity(backend: str, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_parity(UNITS[op](shape), op, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_activations(backend: str, activation: str, dtype: torch.dtype) -> None:
    check_parity(mlp_case((2, 5, 24), activation), "mlp", backend, dtype)
    check_parity(norm_mlp_case((2, 5, 24), activation=activation), "norm_mlp", backend, dtype)


@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_swiglu_at_other_shapes(backend: str) -> None:
    for shape in ((1, 1, 8), (3, 17, 40), (0, 4, 16)):
        check_parity(mlp_case(shape, "swiglu", bias=False), "mlp", backend, torch.float32)
        check_parity(norm_mlp_case(shape, "none", activation="swiglu"), "norm_mlp", backend, torch.float32)


@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_without_biases_and_scale(backend: str) -> None:
    check_parity(mlp_case((2, 5, 24), bias=False), "mlp", backend, torch.float32)
    check_parity(norm_linear_case((2, 5, 24), bias=False), "norm_linear", backend, torch.float32)
    check_parity(linear_residual_case((2, 5, 24), extras=False), "linear_residual", backend, torch.float32)
    check_parity(norm_mlp_case((2, 5, 24), extras=False), "norm_mlp", backend, torch.float32)


@pytest.mark.parametrize("op", UNITS)
@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_noncontiguous(backend: str, op: str) -> None:
    """Permuted activations and transposed weights."""
    case = UNITS[op]((3, 7, 24))
    for name, tensor in case.tensors.items():
        if tensor is not None and tensor.dim() > 1:
            case.tensors[name] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    check_parity(case, op, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton_fused"])
def test_inference_takes_the_fused_path(backend: str, dtype: torch.dtype) -> None:
    """Without gradients nothing is kept and the activation rides on the product: the result is as good."""
    cases = [("norm_mlp", norm_mlp_case((2, 17, 64), extras=False))]
    cases += [("mlp", mlp_case((2, 17, 64), activation)) for activation in ("gelu", "quick_gelu", "swiglu")]
    for op, case in cases:
        with torch.no_grad():
            check_parity(case, op, backend, dtype)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton", "triton_fused"])
@pytest.mark.parametrize("extras", [True, False])
def test_recompute_gives_the_same_bits(backend: str, extras: bool) -> None:
    from op_checks import _results, skip_unless_available

    ops_and_cases = [("norm_mlp", norm_mlp_case), ("norm_linear", norm_linear_case)]
    ops_and_cases.append(("norm_mlp", partial(norm_mlp_case, activation="swiglu")))
    for op, make in ops_and_cases:
        skip_unless_available(op, backend)
        dtype = torch.float32 if backend.startswith("triton") else torch.bfloat16
        runs = []
        for recompute in ("none", "fused", "mlp"):
            case = make((3, 17, 40), recompute, extras)
            runs.append(_results(partial(case.op, backend=backend), case.inputs(dtype, "cpu"), 0))
        for other in runs[1:]:
            assert other.keys() == runs[0].keys()
            for name, value in runs[0].items():
                assert torch.equal(value, other[name]), (op, name)


def test_what_is_kept_for_backward() -> None:
    """Elements kept beside the inputs: h for "fused", nothing of that size for "mlp", normed, h and act for "none"."""
    T, D, F = 51, 40, 88
    for recompute, activation, large in (
        ("none", "gelu", D + 2 * F),
        ("fused", "gelu", F),
        ("mlp", "gelu", 0),
        ("none", "swiglu", D + 3 * F),
        ("fused", "swiglu", 2 * F),
        ("mlp", "swiglu", 0),
    ):
        case = norm_mlp_case((3, 17, D), recompute, activation=activation)
        inputs = case.inputs(torch.float32, "cpu")
        known = {t.data_ptr() for t in inputs.values() if t is not None}
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, known=known, kept=kept: (kept.append(t.numel()) if t.data_ptr() not in known else None, t)[1],
            lambda t: t,
        ):
            case.op(**inputs, backend="torch")
        assert sum(kept) == T * large + 2 * T, recompute


@pytest.mark.parametrize("frozen", ["fc1_weight", "fc2_weight", "scale", "x", "norm_weight"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    case = norm_mlp_case((2, 5, 24))
    both = []
    for freeze in (False, True):
        inputs = case.inputs(torch.float32, "cpu")
        tensor = inputs[frozen]
        assert tensor is not None
        tensor.requires_grad_(not freeze)
        case.op(**inputs).sin().sum().backward()
        both.append({n: t.grad for n, t in inputs.items() if t is not None})
    assert both[1].pop(frozen) is None
    for name, grad in both[1].items():
        assert grad is None or torch.equal(grad, both[0][name]), name


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_under_autocast(backend: str) -> None:
    """fp32 residual stream and parameters, bf16 products: as far from fp64 as plain PyTorch under autocast."""

    def cast(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(**tensors: Tensor) -> Tensor:
            if next(t for t in tensors.values() if isinstance(t, Tensor)).dtype == torch.float64:
                return run(**tensors)
            with torch.autocast("cpu", torch.bfloat16):
                return run(**tensors)

        return inner

    for op, make in UNITS.items():
        case = make((3, 17, 40))
        wide = Case(cast(case.op), cast(case.ref), case.tensors, case.constants, wide=tuple(case.tensors))
        check_parity(wide, op, backend, torch.bfloat16)
    x = randn(2, 3, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.mlp(**mlp_case((2, 3, 8)).inputs(torch.float32, "cpu", grad=False)).dtype == torch.bfloat16
        assert ops.linear_residual(x, x, torch.eye(8)).dtype == torch.float32


@pytest.mark.parametrize("op", UNITS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_compiles(backend: str, op: str) -> None:
    check_compiles(UNITS[op]((2, 5, 24)), op, backend)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_swiglu_compiles(backend: str) -> None:
    check_compiles(norm_mlp_case((2, 5, 24), activation="swiglu"), "norm_mlp", backend)


@pytest.mark.parametrize("op", UNITS)
@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_repeatable(backend: str, op: str) -> None:
    check_repeatable(UNITS[op]((2, 9, 24)), op, backend)


@pytest.mark.parametrize("op", UNITS)
def test_gradcheck(op: str) -> None:
    check_gradients(UNITS[op]((2, 3, 4)))


@pytest.mark.parametrize("activation", ["quick_gelu", "swiglu"])
def test_gradcheck_of_activations(activation: str) -> None:
    check_gradients(mlp_case((2, 3, 4), activation))
    check_gradients(norm_mlp_case((2, 3, 4), activation=activation))


def test_opcheck() -> None:
    def tensors(case: Case) -> list[Tensor | None]:
        return list(case.inputs(torch.float32, "cpu").values())

    library = torch.ops.vitfast
    f32 = torch.float32
    torch.library.opcheck(library.linear.default, (*tensors(linear_case((2, 3, 8))), f32, "torch"))
    torch.library.opcheck(library.mlp.default, (*tensors(mlp_case((2, 3, 8))), "gelu", f32, "fused", "torch"))
    torch.library.opcheck(
        library.norm_linear.default, (*tensors(norm_linear_case((2, 3, 8))), 1e-6, f32, "fused", "torch")
    )
    torch.library.opcheck(library.linear_residual.default, (*tensors(linear_residual_case((2, 3, 8))), f32, "torch"))
    swiglu = mlp_case((2, 3, 8), "swiglu")
    torch.library.opcheck(library.mlp.default, (*tensors(swiglu), "swiglu", f32, "fused", "torch"))
    for policy, activation in (("none", "gelu"), ("fused", "quick_gelu"), ("mlp", "gelu"), ("none", "swiglu")):
        case = norm_mlp_case((2, 3, 8), activation=activation)
        torch.library.opcheck(library.norm_mlp.default, (*tensors(case), 1e-6, activation, f32, policy, "torch"))


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (
            "mlp",
            {"activation": "relu"},
            "activation is 'relu'; allowed are 'gelu', 'gelu_tanh', 'quick_gelu', 'swiglu'",
        ),
        ("mlp", {"activation": "swiglu", "fc1_weight": torch.ones(7, 8), "fc1_bias": None}, "fc1_weight has 7 rows"),
        ("norm_mlp", {"activation": "swiglu"}, r"fc2_weight has shape \(8, 24\); allowed: \(outputs, 12\)"),
        ("mlp", {"fc1_weight": torch.ones(4, 7)}, r"fc1_weight has shape \(4, 7\); allowed: \(outputs, 8\)"),
        ("mlp", {"fc2_bias": torch.ones(3)}, "fc2_bias has shape"),
        ("norm_mlp", {"recompute": "all"}, "recompute is 'all'"),
        ("norm_mlp", {"drop_path": torch.ones(5)}, "drop_path has shape"),
        ("norm_linear", {"norm_bias": torch.ones(5)}, "norm_bias has shape"),
        ("linear_residual", {"residual": torch.ones(2, 4, 8)}, "residual has shape"),
    ],
)
def test_bad_arguments(op: str, change: dict[str, object], message: str) -> None:
    case = UNITS[op]((2, 3, 8))
    with pytest.raises(ValueError, match=message):
        case.op(**(case.inputs(torch.float32, "cpu") | change))


def test_second_derivative_is_refused() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    tensors = mlp_case((2, 3, 8)).inputs(torch.float32, "cpu") | {"x": x}
    (grad,) = torch.autograd.grad(ops.mlp(**tensors).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_products_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose oneDNN has no bf16, or in a PyTorch without it."""
    from vitfast.ops import products

    monkeypatch.setattr(products, "_onednn_has", lambda dtype: False)
    for name, make in UNITS.items():
        for dtype in (torch.float32, torch.bfloat16):
            check_parity(make((2, 5, 24)), name, "torch", dtype)
