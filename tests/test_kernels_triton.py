"""Raw Triton kernels against fp64 PyTorch: on the GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from vitfast.kernels import activation, layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 instead of rounding, and its bf16 products are wrong: there only fp32 and fp16 are tested.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def rand(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * spread).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def check(name: str, got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The kernel's error against fp64 is at most twice plain PyTorch's in the same dtype, with a floor of a few ulp of fp32."""
    assert torch.isfinite(got).all(), name
    floor = 4e-6 * max(float(truth.abs().max()), 1e-3) if truth.numel() else 0.0
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
    # rows, width, images: no power of two, one element, one warp's worth, wider than one tile of 2048
    (6, 1, 2),
    (4, 33, 1),
    (15, 192, 3),
    (10, 768, 5),
    (3, 1280, 3),
    (2, 5000, 1),
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


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D"), [(1, 1), (5, 300), (19, 64)])
def test_activation(kind, dtype, T, D):
    h, d_act = rand(T, D, dtype=dtype, spread=3.0), rand(T, D, dtype=dtype, seed=1)
    h.view(-1)[: min(T * D, 7)] = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e-4, -5.0, 9.0], dtype=dtype)[: T * D]
    out, d_h, act = (poisoned(T, D, dtype=dtype) for _ in range(3))
    d_bias = poisoned(D)
    activation.activation_forward(h, kind, out)
    activation.activation_backward(h, d_act, kind, d_h, act, d_bias)
    assert torch.equal(out, act)
    alone = poisoned(T, D, dtype=dtype)
    activation.activation_backward(h, d_act, kind, alone, None, None)
    assert torch.equal(alone, d_h)

    def reference(h, d_act):
        h = h.clone().requires_grad_()
        act = F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")
        act.backward(d_act)
        return {"act": act.detach(), "d_h": h.grad, "d_bias": h.grad.sum(0)}

    plain, truth = both(reference, h, d_act)
    for name, got in {"act": act, "d_h": d_h, "d_bias": d_bias}.items():
        check(name, got, plain[name], truth[name])


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_activation_over_the_whole_line(kind):
    """fp16 has few enough numbers to try them all: no NaN, and never worse than half an ulp more than the exact value."""
    h = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    h = h[torch.isfinite(h)].to(DEVICE)
    out = torch.empty_like(h)
    activation.activation_forward(h, kind, out)
    truth = F.gelu(h.double(), approximate="tanh" if kind == "gelu_tanh" else "none")
    error = (out.double() - truth).abs()
    assert bool((error <= 2.0**-11 * 1.01 * truth.abs() + 4e-7).all())
