"""The raw C++ CPU kernels (torch.ops.vitfast_C) against plain PyTorch in fp64, on every instruction set this CPU runs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from csrc_checks import CAPABILITIES, HALVES, C, on_each

from vitfast.ops import plain as ops_plain
from vitfast.ops.arguments import ACTIVATIONS, POINTWISE
from vitfast.ops.compose import activation_ref
from vitfast.ops.heads import Heads

# (dtype of the residual stream, compute dtype)
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
FLOOR = 2e-6  # a few fp32 roundings of values of order 1

capability = on_each(CAPABILITIES)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_close_as_torch(
    ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str = "", floor: float = FLOOR
) -> None:
    """Our largest error is at most twice plain PyTorch's in the same dtype, relative to the truth's scale."""
    if truth.numel() == 0:
        assert ours.shape == truth.shape
        return
    scale = max(truth.abs().max().item(), 1e-3)
    error = ((ours.double() - truth).abs().max() / scale).item()
    plain_error = ((plain.double() - truth).abs().max() / scale).item()
    assert error <= 2 * plain_error + floor, f"{name}: error {error:.2e}, plain PyTorch {plain_error:.2e}"


def with_threads(counts, run):
    """run() under each number of threads; the results in a list."""
    results, before = [], torch.get_num_threads()
    for threads in counts:
        torch.set_num_threads(threads)
        try:
            results.append(run())
        finally:
            torch.set_num_threads(before)
    return results


# LayerNorm


def layer_norm_inputs(rows: int, width: int, x_dtype: torch.dtype, y_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "x": (torch.randn(rows, width) * 2 + 3).to(x_dtype),
        "branch": torch.randn(rows, width).to(y_dtype),
        "scale": torch.randn(width),
        "drop_path": torch.tensor([0.0, 1.25]),
        "weight": torch.randn(width),
        "bias": torch.randn(width),
    }


def plain_layer_norm(t, x_dtype, y_dtype, with_branch, with_scale, with_drop_path):
    """Leaves, total and normed with autograd, in the given dtypes."""
    leaves = {name: t[name].to(x_dtype).requires_grad_() for name in ("x", "weight", "bias", "scale")}
    leaves["branch"] = t["branch"].to(y_dtype).requires_grad_()
    total = leaves["x"]
    if with_branch:
        addend = leaves["branch"]
        if with_scale:
            addend = leaves["scale"] * addend
        if with_drop_path:
            rows_per_sample = len(total) // len(t["drop_path"])
            addend = t["drop_path"].to(x_dtype).repeat_interleave(rows_per_sample)[:, None] * addend
        total = (total + addend).to(x_dtype)
    normed = F.layer_norm(total, total.shape[-1:], leaves["weight"], leaves["bias"], 1e-6)
    return leaves, total, normed.to(y_dtype)


ADDITIONS = [(False, False, False), (True, False, False), (True, True, False), (True, True, True), (True, False, True)]


@pytest.mark.parametrize(("x_dtype", "y_dtype"), DTYPES)
@pytest.mark.parametrize(("with_branch", "with_scale", "with_drop_path"), ADDITIONS)
@pytest.mark.parametrize(("rows", "width"), [(6, 768), (98, 67), (2, 5), (0, 64)])
def test_layer_norm(x_dtype, y_dtype, with_branch, with_scale, with_drop_path, rows, width):
    t = layer_norm_inputs(rows, width, x_dtype, y_dtype)
    branch = t["branch"] if with_branch else None
    scale = t["scale"] if with_scale else None
    drop_path = t["drop_path"] if with_drop_path else None
    total = poisoned(rows, width, dtype=x_dtype) if with_branch else None
    normed, mean, rstd = poisoned(rows, width, dtype=y_dtype), poisoned(rows), poisoned(rows)
    C.layer_norm_forward(t["x"], branch, scale, drop_path, t["weight"], t["bias"], 1e-6, total, normed, mean, rstd)
    options = (with_branch, with_scale, with_drop_path)
    truth_leaves, truth_total, truth_normed = plain_layer_norm(t, torch.float64, torch.float64, *options)
    plain_leaves, plain_total, plain_normed = plain_layer_norm(t, x_dtype, y_dtype, *options)
    stored = t["x"]
    if total is not None:
        stored = total
        assert_close_as_torch(total, plain_total, truth_total, "total")
        alone = poisoned(rows, width, dtype=x_dtype)
        C.scale_add_forward(t["x"], branch, scale, drop_path, alone)
        assert torch.equal(alone, total)
    assert_close_as_torch(normed, plain_normed, truth_normed, "normed")
    again = poisoned(rows, width, dtype=y_dtype)
    C.layer_norm_apply(stored, mean, rstd, t["weight"], t["bias"], again)
    assert torch.equal(again, normed)

    d_normed, d_total = torch.randn(rows, width).to(y_dtype), torch.randn(rows, width).to(x_dtype)
    ours = {"x": poisoned(rows, width, dtype=x_dtype), "weight": poisoned(width), "bias": poisoned(width)}
    ours |= {"branch": poisoned(rows, width, dtype=y_dtype)} if with_branch else {}
    ours |= {"scale": poisoned(width)} if with_scale else {}
    inputs = (d_normed, d_total, stored, mean, rstd, t["weight"], branch, scale, drop_path)
    C.layer_norm_backward(*inputs, *(ours.get(name) for name in ("x", "branch", "scale", "weight", "bias")))
    results = []
    for leaves, out, norm in ((truth_leaves, truth_total, truth_normed), (plain_leaves, plain_total, plain_normed)):
        tensors = [leaves[name] for name in ours]
        gradients = [d_normed.to(norm.dtype), d_total.to(out.dtype)]
        results.append(torch.autograd.grad([norm, out], tensors, gradients))
    for name, truth, plain in zip(ours, *results, strict=True):
        assert_close_as_torch(ours[name], plain, truth, f"d_{name}")


def test_layer_norm_statistics_do_not_cancel():
    """A mean of 1e4 with a spread of 1: E[x^2] - E[x]^2 in fp32 would be off by all of the variance."""
    x = torch.randn(4, 512) + 1e4
    normed, mean, rstd = poisoned(4, 512), poisoned(4), poisoned(4)
    C.layer_norm_forward(x, None, None, None, torch.ones(512), torch.zeros(512), 1e-6, None, normed, mean, rstd)
    assert (normed - F.layer_norm(x.double(), (512,))).abs().max() < 5e-3
    assert (rstd - 1 / x.double().std(dim=1, unbiased=False)).abs().max() < 1e-4


def test_layer_norm_backward_repeats_bit_for_bit_for_any_thread_count():
    rows, width = 300, 96
    x, weight, d_normed = torch.randn(rows, width), torch.randn(width), torch.randn(rows, width)
    mean, rstd = x.mean(1), 1 / x.std(1)

    def run():
        d_x, d_weight, d_bias = poisoned(rows, width), poisoned(width), poisoned(width)
        inputs = (d_normed, None, x, mean, rstd, weight, None, None, None)
        C.layer_norm_backward(*inputs, d_x, None, None, d_weight, d_bias)
        return d_x, d_weight, d_bias

    first, *others = with_threads((1, 2, 2), run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Activation


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(70, 200), (3, 37), (0, 8)])
def test_activation(dtype, kind, rows, width):
    columns = 2 * width if kind == "swiglu" else width
    h, d_act = (torch.randn(rows, columns) * 3).to(dtype), torch.randn(rows, width).to(dtype)
    out, again = (poisoned(rows, width, dtype=dtype) for _ in range(2))
    d_h, d_bias = poisoned(rows, columns, dtype=dtype), poisoned(columns)
    C.activation_forward(h, kind, out)
    C.activation_backward(h, d_act, kind, d_h, again, d_bias)
    assert torch.equal(out, again)
    results = []
    for compute in (dtype, torch.float64):
        leaf = h.to(compute).requires_grad_()
        result = activation_ref(leaf, kind)
        results.append((result.detach(), *torch.autograd.grad(result, leaf, d_act.to(compute))))
    (plain, plain_d), (truth, truth_d) = results
    assert_close_as_torch(out, plain, truth, "out")
    assert_close_as_torch(d_h, plain_d, truth_d, "d_h")
    assert_close_as_torch(d_bias, plain_d.float().sum(0), truth_d.sum(0), "d_bias")


@pytest.mark.parametrize("kind", POINTWISE)
def test_activation_over_the_whole_range(kind):
    """fp32 error over [-20, 20]; far out 0 or x itself; NaN stays NaN."""
    h = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([-1e4, -3e38, 1e4, 3e38, float("nan"), 0.0])])[None]
    out, d_h = torch.empty_like(h), torch.empty_like(h)
    C.activation_forward(h, kind, out)
    C.activation_backward(h, torch.ones_like(h), kind, d_h, None, None)
    leaf = h[:, :40001].double().requires_grad_()
    truth = activation_ref(leaf, kind)
    (slope,) = torch.autograd.grad(truth.sum(), leaf)
    assert ((out[:, :40001] - truth).abs() / truth.abs().clamp(min=1)).max() < 3e-7
    assert (d_h[:, :40001] - slope).abs().max() < 5e-7
    assert out[0, 40001:40005].tolist() == pytest.approx([0, 0, 1e4, 3e38])
    assert out[0, 40005].isnan()
    assert d_h[0, 40005].isnan()
    assert out[0, 40006] == 0


@pytest.mark.parametrize("kind", POINTWISE)
def test_activation_of_every_bf16_number(kind):
    """Off by at most 0.55 units in bf16's last place, 0.5 of them the rounding's; below 2e-3 units are those of 2e-3."""
    h = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    h = h[h.abs() < 1e18][None]  # the square of larger ones is no fp32 number
    out, d_h = torch.empty_like(h), torch.empty_like(h)
    C.activation_forward(h, kind, out)
    C.activation_backward(h, torch.ones_like(h), kind, d_h, None, None)
    leaf = h.double().requires_grad_()
    truth = activation_ref(leaf, kind)
    (slope,) = torch.autograd.grad(truth.sum(), leaf)
    unit = 2.0 ** (truth.abs().clamp(min=2e-3).log2().floor() - 7)
    assert ((out - truth).abs() / unit).max() <= 0.55
    assert (d_h - slope).abs().max() < 2**-8 + 3e-4  # slopes reach 1.13, whose unit is 2**-7


# Attention


def plain_attention(q, k, v, scale, bias):
    """q, k, v [H, L, E]: out [H, L, E], lse [H, L]."""
    logits = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


# cos, sin, interleaved, q_norm, k_norm, q's and k's weight and bias, q_eps, k_eps: nothing happens to q and k
PLAIN = (None, None, False, "", "", None, None, None, None, 0.0, 0.0)


def attention(qkv, scale, bias, cu_seqlens, max_seqlen, padding=None, options=PLAIN):
    rows, _, heads, head_dim = qkv.shape
    out, lse = poisoned(rows, heads, head_dim, dtype=qkv.dtype), poisoned(heads, rows)
    C.attention_forward(qkv, scale, bias, padding, *options, cu_seqlens, max_seqlen, out, lse)
    return out, lse


def attention_grad(
    d_out, qkv, out, lse, scale, bias, cu_seqlens, max_seqlen, padding=None, options=PLAIN, d_norms=(None, None)
):
    d_qkv = poisoned(*qkv.shape, dtype=qkv.dtype)
    d_bias = None if bias is None else poisoned(*bias.shape)
    C.attention_backward(
        d_out, qkv, out, lse, scale, bias, padding, *options, cu_seqlens, max_seqlen, d_qkv, d_bias, *d_norms
    )
    return d_qkv, d_bias


def plain_run(qkv, d_out, scale, bias, lengths, dtype):
    """Sequence by sequence in dtype: out, lse, d_qkv, d_bias."""
    leaves = [qkv.to(dtype).requires_grad_()] + ([] if bias is None else [bias.to(dtype).requires_grad_()])
    outs, lses, start = [], [], 0
    for s, length in enumerate(lengths):
        q, k, v = leaves[0][start : start + length].permute(1, 2, 0, 3)
        part = None if bias is None else leaves[1][s if len(bias) > 1 else 0, :, :length, :length]
        out, lse = plain_attention(q, k, v, scale, part)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
        start += length
    out = torch.cat(outs)
    d_qkv, *d_bias = torch.autograd.grad(out, leaves, d_out.to(dtype))
    return out.detach(), torch.cat(lses, 1).detach(), d_qkv, d_bias[0] if d_bias else None


def check_attention(lengths, heads, head_dim, dtype, bias=None, scale=None, spread=1.0):
    rows, max_seqlen = sum(lengths), max(lengths)
    scale = head_dim**-0.5 if scale is None else scale
    qkv = (torch.randn(rows, 3, heads, head_dim) * spread).to(dtype)
    d_out = torch.randn(rows, heads, head_dim).to(dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    out, lse = attention(qkv, scale, bias, cu_seqlens, max_seqlen)
    d_qkv, d_bias = attention_grad(d_out, qkv, out, lse, scale, bias, cu_seqlens, max_seqlen)
    truth = plain_run(qkv, d_out, scale, bias, lengths, torch.float64)
    plain = plain_run(qkv, d_out, scale, bias, lengths, dtype)
    ours = (out, lse, d_qkv, d_bias)
    for name, mine, theirs, right in zip(("out", "lse", "d_qkv", "d_bias"), ours, plain, truth, strict=True):
        if mine is not None:
            assert_close_as_torch(mine, theirs, right, name)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("length", "head_dim"),
    [(197, 64), (1, 64), (2, 1), (17, 33), (50, 72), (65, 80), (37, 7), (5, 256), (130, 128), (16, 16), (300, 40)],
)
def test_attention(dtype, length, head_dim):
    check_attention([length] * 2, 2, head_dim, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias_dtype", HALVES)
@pytest.mark.parametrize(("batches", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("length", [50, 150])
def test_attention_bias(length, dtype, bias_dtype, batches, heads):
    check_attention([length] * 2, 3, 40, dtype, bias=torch.randn(batches, heads, length, length).to(bias_dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_packed_lengths(dtype):
    check_attention([5, 0, 83, 1, 40], 2, 24, dtype)
    check_attention([5, 0, 33, 1], 2, 24, dtype, bias=torch.randn(1, 2, 33, 33))
    check_attention([5, 0, 133, 1, 262], 2, 40, dtype)
    check_attention([5, 0, 133, 1], 2, 40, dtype, bias=torch.randn(1, 2, 133, 133))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_attention_scale(dtype, scale):
    check_attention([33], 2, 16, dtype, scale=scale)
    check_attention([133], 2, 40, dtype, scale=scale)


def test_attention_large_logits():
    """Logits in the hundreds, and all of them at -3000: no overflow, no NaN."""
    check_attention([70], 2, 64, torch.float32, spread=5.0)
    check_attention([70], 2, 64, torch.float32, bias=torch.randn(1, 1, 70, 70) - 3000)


def test_attention_every_remainder():
    """Every length modulo the register tiles and vectors."""
    for length in range(1, 40):
        check_attention([length], 1, 8 + length % 3, HALVES[length % 2])
    for length in range(128, 160):
        check_attention([length], 1, 33 + length % 31, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [45, 145])
def test_attention_masked_keys_and_rows(length, dtype):
    """-inf in the bias takes keys out; a row without any key gives 0, lse -inf and gradients 0."""
    heads, head_dim, keys, empty = 2, 32, length - 15, 7
    bias = torch.randn(1, 1, length, length)
    bias[..., keys:] = float("-inf")
    bias[..., empty, :] = float("-inf")
    qkv = torch.randn(length, 3, heads, head_dim).to(dtype)
    d_out = torch.randn(length, heads, head_dim).to(dtype)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    out, lse = attention(qkv, 0.2, bias, cu_seqlens, length)
    d_qkv, d_bias = attention_grad(d_out, qkv, out, lse, 0.2, bias, cu_seqlens, length)
    assert (out[empty] == 0).all()
    assert (lse[:, empty] == float("-inf")).all()
    assert (d_qkv[empty, 0] == 0).all()
    assert (d_qkv[keys:, 1:] == 0).all()
    assert (d_bias[..., keys:] == 0).all()
    for tensor in (out, d_qkv, d_bias):
        assert tensor.isfinite().all()
    kept = [i for i in range(length) if i != empty]
    q, k, v = qkv.double().permute(1, 2, 0, 3)
    truth, _ = plain_attention(q[:, kept], k[:, :keys], v[:, :keys], 0.2, bias[0, :, kept, :keys].double())
    assert (out[kept].transpose(0, 1) - truth).abs().max() < (2e-6 if dtype == torch.float32 else 3e-2)


def test_attention_rows_at_the_smallest_number():
    """finfo.min as a mask of a whole row is no -inf: the row's weights are equal, as in plain PyTorch."""
    qkv, bias = torch.randn(20, 3, 1, 16), torch.zeros(1, 1, 20, 20)
    bias[..., 4, :] = torch.finfo(torch.float32).min
    out, _ = attention(qkv, 0.25, bias, torch.tensor([0, 20], dtype=torch.int32), 20)
    assert (out[4] - qkv[:, 2].mean(0)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("length", "head_dim"), [(20, 16), (140, 40)])
def test_attention_nan_stays_visible(length, head_dim, dtype):
    qkv = torch.randn(length, 3, 1, head_dim).to(dtype)
    qkv[3, 1] = float("nan")
    out, _ = attention(qkv, 0.25, None, torch.tensor([0, length], dtype=torch.int32), length)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("length", "head_dim"), [(60, 20), (160, 40)])
def test_attention_repeats_bit_for_bit_for_any_thread_count(length, head_dim, dtype):
    qkv, d_out = torch.randn(3 * length, 3, 2, head_dim).to(dtype), torch.randn(3 * length, 2, head_dim).to(dtype)
    bias, cu_seqlens = torch.randn(1, 1, length, length), torch.arange(4, dtype=torch.int32) * length

    def run():
        out, lse = attention(qkv, 0.2, bias, cu_seqlens, length)
        return out, lse, *attention_grad(d_out, qkv, out, lse, 0.2, bias, cu_seqlens, length)

    first, *others = with_threads((1, 2, 2), run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


HEAD_OPTIONS = {
    "half": {"columns": 1, "interleaved": False},
    "interleaved": {"columns": 1, "interleaved": True},
    "half, one angle for a pair": {"columns": 2, "interleaved": False},
    "interleaved, one angle for a pair": {"columns": 2, "interleaved": True},
    "norms": {"columns": 0, "interleaved": False},
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "head_dim"), [(50, 64), (41, 38), (65, 12), (20, 256), (135, 38)])
@pytest.mark.parametrize("options", HEAD_OPTIONS)
def test_attention_heads(options, length, head_dim, packed, dtype):
    """Norm and rotation inside the kernels, beside the plain ones: every vector width with and without a rest."""
    columns, interleaved = HEAD_OPTIONS[options].values()
    lengths = [length, 1, length] if packed else [length] * 2
    rows, heads, prefix = sum(lengths), 2, 0 if packed else length // 3
    scale = head_dim**-0.5
    qkv = torch.randn(rows, 3, heads, head_dim).to(dtype)
    d_out = torch.randn(rows, heads, head_dim).to(dtype)
    cos = sin = None
    if columns:
        angles = torch.randn(rows if packed else length - prefix, head_dim // columns)
        cos, sin = angles.cos(), angles.sin()
    vectors = [torch.randn(head_dim) for _ in range(3)]
    kinds = ("", "") if columns == 1 else ("layer_norm", "rms_norm")
    transform = Heads(cos, sin, interleaved, *kinds, *vectors, None, 1e-5, 1e-5)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    def plain(kind):
        given = (scale, None, cu_seqlens if packed else None, length, None)
        inputs = [t.to(kind) if packed else t.to(kind).unflatten(0, (2, length)) for t in (qkv, d_out)]
        wide = Heads(*(t.to(kind) if isinstance(t, torch.Tensor) and kind == torch.float64 else t for t in transform))
        out, lse = ops_plain.attention_forward(inputs[0], *given, wide)
        d_qkv, _, grads = ops_plain.attention_backward(inputs[1], inputs[0], out, lse, *given, wide, False, True)
        return out.view(d_out.shape), d_qkv.view(qkv.shape), *grads

    d_norms = [poisoned(2, head_dim) if kind else None for kind in kinds]
    out, lse = attention(qkv, scale, None, cu_seqlens, length, options=transform)
    d_qkv, _ = attention_grad(d_out, qkv, out, lse, scale, None, cu_seqlens, length, options=transform, d_norms=d_norms)
    found = (out, d_qkv, *(g for pair in d_norms for g in ((None, None) if pair is None else pair)))
    for name, mine, theirs, right in zip(
        ("out", "d_qkv", "q_weight", "q_bias", "k_weight", "k_bias"),
        found,
        plain(dtype),
        plain(torch.float64),
        strict=True,
    ):
        if right is not None:
            # a sum over all rows has the error of a few of them, in bf16 one rounding of out, which delta is made of
            floor = 4e-3 if dtype == torch.bfloat16 else 4e-6
            assert_close_as_torch(mine, theirs, right, name, floor)


def test_attention_of_nothing():
    for bounds in ([0], [0, 0, 0]):
        qkv, lse = torch.zeros(0, 3, 2, 8), torch.zeros(2, 0)
        out, cu_seqlens = torch.zeros(0, 2, 8), torch.tensor(bounds, dtype=torch.int32)
        C.attention_forward(qkv, 1.0, None, None, *PLAIN, cu_seqlens, 0, out, lse)
        C.attention_backward(
            out, qkv, out, lse, 1.0, None, None, *PLAIN, cu_seqlens, 0, torch.zeros_like(qkv), None, None, None
        )


# Patches


@pytest.mark.parametrize("pixel", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("patch", [14, 16, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_patchify(pixel, dtype, patch, channels_last):
    images = (torch.rand(2, 3, 2 * patch, 3 * patch) * 255).to(pixel)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.rand(3) / 50, torch.randn(3)
    patches = poisoned(12, 3 * patch * patch, dtype=dtype)
    C.patchify(images, patch, scale, shift, patches)
    normal = images.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    truth = F.unfold(normal, patch, stride=patch).transpose(1, 2).reshape(12, -1)
    assert_close_as_torch(patches, truth.to(dtype), truth, "patches")
    if pixel in HALVES:
        d_images = poisoned(2, 3, 2 * patch, 3 * patch, dtype=pixel)
        C.unpatchify(patches, patch, scale, d_images)
        folded = F.fold(patches.double().view(2, 6, -1).transpose(1, 2), images.shape[2:], patch, stride=patch)
        truth = folded * scale.double()[:, None, None]
        assert_close_as_torch(d_images, truth.to(pixel), truth, "d_images")


def test_patchify_special_halves():
    """Subnormal, largest, infinite and NaN fp16 pixels."""
    pixels = torch.tensor([6e-8, -3e-5, 65504.0, float("inf"), -float("inf"), float("nan"), -0.0, 1.0] * 2 + [0.5] * 9)
    images, patches = pixels.half().view(1, 1, 5, 5), poisoned(1, 25)
    C.patchify(images, 5, torch.ones(1), torch.zeros(1), patches)
    torch.testing.assert_close(patches.view(-1), images.float().view(-1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), DTYPES)
@pytest.mark.parametrize("prefixes", [0, 1, 5])
@pytest.mark.parametrize("positions", ["none", "patches", "all"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_assemble_tokens(x_dtype, y_dtype, prefixes, positions, with_bias):
    batch, patches, width = 2, 6, 21
    projected = torch.randn(batch * patches, width).to(y_dtype)
    prefix = torch.randn(prefixes, width) if prefixes else None
    bias = torch.randn(width) if with_bias else None
    rows = {"none": None, "patches": patches, "all": prefixes + patches}[positions]
    pos_embed = None if rows is None else torch.randn(rows, width)
    tokens = poisoned(batch, prefixes + patches, width, dtype=x_dtype)
    C.assemble_tokens(projected, bias, pos_embed, prefix, tokens)
    truth = projected.double().view(batch, patches, width) + (bias if with_bias else 0)
    truth = truth + pos_embed if positions == "patches" else truth
    truth = truth if prefix is None else torch.cat([prefix.double().expand(batch, -1, -1), truth], 1)
    truth = truth + pos_embed if positions == "all" else truth
    assert_close_as_torch(tokens, truth.to(x_dtype), truth)


# Refusals


def cu(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


QKV, OUT, LSE, H = torch.zeros(4, 3, 1, 8), torch.zeros(4, 1, 8), torch.zeros(1, 4), torch.zeros(4, 8)
REFUSALS = {
    "dtype": (lambda: C.activation_forward(H.half(), "gelu", H.half()), "h has dtype Half; allowed"),
    "kind": (lambda: C.activation_forward(H, "relu", H), 'kind is "relu"; allowed: "gelu"'),
    "gate": (lambda: C.activation_forward(H[:, :7].contiguous(), "swiglu", H), "h has 7 columns; swiglu needs"),
    "strides": (lambda: C.activation_forward(H.t(), "gelu", H.t()), "h must be contiguous"),
    "shape": (lambda: C.activation_forward(H, "gelu", H[:3]), r"out has shape \[3, 8\]; needed: \[4, 8\]"),
    "head dim": (
        lambda: C.attention_forward(
            torch.zeros(1, 3, 1, 257), 1.0, None, None, *PLAIN, cu(0, 1), 1, torch.zeros(1, 1, 257), LSE
        ),
        "qkv has head dim 257; allowed: 1 to 256",
    ),
    "rows": (
        lambda: C.attention_forward(QKV, 1.0, None, None, *PLAIN, cu(0, 3), 4, OUT, LSE),
        "cu_seqlens runs from 0 to 3; it must run from 0 to qkv's 4 rows",
    ),
    "length": (
        lambda: C.attention_forward(QKV, 1.0, None, None, *PLAIN, cu(0, 4), 3, OUT, LSE),
        "cu_seqlens gives sequence 0 the length 4; allowed: 0 to max_seqlen, 3",
    ),
    "bias": (
        lambda: C.attention_forward(QKV, 1.0, torch.zeros(2, 1, 4, 4), None, *PLAIN, cu(0, 4), 4, OUT, LSE),
        r"bias has shape \[2, 1, 4, 4\]; its first size must be 1",
    ),
    "padding": (
        lambda: C.attention_forward(QKV, 1.0, None, torch.zeros(2, 4) > 0, *PLAIN, cu(0, 4), 4, OUT, LSE),
        r"padding has shape \[2, 4\]; needed: \[1, 4\]",
    ),
    "rope": (
        lambda: C.attention_forward(
            QKV, 1.0, None, None, QKV[:, 0, 0, :3].clone(), None, *PLAIN[2:], cu(0, 4), 4, OUT, LSE
        ),
        "cos is given but sin is None",
    ),
    "norm": (
        lambda: C.attention_forward(QKV, 1.0, None, None, *PLAIN[:3], "batch_norm", *PLAIN[4:], cu(0, 4), 4, OUT, LSE),
        'q_norm is "batch_norm"; allowed: "", "layer_norm"',
    ),
    "d_bias": (
        lambda: C.attention_backward(
            OUT, QKV, OUT, LSE, 1.0, None, None, *PLAIN, cu(0, 4), 4, QKV, torch.zeros(1, 1, 4, 4), None, None
        ),
        "bias is None; d_bias needs it",
    ),
    "total": (
        lambda: C.layer_norm_forward(H, None, None, None, H[0], H[0], 1e-6, H, H, H[:, 0], H[:, 0]),
        "total is given but branch is None",
    ),
    "patch": (
        lambda: C.patchify(torch.zeros(1, 1, 5, 4), 2, torch.ones(1), torch.ones(1), torch.zeros(4, 4)),
        "height and width must be multiples of patch, 2",
    ),
    "capability": (lambda: C.set_cpu_capability("sse9"), 'capability is "sse9"; allowed'),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_argument(case):
    call, message = REFUSALS[case]
    with pytest.raises(RuntimeError, match=message):
        call()
