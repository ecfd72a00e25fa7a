"""torch.func, forward-mode differentiation and second derivatives through whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate_checks import Calls
from model_checks import rel, shake, small
from pytorch_checks import KINDS, assert_same_step, images, pair, step
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitfast
from vitfast import ops

# Rotary tables are kept from call to call, learned ones are not; attention pooling has its own attention.
OTHERS = ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_ape_224", "vit_base_patch16_siglip_224"]


def loss(parameters: dict[str, Tensor], model: nn.Module, x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).square().mean()


def assert_still_well(model: nn.Module, plain: nn.Module) -> None:
    """No tensor of a transform stayed behind, and the ops run again."""
    with Calls() as calls, torch.no_grad():
        assert rel(model(images()), plain(images())) <= 1e-5
    assert sum(calls.counts.values()) > 0
    assert_same_step(step(model, images()), step(plain, images()))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_takes_other_parameters(kind: str) -> None:
    model, plain = pair(kind)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    ours = functional_call(model, doubled, (images(),))
    assert rel(ours, functional_call(plain, doubled, (images(),))) <= 1e-5
    assert rel(ours, plain(images())) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_grad_and_vjp(kind: str) -> None:
    model, plain = pair(kind)
    parameters = dict(model.named_parameters())
    assert_same_step(grad(loss)(parameters, model, images()), grad(loss)(parameters, plain, images()))
    out, pull = vjp(model, images())
    wanted_out, wanted_pull = vjp(plain, images())
    assert rel(out, wanted_out) <= 1e-5
    assert rel(pull(wanted_out)[0], wanted_pull(wanted_out)[0]) <= 1e-5
    assert_still_well(model, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_sample(kind: str) -> None:
    model, plain = pair(kind)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ours = vmap(grad(loss), in_dims=(None, None, 0))(parameters, model, images(3).unsqueeze(1))
    for i in range(3):
        assert_same_step({n: g[i] for n, g in ours.items()}, grad(loss)(parameters, plain, images(3)[i : i + 1]))
    assert_still_well(model, plain)


def test_vmap_over_an_ensemble() -> None:
    model, plain = pair()
    members = {n: torch.stack([p, 1.1 * p]).detach() for n, p in model.named_parameters()}
    ours = vmap(lambda p, x: functional_call(model, p, (x,)), in_dims=(0, None))(members, images())
    for i in range(2):
        wanted = functional_call(plain, {n: p[i] for n, p in members.items()}, (images(),))
        assert rel(ours[i], wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind: str) -> None:
    """Against the slope between two points in fp64; PyTorch's own fused attention has no forward mode on the CPU."""
    model, plain = pair(kind)
    x, tangent = images(), images(seed=5)
    plain, step_size = plain.double(), 1e-5
    ahead, behind = (plain(x.double() + sign * step_size * tangent.double()) for sign in (1, -1))
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = jvp(model, (x,), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
            again = torch.autograd.forward_ad.unpack_dual(dual).tangent
        with torch.no_grad():
            _, without_grad = jvp(model, (x,), (tangent,))
    for found in (slope, again, without_grad):
        assert rel(found, (ahead - behind) / (2 * step_size)) <= 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_transforms_leave_nothing_behind(name: str) -> None:
    model = shake(vitfast.create_model(name, **small(name))).eval()
    x = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(4))
    transformed = grad(loss)(dict(model.named_parameters()), model, x)
    with sdpa_kernel(SDPBackend.MATH):
        mapped = vmap(model)(x.unsqueeze(1)).squeeze(1)
        jvp(model, (x,), (x,))
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    assert rel(mapped, out) <= 1e-5
    assert_same_step(transformed, {n: p.grad for n, p in model.named_parameters()})


def test_second_derivatives() -> None:
    """By torch.func and by the backend "composite"; by the ops themselves a clear error."""
    config: Any = {**small("vit_tiny_patch16_224"), "depth": 1, "img_size": 32}
    model = shake(vitfast.create_model("vit_tiny_patch16_224", **config)).double()
    composite = vitfast.create_model("vit_tiny_patch16_224", **config, backend="composite").double()
    composite.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    direction = torch.randn_like(x)

    def slope(net: nn.Module, at: Tensor) -> Tensor:
        return torch.autograd.grad(net(at).square().sum(), at, create_graph=True)[0]

    at = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad((slope(composite, at) * direction).sum(), at)
    by_func = grad(lambda x: (grad(lambda y: model(y).square().sum())(x) * direction).sum())(x)
    ahead, behind = (slope(model, (x + s * 1e-5 * direction).requires_grad_()).detach() for s in (1, -1))
    for found in (by_autograd, by_func):
        assert rel(found, (ahead - behind) / 2e-5) <= 1e-7
    with pytest.raises(NotImplementedError, match=r"second derivatives need backend='composite', or .*torch.func.grad"):
        slope(model, at).sum().backward()


def test_hessian_and_jacobian_of_an_op() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 3, 3, 1, 4, dtype=torch.float64, generator=generator)

    def energy(qkv: Tensor) -> Tensor:
        return ops.attention(qkv).square().sum()

    curvature = hessian(energy)(qkv).reshape(36, 36)
    torch.testing.assert_close(curvature, curvature.T)
    torch.testing.assert_close(curvature, jacrev(grad(energy))(qkv).reshape(36, 36))
    at = qkv.clone().requires_grad_()
    (first,) = torch.autograd.grad(energy(at), at)
    torch.testing.assert_close(first, grad(energy)(qkv))


def test_batched_gradients_outside_a_transform() -> None:
    """torch.autograd's vectorised Jacobian runs our backward under vmap, where PyTorch loops over the batch."""
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    found = [
        torch.autograd.functional.jacobian(lambda x: ops.layer_norm(x, weight, bias), x, vectorize=v)
        for v in (True, False)
    ]
    torch.testing.assert_close(*found)
