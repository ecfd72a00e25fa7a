"""An op's two ways into autograd: PyTorch's dispatcher where someone watches it, and an autograd.Function of its own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate_checks import Calls  # a mode: an op under it goes through the dispatcher
from model_checks import batch, run, small
from op_checks import randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import layer_norm

import vitfast
from vitfast import ops


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(randn(*shape).float().requires_grad_() for shape in ((2, 5, 64), (64,), (64,)))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_base_patch16_dinov3"])
def test_both_ways_give_the_same_bits(name: str, backend: str) -> None:
    model = vitfast.create_model(name, backend=backend, **small(name))
    images, d_logits = batch(model, size=2)
    logits, grads = run(model, images, d_logits)
    with Calls() as calls:
        watched_logits, watched_grads = run(model, images, d_logits)
    assert {"norm_mlp", "attention", "norm_mlp_backward"} <= calls.counts.keys()
    assert torch.equal(logits, watched_logits)
    assert grads.keys() == watched_grads.keys()
    assert all(torch.equal(grads[key], watched_grads[key]) for key in grads)


def test_each_way_is_taken() -> None:
    assert type(ops.layer_norm(*inputs()).grad_fn).__name__ == "vitfast_layer_normBackward"
    with Calls() as calls:
        assert "Generated" in type(ops.layer_norm(*inputs()).grad_fn).__name__
    assert calls["layer_norm"] == 1
    with torch.no_grad():
        assert ops.layer_norm(*inputs()).grad_fn is None
    assert ops.layer_norm(*(t.detach() for t in inputs())).grad_fn is None


def test_the_profiler_sees_the_op() -> None:
    with torch.profiler.profile() as profile:
        ops.layer_norm(*inputs()).sum().backward()
    assert {"vitfast::layer_norm", "vitfast::layer_norm_backward"} <= {e.key for e in profile.key_averages()}


@pytest.mark.parametrize("way", [nullcontext, Calls])
def test_a_result_may_be_changed_in_place(way: Any) -> None:
    x, weight, bias = inputs()
    with way():
        ops.layer_norm(x, weight, bias).mul_(2).square().sum().backward()
    found, x.grad = x.grad, None
    (2 * layer_norm(x, (64,), weight, bias, 1e-6)).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_saved_tensors_can_be_replaced() -> None:
    """As offloading and torch.utils.checkpoint do it."""
    x, weight, bias = inputs()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        kept.append(tensor.clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        y = ops.layer_norm(x, weight, bias)
    assert len(kept) >= 3
    kept[0].zero_()  # what backward reads instead of x
    y.sum().backward()
    found = weight.grad.clone()
    weight.grad = None
    ops.layer_norm(x, weight, bias).sum().backward()
    assert not torch.allclose(found, weight.grad)


def test_frozen_inputs_get_no_gradient() -> None:
    x, weight, bias = inputs()
    ops.layer_norm(x, weight.detach(), bias).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    assert bias.grad is not None


def test_a_second_derivative_says_what_to_do() -> None:
    x, weight, bias = inputs()
    (d_x,) = torch.autograd.grad(ops.layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="composite"):
        d_x.sum().backward()


def test_forward_mode_needs_no_gradients() -> None:
    x, weight, bias = (t.detach() for t in inputs())
    tangent = randn(2, 5, 64, seed=1).float()
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(ops.layer_norm(forward_ad.make_dual(x, tangent), weight, bias)).tangent
    _, wanted = torch.func.jvp(lambda x: layer_norm(x, (64,), weight, bias, 1e-6), (x,), (tangent,))
    torch.testing.assert_close(found, wanted)
