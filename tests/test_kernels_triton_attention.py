"""The raw Triton kernels of attention against fp64 PyTorch: on the GPU where there is one, else in Triton's interpreter (see
conftest.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_checks import DEVICE, DTYPES, HALF, check, poisoned, rand

from vitfast.kernels import attention_backward, attention_forward, attention_tiles, configs
from vitfast.kernels.attention_heads import HeadOptions
from vitfast.ops import plain as plain_ops
from vitfast.ops.heads import Heads

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
