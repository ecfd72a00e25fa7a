"""Attention from packed qkv on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from op_checks import (
    BACKENDS,
    DEVICE,
    LENGTHS,
    Case,
    check_compiles,
    check_gradients,
    check_parity,
    check_repeatable,
    randn,
    skip_unless_available,
)
from tolerances import relative_error
from torch import Tensor

from vitfast import ops
from vitfast.ops.attention import attention_ref
from vitfast.ops.heads import HeadNorm, Heads, Rope

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, L, H, E): ViT lengths and their neighbours (197, 50, 65), one token, head dims that are no power of two.
SHAPES = [(2, 5, 2, 8), (1, 1, 1, 16), (2, 50, 2, 64), (1, 197, 1, 64), (1, 65, 2, 72), (1, 33, 1, 80), (0, 4, 2, 8)]


def case_of(B: int, L: int, H: int, E: int, bias: tuple[int, ...] | None = None, scale: float | None = None) -> Case:
    return Case(
        op=partial(ops.attention, scale=scale),
        ref=partial(attention_ref, scale=scale),
        tensors={"qkv": randn(B, L, 3, H, E), "bias": None if bias is None else randn(*bias, seed=1)},
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
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vit_lengths(backend: str, length: int) -> None:
    """fp32 takes the looped kernels and 16 bits, up to a length, the one-pass kernels; with every option as well."""
    half = torch.float16 if backend == "triton" else torch.bfloat16
    check_parity(case_of(1, length, 2, 64), "attention", backend, torch.float32)
    check_parity(case_of(1, length, 1, 80), "attention", backend, half)
    check_parity(case_of(1, length, 1, 64), "attention", backend, half)
    options = OPTIONS["all"] | {"prefix": min(1, length - 1)}
    check_parity(optional_case((1, length, 1, 32), **options), "attention", backend, half)


@pytest.mark.slow
@pytest.mark.parametrize("remainder", range(16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_remainder_with_options(backend: str, remainder: int) -> None:
    for dtype in (torch.float32, torch.float16 if backend == "triton" else torch.bfloat16):
        check_parity(optional_case((2, 16 + remainder, 1, 16), **OPTIONS["all"]), "attention", backend, dtype)


@pytest.mark.parametrize("bias", [(2, 3, 9, 9), (1, 3, 9, 9), (2, 1, 9, 9), (9, 9), (3, 1, 9), (2, 1, 1, 9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_and_its_gradient(backend: str, bias: tuple[int, ...]) -> None:
    check_parity(case_of(2, 9, 3, 16, bias), "attention", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys(backend: str) -> None:
    """-inf masks a key; a query that sees no key gives zeros and no gradient, nowhere NaN."""
    skip_unless_available("attention", backend)
    device = "cpu" if backend == "cpu" else DEVICE
    qkv = randn(1, 6, 3, 1, 16).float().to(device).requires_grad_()
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
    qkv = randn(1, 65, 3, 1, 64)  # 65: one more than a tile
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

    check_parity(Case(packed, alone, {"qkv": randn(23, 3, 2, 16)}), "attention", backend, torch.float32)


VIEWS: dict[str, Callable[[], Tensor]] = {
    "permuted": lambda: randn(3, 2, 9, 3, 16).permute(1, 2, 0, 3, 4)[:, :8],  # q, k and v apart in memory
    "part of wider rows": lambda: randn(2, 8, 3, 2, 40)[..., 4:36:2],
    "every other image": lambda: randn(4, 8, 3, 2, 16)[::2],
    "heads before tokens": lambda: randn(2, 3, 2, 8, 16).permute(0, 3, 1, 2, 4),
    "one image repeated": lambda: randn(1, 8, 3, 2, 16).expand(3, -1, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_noncontiguous(backend: str, view: str) -> None:
    check_parity(Case(ops.attention, attention_ref, {"qkv": VIEWS[view]()}), "attention", backend, torch.float32)


def _tables(rows: int, width: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, fp32: tables keep their dtype whatever q and k have."""
    angles = randn(rows, width, seed=seed).float()
    return angles.cos(), angles.sin()


def optional_case(
    shape: tuple[int, int, int, int],
    *,
    rope: str = "",
    prefix: int = 0,
    norm: str = "",
    padding: bool = False,
    bias: bool = False,
    scale: float | None = None,
) -> Case:
    """Attention with any set of its options.

    rope: "half", "interleaved" or "pairs" (tables of E / 2 columns), of all but the first ``prefix`` tokens; norm: the kind
    for q, k gets the other one with "mixed".
    """
    B, L, H, E = shape
    tensors: dict[str, Tensor | None] = {"qkv": randn(B, L, 3, H, E)}
    constants = []
    kinds = {"mixed": ("layer_norm", "rms_norm")}.get(norm, (norm, norm))
    for name, kind, seed in zip("qk", kinds, (1, 2), strict=True):
        if kind:
            tensors[f"{name}_weight"] = 1 + 0.3 * randn(E, seed=seed)
        # Without a rotation q k_bias is the same for every key, and softmax drops it: no gradient to compare
        if kind == "layer_norm" and (name == "q" or rope):
            tensors[f"{name}_bias"] = 0.3 * randn(E, seed=seed + 10)
    if bias:
        tensors["bias"] = randn(H, L, L, seed=3)
    if rope:
        tensors["cos"], tensors["sin"] = _tables(L - prefix, E // 2 if rope == "pairs" else E)
        constants += ["cos", "sin"]
    if padding:
        mask = torch.rand(B, L, generator=torch.Generator().manual_seed(4)) < 0.4
        mask[:, L // 2] = False  # a row without any key has no truth
        tensors["key_padding_mask"] = mask
        constants += ["key_padding_mask"]

    def run(function: Callable[..., Tensor], more: dict[str, object], **t: Tensor) -> Tensor:
        norms = {
            f"{name}_norm": HeadNorm(t[f"{name}_weight"], t.get(f"{name}_bias"), 1e-5, kind) if kind else None
            for name, kind in zip("qk", kinds, strict=True)
        }
        turn = Rope(t["cos"], t["sin"], rope == "interleaved") if rope else None
        rest = {name: t.get(name) for name in ("bias", "key_padding_mask")}
        return function(t["qkv"], scale=scale, rope=turn, **norms, **rest, **more)

    return Case(
        op=lambda backend, **t: run(ops.attention, {"backend": backend}, **t),
        ref=lambda **t: run(attention_ref, {}, **t),
        tensors=tensors,
        constants=tuple(constants),
    )


@pytest.mark.parametrize("level", [-1e4, -1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "length", [64, pytest.param(65, marks=pytest.mark.slow), pytest.param(192, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_below_zero(backend: str, length: int, dtype: torch.dtype, level: float) -> None:
    """Every logit at -1e4 or -1e30, where a running maximum that starts at 0 or at a finite number gives NaN or zeros.

    64 and 192 leave a remainder of 64 by 128, where other kernels return NaN gradients. At -1e30 the bias swallows q k^T,
    in fp64 too, and the log-sum-exp that backward weighs keys by has no digits left: gradients are only held to be finite.
    """
    skip_unless_available("attention", backend, dtype)
    device = "cpu" if backend == "cpu" else DEVICE
    qkv = randn(1, length, 3, 1, 16).to(device, dtype).requires_grad_()
    bias = torch.full((length, length), level, device=device)
    out = ops.attention(qkv, bias=bias, backend=backend)
    out.double().square().sum().backward()
    exact = qkv.detach().double().requires_grad_()
    # a constant bias changes nothing while it leaves q k^T its digits, and makes all logits equal where it does not
    truth = attention_ref(exact) if level > -1e5 else attention_ref(exact, scale=0.0)
    truth.square().sum().backward()
    assert qkv.grad is not None
    assert exact.grad is not None
    assert torch.isfinite(qkv.grad).all()
    close = 1e-3 if dtype == torch.float32 else 3e-2  # 1e-4 of 1e4 is what fp32 has left for a logit
    assert relative_error(out, truth) < close
    if level > -1e5:
        assert relative_error(qkv.grad, exact.grad) < close


OPTIONS: dict[str, dict[str, object]] = {
    "rope half": {"rope": "half"},
    "rope interleaved": {"rope": "interleaved"},
    "rope pairs": {"rope": "pairs", "prefix": 5},
    "layer norm": {"norm": "layer_norm"},
    "rms norm": {"norm": "rms_norm"},
    "padding": {"padding": True},
    "all": {"rope": "interleaved", "prefix": 1, "norm": "mixed", "padding": True, "bias": True, "scale": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend: str, options: str, dtype: torch.dtype) -> None:
    check_parity(optional_case((2, 18, 2, 16), **OPTIONS[options]), "attention", backend, dtype)


@pytest.mark.parametrize("E", [24, 72])
@pytest.mark.parametrize("interleaved", ["half", "interleaved"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_with_wide_heads(backend: str, interleaved: str, E: int) -> None:
    """Head dims whose halves are no powers of two, and tables of one angle for each pair."""
    options = {"rope": interleaved, "norm": "layer_norm"}
    check_parity(optional_case((1, 9, 1, E), **options), "attention", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_of_no_images(backend: str) -> None:
    check_parity(optional_case((0, 6, 2, 16), **OPTIONS["all"]), "attention", backend, torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_and_head_norms_by_definition(interleaved: bool) -> None:
    """Norm, then each pair times exp(i * angle) for all but the first token, then plain attention."""
    qkv, angles, weight, shift = randn(2, 7, 3, 2, 8), randn(6, 4, seed=1), randn(8, seed=2), randn(8, seed=3)
    q, k, v = qkv.unbind(2)
    q = torch.nn.functional.layer_norm(q, (8,), weight, shift, 1e-6)
    k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6) * weight

    def turn(x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        parts = torch.view_as_real(turned)
        return (parts if interleaved else parts.transpose(-1, -2)).flatten(-2)

    q, k = (torch.cat([t[:, :1], turn(t[:, 1:])], 1) for t in (q, k))
    expected = attention_ref(torch.stack([q, k, v], 2))
    norms = {"q_norm": HeadNorm(weight, shift), "k_norm": HeadNorm(weight, kind="rms_norm")}
    full = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    for table in (angles, full):
        ours = ops.attention(qkv, rope=Rope(table.cos(), table.sin(), interleaved), **norms)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_with_options(backend: str, interleaved: bool) -> None:
    """One table row for each packed token, and norms: as each sequence alone."""
    lengths, E = [5, 0, 17, 1], 16
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cos, sin = _tables(23, E)
    cos[5], sin[5] = 1, 0  # the second sequence's class token

    def norms(weight: Tensor, shift: Tensor) -> dict[str, HeadNorm]:
        return {"q_norm": HeadNorm(weight, shift), "k_norm": HeadNorm(weight, None, kind="rms_norm")}

    def alone(qkv: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        tables = zip(cos.to(qkv.device).split(lengths), sin.to(qkv.device).split(lengths), strict=True)
        parts = [
            attention_ref(part.unsqueeze(0), rope=Rope(*pair, interleaved), **norms(weight, shift))[0]
            for part, pair in zip(qkv.split(lengths), tables, strict=True)
        ]
        return torch.cat(parts)

    def packed(qkv: Tensor, weight: Tensor, shift: Tensor, backend: str) -> Tensor:
        rope = Rope(cos.to(qkv.device), sin.to(qkv.device), interleaved)
        where = {"cu_seqlens": bounds.to(qkv.device), "max_seqlen": 17}
        return ops.attention(qkv, rope=rope, **norms(weight, shift), **where, backend=backend)

    tensors = {"qkv": randn(23, 3, 2, E), "weight": 1 + 0.3 * randn(E, seed=1), "shift": randn(E, seed=2)}
    check_parity(Case(packed, alone, tensors), "attention", backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_hides_keys(backend: str) -> None:
    """Padding changes nothing for the others, gets no gradient as keys, and a sequence of padding alone gives zeros."""
    skip_unless_available("attention", backend)
    device = "cpu" if backend == "cpu" else DEVICE
    qkv = randn(3, 20, 3, 2, 16).float().to(device)
    mask = torch.zeros(3, 20, dtype=torch.bool, device=device)
    mask[0, 13:] = mask[1, 4] = mask[2] = True
    changed = qkv.clone()
    changed[:, :, 1:][mask] = 1e4
    qkv.requires_grad_()
    out = ops.attention(qkv, key_padding_mask=mask, backend=backend)
    out.sin().sum().backward()
    assert qkv.grad is not None
    assert torch.equal(out, ops.attention(changed, key_padding_mask=mask, backend=backend))
    assert not out[2].any()
    assert torch.isfinite(qkv.grad).all()
    assert not qkv.grad[:, :, 1:][mask].any()
    assert not qkv.grad[2].any()
    alone = ops.attention(qkv[:1, :13], backend=backend)
    torch.testing.assert_close(out[:1, :13], alone)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_compiles(backend: str) -> None:
    check_compiles(case_of(2, 9, 2, 16, (9, 9)), "attention", backend)
    check_compiles(optional_case((2, 9, 2, 16), **OPTIONS["all"]), "attention", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable(backend: str) -> None:
    check_repeatable(case_of(2, 50, 2, 32, (1, 2, 50, 50)), "attention", backend)
    check_repeatable(optional_case((2, 17, 1, 16), **OPTIONS["all"]), "attention", backend)


def test_gradcheck() -> None:
    check_gradients(case_of(2, 3, 2, 4))
    check_gradients(case_of(2, 3, 2, 4, (1, 2, 3, 3), scale=0.3))
    for options in OPTIONS.values():
        check_gradients(optional_case((2, 6, 2, 4), **options))


def test_opcheck() -> None:
    tensors = case_of(2, 5, 2, 8, (1, 2, 5, 5)).inputs(torch.float32, "cpu")
    weight, shift = (torch.randn(8, requires_grad=True) for _ in range(2))
    heads = Heads(*_tables(4, 8), True, "layer_norm", "rms_norm", weight, shift, weight, None, 1e-6, 1e-6)
    mask = torch.tensor([[False] * 4 + [True]] * 2)
    for bias, padding, more in ((None, None, Heads()), (tensors["bias"], mask, heads)):
        arguments = (tensors["qkv"], 0.3, bias, None, 5, padding, *more, "torch")
        torch.library.opcheck(torch.ops.vitfast.attention.default, arguments)


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
        ({"rope": (torch.ones(9, 8), torch.ones(9, 8))}, r"rope's cos has shape \(9, 8\); allowed: \(N <= 5, 8\) or"),
        ({"rope": (torch.ones(5, 8), torch.ones(5, 4))}, r"rope's sin has shape \(5, 4\); .* the same for both"),
        ({"q_norm": HeadNorm(torch.ones(7))}, r"q_norm's weight has shape \(7,\); allowed: \(8,\)"),
        ({"key_padding_mask": torch.ones(2, 5)}, "key_padding_mask is torch.float32; allowed: torch.bool"),
        ({"key_padding_mask": torch.ones(5, 2) > 0}, r"key_padding_mask has shape \(5, 2\); allowed: \(2, 5\)"),
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
    packed = {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "max_seqlen": 5}
    with pytest.raises(ValueError, match="bias is given with cu_seqlens"):
        ops.attention(qkv, bias=torch.ones(5, 5), **packed)
    with pytest.raises(ValueError, match="key_padding_mask is given with cu_seqlens"):
        ops.attention(qkv, key_padding_mask=torch.ones(1, 5) > 0, **packed)
    with pytest.raises(ValueError, match=r"rope's cos has shape \(4, 8\); allowed: \(5, 8\)"):
        ops.attention(qkv, rope=(torch.ones(4, 8), torch.ones(4, 8)), **packed)
    with pytest.raises(ValueError, match="rope is given with head dim 7; allowed: an even one"):
        ops.attention(torch.ones(1, 5, 3, 2, 7), rope=(torch.ones(5, 7), torch.ones(5, 7)))
    with pytest.raises(ValueError, match="bias is given"):
        HeadNorm(None, torch.ones(8), kind="rms_norm")


def test_a_head_dim_that_a_backend_refuses() -> None:
    """A named backend answers with the reason, "auto" goes on to the next one."""
    qkv = torch.randn(1, 3, 3, 1, 300)
    torch.testing.assert_close(ops.attention(qkv), attention_ref(qkv))
    skip_unless_available("attention", "cpu")
    with pytest.raises(RuntimeError, match="cpu: head dim 300: above 256"):
        ops.attention(qkv, backend="cpu")
    skip_unless_available("attention", "triton")
    with pytest.raises(RuntimeError, match=r"triton: head dim 300 with torch\.float32: above"):
        ops.attention(qkv, backend="triton")
    both = {"bias": torch.zeros(3, 3), "q_norm": HeadNorm(torch.ones(160))}
    qkv = torch.randn(1, 3, 3, 1, 160, dtype=torch.float16)
    for option in both:  # one of the two is taken
        ops.attention(qkv, **{option: both[option]}, backend="triton")
    with pytest.raises(
        RuntimeError, match=r"triton: head dim 160 with torch\.float16 and a bias beside norm or rotation: above 128"
    ):
        ops.attention(qkv, **both, backend="triton")
    assert torch.isfinite(ops.attention(qkv, **both)).all()
