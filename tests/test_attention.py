"""Attention from packed qkv on every backend."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from op_checks import (
    BACKENDS,
    Case,
    check_compiles,
    check_gradients,
    check_parity,
    check_repeatable,
    skip_unless_available,
)
from tolerances import relative_error
from torch import Tensor

from vitfast import ops
from vitfast.ops.attention import HeadNorm, attention_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, L, H, E): ViT lengths and their neighbours (197, 50, 65), one token, head dims that are no power of two.
SHAPES = [(2, 5, 2, 8), (1, 1, 1, 16), (2, 50, 2, 64), (1, 197, 1, 64), (1, 65, 2, 72), (1, 33, 1, 80), (0, 4, 2, 8)]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def case_of(B: int, L: int, H: int, E: int, bias: tuple[int, ...] | None = None, scale: float | None = None) -> Case:
    return Case(
        op=partial(ops.attention, scale=scale),
        ref=partial(attention_ref, scale=scale),
        tensors={"qkv": _randn(B, L, 3, H, E), "bias": None if bias is None else _randn(*bias, seed=1)},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_parity(case_of(*shape), "attention", backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("remainder", range(16))
def test_every_remainder(backend: str, remainder: int) -> None:
    check_parity(case_of(1, 16 + remainder, 1, 16), "attention", backend, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "length", [1, 2, 15, 16, 17, 49, 63, 64, 127, 128, 129, 192, 196, 201, 255, 256, 257, 320, 577]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vit_lengths(backend: str, length: int) -> None:
    check_parity(case_of(1, length, 2, 64), "attention", backend, torch.float32)
    check_parity(
        case_of(1, length, 1, 80), "attention", backend, torch.float16 if backend == "triton" else torch.bfloat16
    )


@pytest.mark.parametrize("bias", [(2, 3, 9, 9), (1, 3, 9, 9), (2, 1, 9, 9), (9, 9), (3, 1, 9), (2, 1, 1, 9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_and_its_gradient(backend: str, bias: tuple[int, ...]) -> None:
    check_parity(case_of(2, 9, 3, 16, bias), "attention", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys(backend: str) -> None:
    """-inf masks a key; a query that sees no key gives zeros and no gradient, nowhere NaN."""
    skip_unless_available("attention", backend)
    device = "cuda" if backend in ("cuda",) or (torch.cuda.is_available() and backend != "cpu") else "cpu"
    qkv = _randn(1, 6, 3, 1, 16).float().to(device).requires_grad_()
    bias = torch.zeros(1, 1, 6, 6, device=device)
    bias[..., 4:] = -math.inf
    bias[..., 2, :] = -math.inf
    out = ops.attention(qkv, bias=bias, backend=backend)
    out.sin().sum().backward()
    assert qkv.grad is not None
    assert torch.equal(out[0, 2], torch.zeros_like(out[0, 2]))
    assert torch.isfinite(qkv.grad).all()
    assert qkv.grad[0, 4:, 1:].abs().max() == 0  # masked keys and their values
    keep = [0, 1, 3, 4, 5]
    expected = attention_ref(qkv.detach().double(), bias=bias.double())
    assert relative_error(out[:, keep], expected[:, keep]) < 1e-6


@pytest.mark.parametrize("kind", ["large negative logits", "equal logits", "one-hot values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Logits all far below zero, all equal, values that show which key was read: finite, and as good as PyTorch's."""
    qkv = _randn(1, 65, 3, 1, 64)  # 65: one more than a tile
    if kind == "large negative logits":
        qkv[:, :, 0], qkv[:, :, 1] = qkv[:, :, 0].abs() * 4, -qkv[:, :, 1].abs() * 4
    elif kind == "equal logits":
        qkv[:, :, 0] = 0
    else:
        qkv[0, :, 2, 0] = torch.eye(65, 64, dtype=torch.double)
    check_parity(Case(ops.attention, attention_ref, {"qkv": qkv}), "attention", backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend: str) -> None:
    """Packed sequences give what each gives alone, an empty one among them."""
    lengths = [5, 0, 17, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def alone(qkv: Tensor) -> Tensor:
        parts = [attention_ref(part.unsqueeze(0))[0] for part in qkv.split(lengths)]
        return torch.cat(parts)

    def packed(qkv: Tensor, backend: str) -> Tensor:
        return ops.attention(qkv, cu_seqlens=bounds.to(qkv.device), max_seqlen=17, backend=backend)

    check_parity(Case(packed, alone, {"qkv": _randn(23, 3, 2, 16)}), "attention", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noncontiguous(backend: str) -> None:
    case = Case(ops.attention, attention_ref, {"qkv": _randn(3, 2, 9, 3, 16).permute(1, 2, 0, 3, 4)[:, :8]})
    check_parity(case, "attention", backend, torch.float32)


def _rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Complex multiplication of (x_i, x_{i + E/2}), the definition of rotary embedding."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    return torch.cat([turned.real, turned.imag], -1)


def test_rope_and_head_norms() -> None:
    """Against the definition: norm, then rotation of all but the first token, then plain attention."""
    qkv, angles, weight, shift = _randn(2, 7, 3, 2, 8), _randn(6, 4, seed=1), _randn(8, seed=2), _randn(8, seed=3)
    q, k, v = qkv.unbind(2)
    q = torch.nn.functional.layer_norm(q, (8,), weight, shift, 1e-6)
    k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6) * weight
    q, k = (torch.cat([t[:, :1], _rotate_pairs(t[:, 1:], angles)], 1) for t in (q, k))
    expected = attention_ref(torch.stack([q, k, v], 2))
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    ours = ops.attention(qkv, rope=(cos, sin), q_norm=HeadNorm(weight, shift), k_norm=HeadNorm(weight, kind="rms_norm"))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_compiles(backend: str) -> None:
    check_compiles(case_of(2, 9, 2, 16, (9, 9)), "attention", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable(backend: str) -> None:
    check_repeatable(case_of(2, 50, 2, 32, (1, 2, 50, 50)), "attention", backend)


def test_gradcheck() -> None:
    check_gradients(case_of(2, 3, 2, 4))
    check_gradients(case_of(2, 3, 2, 4, (1, 2, 3, 3), scale=0.3))


def test_opcheck() -> None:
    tensors = case_of(2, 5, 2, 8, (1, 2, 5, 5)).inputs(torch.float32, "cpu")
    for bias in (None, tensors["bias"]):
        torch.library.opcheck(torch.ops.vitfast.attention.default, (tensors["qkv"], 0.3, bias, None, 5, "torch"))


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(torch.randn(1, 4, 3, 2, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": torch.ones(2, 3, 4)}, r"qkv has shape \(2, 3, 4\); allowed: \(B, L, 3, H, E\)"),
        ({"bias": torch.ones(3, 5)}, r"bias has shape \(3, 5\); allowed: anything that broadcasts to \(2, 2, 5, 5\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "with cu_seqlens"),
        ({"max_seqlen": 5}, "max_seqlen is given without cu_seqlens"),
        ({"rope": (torch.ones(9, 8), torch.ones(9, 8))}, "rope's cos has shape"),
        ({"backend": "cuDNN"}, "backend is 'cuDNN'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(**({"qkv": torch.ones(2, 5, 3, 2, 8)} | arguments))


def test_bad_packed_arguments() -> None:
    qkv = torch.ones(5, 3, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens is \(2,\) of torch.int64"):
        ops.attention(qkv, cu_seqlens=torch.tensor([0, 5]), max_seqlen=5)
    with pytest.raises(ValueError, match="max_seqlen is missing"):
        ops.attention(qkv, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="bias is given"):
        HeadNorm(None, torch.ones(8), kind="rms_norm")
