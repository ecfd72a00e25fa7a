"""Raw Triton kernels against fp64 PyTorch: on the GPU where there is one, else in Triton's interpreter (see
conftest.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

import triton
import triton.language as tl

from vitfast.kernels import (
    activation,
    attention_backward,
    attention_forward,
    attention_tiles,
    configs,
    layer_norm,
    mlp,
    patch_embed,
    patchify,
    reduce,
)
from vitfast.kernels.attention_heads import HeadOptions
from vitfast.ops import plain as plain_ops
from vitfast.ops.arguments import ACTIVATIONS, POINTWISE
from vitfast.ops.compose import activation_ref
from vitfast.ops.heads import Heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 instead of rounding, and its bf16 products are wrong: there only fp32 and fp16 are
# tested.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def rand(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * spread).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def check(name: str, got: Tensor, plain: Tensor, truth: Tensor, floor: float = 4e-6) -> None:
    """The kernel's error against fp64 is at most twice plain PyTorch's in the same dtype, with a floor of a few ulp of
    fp32."""
    assert torch.isfinite(got).all(), name
    floor = floor * max(float(truth.abs().max()), 1e-3) if truth.numel() else 0.0
    if truth.numel():
        error, allowed = float((got.double() - truth).abs().max()), float((plain.double() - truth).abs().max())
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, plain PyTorch's {allowed:.3g}"


def both(
    function: Callable[..., dict[str, Tensor]], *tensors: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference in the tensors' own dtypes and in fp64."""
    return function(*tensors), function(*(None if t is None else t.double() for t in tensors))


def norm_reference(residual_dtype, branch_dtype):
    def run(x, branch, scale, drop_path, weight, bias, d_normed, d_total):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, branch, scale, weight, bias)]
        x, branch, scale, weight, bias = leaves
        exact = x.dtype == torch.float64
        total = x
        if branch is not None:
            added = branch if scale is None else branch * (scale if exact else scale.to(branch_dtype))
            if drop_path is not None:
                factor = drop_path.repeat_interleave(x.shape[0] // drop_path.shape[0])[:, None]
                added = added * (factor if exact else factor.to(branch_dtype))
            total = x + added
            total = total if exact else total.to(residual_dtype)
        out = F.layer_norm(total if exact else total.float(), total.shape[-1:], weight, bias, 1e-6)
        normed = out if exact else out.to(branch_dtype)
        torch.autograd.backward([normed, total], [d_normed, torch.zeros_like(total) if d_total is None else d_total])
        found = {"total": total.detach(), "normed": normed.detach()}
        names = ("d_x", "d_branch", "d_scale", "d_weight", "d_bias")
        found.update({n: t.grad for n, t in zip(names, leaves, strict=True) if t is not None})
        return found

    return run


NORM_CASES = [
    # rows, width, images: one element, no power of two, and where d_scale is summed apart (over 4096)
    (6, 1, 2),
    (4, 33, 1),
    (15, 192, 3),
    (10, 768, 5),
    (3, 1280, 3),
    pytest.param(2, 5000, 1, marks=pytest.mark.slow),
    pytest.param(4, 8192, 2, marks=pytest.mark.slow),
]
PAIRS = [(torch.float32, torch.float32), (torch.float32, HALF), (HALF, HALF)]


@pytest.mark.parametrize(("T", "D", "B"), NORM_CASES)
@pytest.mark.parametrize(("X", "Y"), PAIRS, ids=str)
@pytest.mark.parametrize("extras", ["plain", "branch", "scale", "drop_path", "all"])
def test_layer_norm(T, D, B, X, Y, extras):
    x, weight, bias = rand(T, D, dtype=X, seed=1), 1 + 0.1 * rand(D, seed=2), rand(D, seed=3)
    branch = None if extras == "plain" else rand(T, D, dtype=Y, seed=4)
    scale = 0.1 * rand(D, seed=5) if extras in ("scale", "all") else None
    drop_path = torch.linspace(0.0, 2.0, B, device=DEVICE) if extras in ("drop_path", "all") else None
    d_normed, d_total = rand(T, D, dtype=Y, seed=6), None if extras == "branch" else rand(T, D, dtype=X, seed=7)
    total = None if branch is None else poisoned(T, D, dtype=X)
    normed, mean, rstd = poisoned(T, D, dtype=Y), poisoned(T), poisoned(T)
    layer_norm.layer_norm_forward(x, branch, scale, drop_path, weight, bias, 1e-6, total, normed, mean, rstd)
    again = poisoned(T, D, dtype=Y)
    stored = x if total is None else total
    layer_norm.layer_norm_apply(stored, mean, rstd, weight, bias, again)
    assert torch.equal(normed, again)
    if total is not None:
        alone = poisoned(T, D, dtype=X)
        layer_norm.scale_add_forward(x, branch, scale, drop_path, alone)
        assert torch.equal(total, alone)

    d_x, d_weight, d_bias = poisoned(T, D, dtype=X), poisoned(D), poisoned(D)
    d_branch = None if branch is None else poisoned(T, D, dtype=Y)
    d_scale = None if scale is None else poisoned(D)
    layer_norm.layer_norm_backward(
        d_normed,
        d_total,
        stored,
        mean,
        rstd,
        weight,
        branch,
        scale,
        drop_path,
        d_x,
        d_branch,
        d_scale,
        d_weight,
        d_bias,
    )
    plain, truth = both(norm_reference(X, Y), x, branch, scale, drop_path, weight, bias, d_normed, d_total)
    found = {"total": total, "normed": normed, "d_x": d_x, "d_branch": d_branch, "d_scale": d_scale}
    found |= {"d_weight": d_weight, "d_bias": d_bias}
    for name, got in found.items():
        if got is not None:
            check(name, got, plain[name], truth[name])


def test_layer_norm_statistics_of_a_large_mean():
    """Mean 1e4 and spread 1: E[x**2] - E[x]**2 would lose every digit of the variance."""
    x = 1e4 + rand(3, 256)
    normed, mean, rstd = poisoned(3, 256), poisoned(3), poisoned(3)
    one, zero = torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE)
    layer_norm.layer_norm_forward(x, None, None, None, one, zero, 1e-6, None, normed, mean, rstd)
    truth = F.layer_norm(x.double(), (256,), eps=1e-6)
    assert float((normed.double() - truth).abs().max()) < 2e-3  # half an ulp of the mean, 5e-4, over a spread of 1


def test_layer_norm_empty_batch():
    empty, D = poisoned(0, 8), 8
    row, d_weight, d_bias = poisoned(0), poisoned(D), poisoned(D)
    weight = torch.ones(D, device=DEVICE)
    layer_norm.layer_norm_forward(empty, None, None, None, weight, weight, 1e-6, None, empty, row, row)
    layer_norm.layer_norm_backward(
        empty, None, empty, row, row, weight, None, None, None, empty, None, None, d_weight, d_bias
    )
    assert not d_weight.any()
    assert not d_bias.any()


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D"), [(1, 1), (5, 300), (19, 64)])
def test_activation(kind, dtype, T, D):
    H = 2 * D if kind == "swiglu" else D
    h, d_act = rand(T, H, dtype=dtype, spread=3.0), rand(T, D, dtype=dtype, seed=1)
    h.view(-1)[: min(T * H, 7)] = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e-4, -5.0, 9.0], dtype=dtype)[: T * H]
    out, act = (poisoned(T, D, dtype=dtype) for _ in range(2))
    d_h, d_bias = poisoned(T, H, dtype=dtype), poisoned(H)
    activation.activation_forward(h, kind, out)
    activation.activation_backward(h, d_act, kind, d_h, act, d_bias)
    assert torch.equal(out, act)
    alone = poisoned(T, H, dtype=dtype)
    activation.activation_backward(h, d_act, kind, alone, None, None)
    assert torch.equal(alone, d_h)

    def reference(h, d_act):
        h = h.clone().requires_grad_()
        act = activation_ref(h, kind)
        act.backward(d_act)
        return {"act": act.detach(), "d_h": h.grad, "d_bias": h.grad.sum(0)}

    plain, truth = both(reference, h, d_act)
    for name, got in {"act": act, "d_h": d_h, "d_bias": d_bias}.items():
        check(name, got, plain[name], truth[name])


@pytest.mark.parametrize("kind", POINTWISE)
def test_activation_over_the_whole_line(kind):
    """fp16 has few enough numbers to try them all: no NaN, and never worse than half an ulp more than the exact value."""
    h = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    h = h[torch.isfinite(h)].to(DEVICE)
    out = torch.empty_like(h)
    activation.activation_forward(h, kind, out)
    truth = activation_ref(h.double(), kind)
    error = (out.double() - truth).abs()
    assert bool((error <= 2.0**-11 * 1.01 * truth.abs() + 4e-7).all())


PLAIN = HeadOptions()


def attention_reference(qkv, bias, d_out, scale, lengths):
    """out, d_qkv, d_bias in the tensors' dtype, one sequence after the other; a row without keys gives zeros."""
    qkv = qkv.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    outs, start = [], 0
    for index, length in enumerate(lengths):
        q, k, v = qkv[start : start + length].permute(1, 2, 0, 3)  # each [H, L, E]
        logits = (q @ k.transpose(-1, -2)) * scale
        if bias is not None:
            logits = logits + bias[index % bias.shape[0], :, :length, :length].to(logits.dtype)
        empty = (logits == float("-inf")).all(-1, keepdim=True)
        weights = torch.where(empty, 0, torch.where(empty, 0, logits).softmax(-1))
        outs.append((weights @ v).transpose(0, 1))
        start += length
    out = torch.cat(outs)
    out.backward(d_out)
    return {"out": out.detach(), "d_qkv": qkv.grad, **({} if bias is None else {"d_bias": bias.grad})}


def run_attention(qkv, bias, d_out, scale, lengths, packed=False, bias_gradient=True):
    T, _, H, E = qkv.shape
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE) if packed else None
    where = (cu_seqlens, max(lengths))
    seqlen = 0 if packed else lengths[0]
    out, lse, d_qkv = poisoned(T, H, E, dtype=qkv.dtype), poisoned(H, T), poisoned(*qkv.shape, dtype=qkv.dtype)
    d_bias = poisoned(*bias.shape) if bias is not None and bias_gradient else None
    attention_forward.attention_forward(qkv, scale, bias, None, PLAIN, *where, seqlen, out, lse)
    attention_backward.attention_backward(
        d_out, qkv, out, lse, scale, bias, None, PLAIN, *where, seqlen, d_qkv, d_bias, None, None
    )
    return {"out": out, "d_qkv": d_qkv, **({} if d_bias is None else {"d_bias": d_bias})}


def check_attention(qkv, bias, d_out, scale, lengths, packed=False):
    got = run_attention(qkv, bias, d_out, scale, lengths, packed)
    plain = attention_reference(qkv, bias, d_out, scale, lengths)
    exact = [None if t is None else t.double() for t in (qkv, bias, d_out)]
    truth = attention_reference(*exact, scale, lengths)
    for name, value in got.items():
        check(name, value, plain[name], truth[name])
    return got


# Every length of the specification, each with another head dim; a few rows of H and B, as the interpreter is slow.
ATTENTION_SHAPES = [
    # B, L, H, E
    (2, 1, 2, 16),
    (2, 2, 1, 72),
    (1, 15, 2, 80),
    (2, 16, 2, 32),
    (1, 17, 2, 88),
    (1, 50, 2, 64),
    (1, 64, 1, 128),
    (1, 65, 1, 64),
    (1, 65, 1, 96),
    (1, 33, 1, 256),
    (1, 197, 1, 64),
    *(
        pytest.param(*shape, marks=pytest.mark.slow)
        for shape in ((1, 196, 2, 64), (1, 197, 1, 72), (2, 257, 1, 80), (1, 577, 1, 64), (1, 320, 1, 192))
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "L", "H", "E"), ATTENTION_SHAPES)
def test_attention(B, L, H, E, dtype):
    qkv, d_out = rand(B * L, 3, H, E, dtype=dtype), rand(B * L, H, E, dtype=dtype, seed=1)
    got = check_attention(qkv, None, d_out, E**-0.5, [L] * B)
    again = run_attention(qkv, None, d_out, E**-0.5, [L] * B)
    assert all(torch.equal(got[name], again[name]) for name in got)


FORCED = {  # each kernel with one, two and three chunks, and looped with and without a tail, in every dtype
    "one_pass_1": ({"chunks": (64, 0, 0), "queries": 16, "keys": 0}, {"chunks": (64, 0, 0), "own": 0, "step": 16}),
    "one_pass_2": ({"chunks": (32, 16, 0), "queries": 32, "keys": 0}, {"chunks": (32, 16, 0), "own": 0, "step": 32}),
    "one_pass_3": ({"chunks": (16, 16, 16), "queries": 64, "keys": 0}, {"chunks": (16, 16, 16), "own": 0, "step": 64}),
    "looped": ({"chunks": (), "queries": 16, "keys": 32}, {"chunks": (), "own": 32, "step": 16}),
    "looped_whole": ({"chunks": (), "queries": 32, "keys": 16}, {"chunks": (), "own": 16, "step": 16}),
}


def force(path, monkeypatch):
    """The given kernels, whatever the shape would choose."""
    forward, backward = FORCED[path]
    monkeypatch.setattr(
        attention_forward, "attention_forward_config", lambda *_: configs.AttentionConfig(**forward, warps=4, stages=1)
    )
    monkeypatch.setattr(
        attention_backward,
        "attention_backward_config",
        lambda *_: configs.AttentionBackwardConfig(**backward, warps=4, stages=1),
    )


@pytest.mark.parametrize(("dtype", "E"), [(torch.float32, 24), (HALF, 80)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("path", FORCED)
def test_attention_kernels(path, packed, E, dtype, monkeypatch):
    force(path, monkeypatch)
    length = 48 if path == "looped_whole" else 43
    lengths = [3, 0, length, 1] if packed else [length, length]
    H, T = 1, sum(lengths)
    qkv, d_out = rand(T, 3, H, E, dtype=dtype), rand(T, H, E, dtype=dtype, seed=1)
    bias = rand(1, H, length, length, seed=2)
    check_attention(qkv, bias, d_out, 0.3, lengths, packed)


@pytest.mark.parametrize(
    ("packed", "interleaved"),
    [
        pytest.param(False, False, id="plain, halves"),
        pytest.param(True, True, id="packed, interleaved"),
        pytest.param(False, True, id="plain, interleaved", marks=pytest.mark.slow),
        pytest.param(True, False, id="packed, halves", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("path", FORCED)
def test_attention_heads_in_every_kernel(path, packed, interleaved, monkeypatch):
    """Norm, rotation and padding in each kernel: what plain PyTorch gives for q and k transformed before."""
    force(path, monkeypatch)
    dtype, E, H = (HALF, 40, 2) if interleaved else (torch.float32, 20, 1)
    length = 48 if path == "looped_whole" else 43
    lengths = [3, 0, length, 1] if packed else [length, length]
    T, width = sum(lengths), E // 2 if packed else E
    qkv, d_out = rand(T, 3, H, E, dtype=dtype), rand(T, H, E, dtype=dtype, seed=1)
    angles = rand(T if packed else length - 5, width, seed=2)
    vectors = [rand(E, seed=seed).to(dtype) for seed in (3, 4, 5)]
    heads = Heads(angles.cos(), angles.sin(), interleaved, "layer_norm", "rms_norm", *vectors, None, 1e-5, 1e-5)
    padding = None
    if not packed:
        padding = rand(2, length, seed=6) > 0.5
        padding[0, 7], padding[1] = False, True  # no key at all
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    cu_seqlens = offsets if packed else None

    def reference(kind):
        wide = Heads(*(t.to(kind) if isinstance(t, Tensor) and kind == torch.float64 else t for t in heads))
        given = (0.3, None, cu_seqlens, length, padding, wide)
        inputs = [t.to(kind) if packed else t.to(kind).unflatten(0, (2, length)) for t in (qkv, d_out)]
        out, lse = plain_ops.attention_forward(inputs[0], *given)
        d_qkv, _, grads = plain_ops.attention_backward(inputs[1], inputs[0], out, lse, *given, False, True)
        named = zip(("d_q_weight", "d_q_bias", "d_k_weight"), grads, strict=False)
        return {"out": out.view(d_out.shape), "d_qkv": d_qkv.view(qkv.shape), **dict(named)}

    out, lse, d_qkv = poisoned(T, H, E, dtype=dtype), poisoned(H, T), poisoned(*qkv.shape, dtype=dtype)
    d_q_norm, d_k_norm = poisoned(2, E), poisoned(2, E)
    given = (0.3, None, padding, HeadOptions(*heads), cu_seqlens, length, 0 if packed else length)
    attention_forward.attention_forward(qkv, *given, out, lse)
    attention_backward.attention_backward(d_out, qkv, out, lse, *given, d_qkv, None, d_q_norm, d_k_norm)
    found = {"out": out, "d_qkv": d_qkv, "d_q_weight": d_q_norm[0], "d_q_bias": d_q_norm[1], "d_k_weight": d_k_norm[0]}
    plain, truth = reference(dtype), reference(torch.float64)
    for name, got in found.items():
        # a parameter's gradient is a sum over all rows, with the error of a few: of delta, made of the rounded result
        few = 4e-6 if dtype == torch.float32 or name in ("out", "d_qkv") else 2 * torch.finfo(dtype).eps
        check(name, got, plain[name], truth[name], few)


@pytest.mark.parametrize("groups", [1, 7, 300, 1025])
def test_many_partial_sums(groups):
    partials, out = rand(2, groups, 24), poisoned(2, 24)
    reduce.sum_many_partials(partials, out)
    truth = partials.double().sum(1)
    assert float((out.double() - truth).abs().max()) <= 1e-6 * groups


@triton.jit
def _offsets_kernel(out, pointer, seqlen, sequence, head, stride, bias_b, bias_h, first_row, first_col, bias_length):
    """Where the last program of a large problem would read, in elements from the tensors' start."""
    start, _length = attention_tiles.extent(None, seqlen, sequence)
    rows = tl.arange(0, 16)
    at = attention_tiles.offsets_of(seqlen - 16 + rows, stride, 32, 32) + start * stride
    tl.store(out, tl.max(tl.max(at, axis=1), axis=0))
    at = attention_tiles.offsets_of(start + rows, stride, 32, 32)
    tl.store(out + 1, tl.max(tl.max(at, axis=1), axis=0))
    matrix = attention_tiles.bias_matrix(pointer, sequence, head, bias_b, bias_h)
    tile = attention_tiles.bias_tile(
        matrix, first_row, first_col, (first_row + rows)[:, None], (first_col + rows)[None, :], bias_length
    )
    tl.store(out + 2, tl.max(tl.max(tile.to(tl.int64), axis=1), axis=0) - pointer.to(tl.int64))
    tl.store(out + 3, attention_tiles.padding_row(pointer, sequence, seqlen).to(tl.int64) - pointer.to(tl.int64))


def test_attention_offsets_past_two_to_the_31():
    """Address arithmetic alone, nothing that large is allocated: int32 would wrap in each of the four."""
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    pointer = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
    sequence, head = torch.tensor(4095, dtype=torch.int32), 15
    seqlen, stride, L = 2**20, 3 * 16 * 64, 65_520
    kernel_sequence = int(sequence)
    _offsets_kernel[(1,)](out, pointer, seqlen, kernel_sequence, head, stride, 16 * L * L, L * L, L - 16, L - 32, L)
    rows = kernel_sequence * seqlen
    assert out.tolist() == [
        (rows + seqlen - 1) * stride + 63,
        (rows + 15) * stride + 63,
        (kernel_sequence * 16 + head) * L * L + (L - 1) * L + L - 17,
        kernel_sequence * seqlen,
    ]
    assert min(out.tolist()) > 2**31


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", ["own", "float32"])
@pytest.mark.parametrize(("Bb", "Hb"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_attention_bias_gradient(Bb, Hb, bias_dtype, dtype):
    B, L, H, E = 3, 17, 2, 16
    qkv, d_out = rand(B * L, 3, H, E, dtype=dtype), rand(B * L, H, E, dtype=dtype, seed=1)
    bias = rand(Bb, Hb, L, L, dtype=dtype if bias_dtype == "own" else torch.float32, seed=2)
    got = check_attention(qkv, bias, d_out, E**-0.5, [L] * B)
    without = run_attention(qkv, bias, d_out, E**-0.5, [L] * B, bias_gradient=False)
    assert torch.equal(got["d_qkv"], without["d_qkv"])


@pytest.mark.parametrize(("L", "dtype"), [(20, torch.float32), (20, HALF), (65, torch.float32), (130, HALF)], ids=str)
def test_attention_masked(L, dtype):
    """-inf entries, whole rows of them, and a whole column: no NaN, zeros where there is no key."""
    B, H, E = 1, 2, 32
    qkv, d_out = rand(B * L, 3, H, E, dtype=dtype), rand(B * L, H, E, dtype=dtype, seed=1)
    bias = rand(1, H, L, L, seed=2)
    bias[0, :, :, 3] = float("-inf")
    bias[0, 0, 5:18] = float("-inf")
    bias[0, 1, 1, 1:] = float("-inf")
    got = check_attention(qkv, bias, d_out, E**-0.5, [L] * B)
    assert not got["out"][5:18, 0].any()
    assert not got["d_qkv"][5:18, 0, 0].any()
    assert not got["d_bias"][torch.isinf(bias)].any()


@pytest.mark.parametrize(("L", "dtype"), [(64, torch.float32), (64, HALF), (192, HALF), (193, HALF)], ids=str)
def test_attention_large_negative_logits(L, dtype):
    """Logits near -1000 and lengths that leave a remainder of 64: pytorch #196678 has NaN gradients there."""
    E = 64
    qkv, d_out = rand(L, 3, 1, E, dtype=dtype), rand(L, 1, E, dtype=dtype, seed=1)
    qkv[:, 0] += 10
    qkv[:, 1] -= 12.5
    got = run_attention(qkv, None, d_out, E**-0.5, [L])
    assert torch.isfinite(got["out"]).all()
    assert torch.isfinite(got["d_qkv"]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_equal_logits(dtype):
    """Zero queries weigh all keys alike: out is the mean of v, and dK is zero."""
    L, E = 37, 16
    qkv, d_out = rand(L, 3, 1, E, dtype=dtype), rand(L, 1, E, dtype=dtype, seed=1)
    qkv[:, 0] = 0
    got = check_attention(qkv, None, d_out, 1.0, [L])
    assert not got["d_qkv"][:, 1].any()


def test_attention_empty():
    none = poisoned(0, 3, 2, 16)
    out, lse = poisoned(0, 2, 16), poisoned(2, 0)
    bias, d_bias = rand(1, 1, 8, 8), poisoned(1, 1, 8, 8)
    attention_forward.attention_forward(none, 1.0, bias, None, PLAIN, None, 0, 8, out, lse)
    attention_backward.attention_backward(
        out, none, out, lse, 1.0, bias, None, PLAIN, None, 0, 8, none, d_bias, None, None
    )
    assert not d_bias.any()


def patch_reference(images, weight, bias, pos_embed, prefix, scale, shift, d_tokens):
    """tokens and gradients in the weight's dtype; the image's in fp32."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (images, weight)]
    pixels, weight = leaves
    shaped = [t[None, :, None, None] for t in (scale, shift)]
    P = weight.shape[-1]
    projected = F.conv2d((pixels * shaped[0] + shaped[1]).to(weight.dtype), weight, stride=P)
    value = projected.flatten(2).transpose(1, 2)
    if bias is not None:
        value = value + bias.to(value.dtype)
    if pos_embed is not None and pos_embed.shape[0] == value.shape[1]:
        value = value + pos_embed.to(value.dtype)
    if prefix is not None:
        value = torch.cat([prefix.to(value.dtype).expand(len(value), -1, -1), value], 1)
    if pos_embed is not None and pos_embed.shape[0] == value.shape[1] and prefix is not None:
        value = value + pos_embed.to(value.dtype)
    value.backward(d_tokens.to(value.dtype))
    return {"tokens": value.detach(), "d_weight": weight.grad, "d_images": pixels.grad}


PATCH_CASES = [
    # pixels, C, P, size, D, R, position ("", "patches", "all"), memory
    ("uint8", 3, 16, (32, 48), 48, 1, "all", "NCHW"),
    ("uint8", 3, 14, (28, 42), 24, 5, "patches", "NHWC"),
    ("float", 1, 4, (16, 20), 72, 0, "patches", "NCHW"),
    ("float", 4, 7, (22, 15), 33, 2, "", "NHWC"),
    ("float", 2, 32, (32, 64), 16, 1, "", "sliced"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pixels", "C", "P", "size", "D", "R", "position", "memory"), PATCH_CASES)
def test_patch_embed(pixels, C, P, size, D, R, position, memory, dtype):
    B = 2
    images = rand(B, C, *size)
    if pixels == "uint8":
        images = (images * 64 + 128).clamp(0, 255).to(torch.uint8)
    if memory == "NHWC":
        images = images.to(memory_format=torch.channels_last)
    if memory == "sliced":
        images = torch.cat([images, images], 3)[:, :, :, : size[1]]
    N, K = (size[0] // P) * (size[1] // P), C * P * P
    weight, bias = rand(D, C, P, P, dtype=dtype, spread=K**-0.5, seed=1), None if R == 2 else rand(D, seed=2)
    pos_embed = {"": None, "patches": rand(N, D, seed=3), "all": rand(R + N, D, seed=3)}[position]
    prefix = rand(R, D, seed=4) if R else None
    spread = torch.linspace(0.9, 1.1, C, device=DEVICE)
    scale, shift = (spread / 64, -2 * spread) if pixels == "uint8" else (spread, spread / 3)
    d_tokens = rand(B, R + N, D, dtype=dtype, seed=5)

    tokens, d_weight = poisoned(B, R + N, D, dtype=dtype), poisoned(D, C, P, P)
    d_images = poisoned(B, C, *size)
    patch_embed.patch_embed_forward(images, weight, bias, pos_embed, prefix, scale, shift, tokens)
    patch_embed.patch_embed_weight_gradient(images, d_tokens, scale, shift, dtype, d_weight)
    patch_embed.patch_embed_image_gradient(d_tokens, weight, scale, d_images)

    others = (weight, bias, pos_embed, prefix, scale, shift, d_tokens)
    plain = patch_reference(images.float(), *others)
    truth = patch_reference(images.double(), *(None if t is None else t.double() for t in others))
    for name, got in {"tokens": tokens, "d_weight": d_weight, "d_images": d_images}.items():
        check(name, got, plain[name], truth[name])

    rows = poisoned(B * N, K, dtype=dtype)
    patchify.patchify(images, P, scale, shift, rows)
    again, back = poisoned(B, R + N, D, dtype=dtype), poisoned(B, C, *size)
    patchify.assemble_tokens(rows @ weight.flatten(1).T, bias, pos_embed, prefix, again)
    patchify.unpatchify(d_tokens[:, R:].reshape(B * N, D) @ weight.flatten(1), P, scale, back)
    check("assembled", again, plain["tokens"], truth["tokens"])
    check("unpatchified", back, plain["d_images"], truth["d_images"])


def test_patch_embed_empty_batch():
    images, weight = poisoned(0, 3, 8, 8), rand(16, 3, 4, 4)
    ones, tokens, d_weight = torch.ones(3, device=DEVICE), poisoned(0, 4, 16), poisoned(16, 3, 4, 4)
    patch_embed.patch_embed_forward(images, weight, None, None, None, ones, ones, tokens)
    patch_embed.patch_embed_weight_gradient(images, tokens, ones, ones, torch.float32, d_weight)
    patch_embed.patch_embed_image_gradient(tokens, weight, ones, images)
    assert not d_weight.any()


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "K", "N"), [(1, 8, 24), (70, 40, 130), (33, 64, 64)])
def test_mlp(T, K, N, dtype, kind):
    """fc1 with GELU, fc2 with LayerScale, DropPath and residual, and the hidden layer's gradient."""
    x, d_out = rand(T, K, dtype=dtype), rand(T, K, dtype=dtype, seed=1)
    w1, w2 = rand(N, K, dtype=dtype, spread=K**-0.5, seed=2), rand(K, N, dtype=dtype, spread=N**-0.5, seed=3)
    b1, b2 = rand(N, seed=4), rand(K, seed=5)
    scale, drop_path = rand(K, seed=6), torch.linspace(0.5, 2.0, 1 if T % 2 else 2, device=DEVICE)
    residual = rand(T, K, seed=7)
    h, act, d_h, act_again = (poisoned(T, N, dtype=dtype) for _ in range(4))
    total, alone, d_b1 = poisoned(T, K), poisoned(T, K, dtype=dtype), poisoned(N)
    mlp.linear_activation_forward(x, w1, b1, kind, h, act)
    mlp.linear_forward(act, w2, None, alone)
    mlp.linear_residual_forward(act, w2, b2, residual, scale, drop_path, total)
    mlp.hidden_backward(d_out, w2, h, kind, d_h, act_again, d_b1)
    assert torch.equal(act, act_again)
    unfused = poisoned(T, N, dtype=dtype)
    activation.activation_forward(h, kind, unfused)
    assert torch.equal(act, unfused)

    def reference(x, w1, b1, w2, b2, scale, drop_path, residual, d_out):
        hidden = F.linear(x, w1, b1.to(x.dtype))
        hidden.requires_grad_()
        activated = F.gelu(hidden, approximate="tanh" if kind == "gelu_tanh" else "none")
        product = F.linear(activated, w2)
        product.backward(d_out)
        gain = scale * drop_path.repeat_interleave(T // len(drop_path))[:, None]
        total = residual + gain * (product + b2.to(x.dtype)).to(residual.dtype)
        found = {"h": hidden, "act": activated, "alone": product, "total": total, "d_h": hidden.grad}
        return {name: value.detach() for name, value in (found | {"d_b1": hidden.grad.sum(0)}).items()}

    plain, truth = both(reference, x, w1, b1, w2, b2, scale, drop_path, residual, d_out)
    found = {"h": h, "act": act, "alone": alone, "total": total, "d_h": d_h, "d_b1": d_b1}
    for name, got in found.items():
        check(name, got, plain[name], truth[name])


def test_mlp_empty_batch():
    none, weight, d_bias = poisoned(0, 16), rand(16, 16), poisoned(16)
    mlp.linear_forward(none, weight, None, none)
    mlp.hidden_backward(none, weight, none, "gelu", none, None, d_bias)
    assert not d_bias.any()
