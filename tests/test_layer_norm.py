"""LayerNorm and add + LayerNorm on every backend."""

from __future__ import annotations

import pytest
import torch
from op_checks import BACKENDS, Case, check_compiles, check_gradients, check_parity, check_repeatable

from vitfast import ops
from vitfast.ops.layer_norm import add_layer_norm_ref, layer_norm_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Widths: below and above one vector, no multiple of 8 or 16, a ViT's. Rows: one, an odd number, a ViT's 197.
SHAPES = [(1, 1, 8), (2, 3, 50), (2, 17, 192), (1, 197, 72), (3, 5, 1280), (0, 4, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm_case(shape: tuple[int, ...], offset: float = 0.0) -> Case:
    g = torch.Generator().manual_seed(0)
    D = shape[-1]
    return Case(
        op=ops.layer_norm,
        ref=layer_norm_ref,
        tensors={
            "x": torch.randn(shape, generator=g, dtype=torch.double) + offset,
            "weight": torch.randn(D, generator=g, dtype=torch.double) + 1,
            "bias": torch.randn(D, generator=g, dtype=torch.double),
        },
    )


def add_case(shape: tuple[int, ...], scale: bool, drop_path: bool, wide: bool = False) -> Case:
    g = torch.Generator().manual_seed(0)
    D = shape[-1]
    tensors = norm_case(shape).tensors
    factor = torch.randint(0, 2, shape[:1], generator=g).float() * 2
    return Case(
        op=ops.add_layer_norm,
        ref=add_layer_norm_ref,
        tensors={
            "residual": tensors["x"],
            "branch": torch.randn(shape, generator=g, dtype=torch.double),
            "weight": tensors["weight"],
            "bias": tensors["bias"],
            "scale": torch.randn(D, generator=g, dtype=torch.double) if scale else None,
            "drop_path": factor if drop_path else None,
        },
        constants=("drop_path",),
        wide=("residual", "weight", "bias", "scale") if wide else (),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_parity(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_parity(norm_case(shape), "layer_norm", backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "drop_path"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_layer_norm_parity(backend: str, scale: bool, drop_path: bool, dtype: torch.dtype) -> None:
    check_parity(add_case((3, 7, 72), scale, drop_path), "layer_norm", backend, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 17, 192), (0, 4, 16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_layer_norm_shapes(backend: str, shape: tuple[int, ...]) -> None:
    check_parity(add_case(shape, True, True), "layer_norm", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_far_from_zero(backend: str) -> None:
    """A mean 1000 times the spread: a variance from E[x^2] - E[x]^2 would lose every digit."""
    check_parity(norm_case((2, 9, 96), offset=1000.0), "layer_norm", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noncontiguous(backend: str) -> None:
    case = norm_case((2, 6, 48))
    assert case.tensors["x"] is not None
    case.tensors["x"] = torch.randn(6, 48, 2, dtype=torch.double).permute(2, 0, 1)
    check_parity(case, "layer_norm", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable(backend: str) -> None:
    check_repeatable(add_case((4, 33, 96), True, True), "layer_norm", backend)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_compiles(backend: str) -> None:
    check_compiles(add_case((2, 5, 16), True, True), "layer_norm", backend)


@pytest.mark.parametrize(("scale", "drop_path"), [(False, False), (True, True)])
def test_gradcheck(scale: bool, drop_path: bool) -> None:
    check_gradients(norm_case((2, 3, 5)))
    check_gradients(add_case((2, 3, 5), scale, drop_path))


def test_opcheck() -> None:
    case = add_case((2, 3, 8), True, True).inputs(torch.float32, "cpu")
    args = [case[n] for n in ("residual", "branch", "scale", "drop_path", "weight", "bias")]
    torch.library.opcheck(torch.ops.vitfast.layer_norm.default, (*args, 1e-6, "torch"))
    alone = (args[0], None, None, None, args[4], args[5], 1e-6, "torch")
    torch.library.opcheck(torch.ops.vitfast.layer_norm.default, alone)


def test_only_the_sum_is_used() -> None:
    """Backward without a gradient for the normalised output."""
    tensors = add_case((2, 3, 8), True, True).inputs(torch.float64, "cpu")
    total, _ = ops.add_layer_norm(**tensors, backend="torch")
    expected, _ = add_layer_norm_ref(**tensors)
    names = ("residual", "branch", "scale")
    ours = torch.autograd.grad(total.sin().sum(), [tensors[n] for n in names])
    theirs = torch.autograd.grad(expected.sin().sum(), [tensors[n] for n in names])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_residual_stream() -> None:
    """fp32 residual, bf16 branch, as under autocast: the sum stays fp32 and the normalised rows are bf16."""
    tensors = add_case((2, 3, 32), True, True, wide=True).inputs(torch.bfloat16, "cpu")
    total, normed = ops.add_layer_norm(**tensors)
    assert total.dtype == torch.float32
    assert normed.dtype == torch.bfloat16
    check_parity(add_case((3, 7, 72), True, True, wide=True), "layer_norm", "torch", torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\)"),
        ({"branch": torch.ones(2, 3, 9)}, "branch has shape"),
        ({"scale": torch.ones(1, 8)}, "scale has shape"),
        ({"drop_path": torch.ones(3)}, r"drop_path has shape \(3,\); allowed: \(2,\)"),
        ({"backend": "gpu"}, "backend is 'gpu'; allowed are"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    tensors = add_case((2, 3, 8), True, True).inputs(torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        ops.add_layer_norm(**(tensors | change))


def test_unavailable_backend_gives_every_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is here: the backend may be available")
    with pytest.raises(
        RuntimeError, match=r"layer_norm: backend 'cuda' cannot run.*cpu:.*triton:.*cuda:.*torch: can run"
    ):
        ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8), backend="cuda")


@pytest.mark.parametrize(("device_dtype"), [torch.float64])
def test_auto_falls_back_on_dtype(device_dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, dtype=device_dtype)
    torch.testing.assert_close(ops.layer_norm(x, x[0], x[1]), layer_norm_ref(x, x[0], x[1]))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_kernels_take_no_row_over_their_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels ran here: "auto" moves on, the name raises with the reason."""
    from vitfast.ops import dispatch

    able = dispatch.Backend(name, lambda: "kernels", lambda *_: None)
    fallback = dispatch.Backend("torch", lambda: "plain", lambda *_: None)
    monkeypatch.setitem(dispatch.TABLE, "layer_norm", (able, fallback))
    for width, expected in ((8192, "kernels"), (8200, "plain")):
        x = torch.empty(1, width)
        assert dispatch.choose("layer_norm", x, "auto", why_not=dispatch.too_wide(x)) == expected
    weight = torch.ones(8200)
    for op in (ops.layer_norm, ops.norm_linear):
        monkeypatch.setitem(dispatch.TABLE, op.__name__, (able, fallback))
        more = (torch.ones(8, 8200), None) if op is ops.norm_linear else ()
        with pytest.raises(RuntimeError, match=f"{name}: rows of 8200: its LayerNorm kernels"):
            op(torch.empty(1, 8200), weight, weight, *more, backend=name)
