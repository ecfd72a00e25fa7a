"""Raw Triton kernels against fp64 PyTorch: on the GPU where there is one, else in Triton's interpreter (see
conftest.py)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from triton_checks import DEVICE, DTYPES, HALF, both, check, poisoned, rand

from vitfast.kernels import activation, layer_norm, mlp, patch_embed, patchify, reduce
from vitfast.ops.arguments import ACTIVATIONS, POINTWISE
from vitfast.ops.compose import activation_ref


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


@pytest.mark.parametrize("groups", [1, 7, 300, 1025])
def test_many_partial_sums(groups):
    partials, out = rand(2, groups, 24), poisoned(2, 24)
    reduce.sum_many_partials(partials, out)
    truth = partials.double().sum(1)
    assert float((out.double() - truth).abs().max()) <= 1e-6 * groups


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
