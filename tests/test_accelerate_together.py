"""Accelerated models at inference on CPUs: their blocks in one call, the first token alone in the end, and whatever is changed
after the first call is seen by the next."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from accelerate_checks import HF, HF_DINOV3, ONE_EACH, TORCHVISION, VIT, assert_same_step, error, pair, run, step
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vitfast
from vitfast.layers.stack import BlockStack
from vitfast.ops import weight_cache
from vitfast.ops.raw_cpu import CpuKernels

pytest.importorskip("vitfast._C", reason="the extension is not built: python setup.py build_ext --inplace")

# q, k and v apart; a bias joined from three; a gate in one weight, in two
MORE_KINDS = [
    "timm/eva02_tiny_patch14_224",
    "timm/eva_giant_patch14_224",
    "timm/vit_giant_patch14_dinov2",
    "facebook/dinov3-vith16plus-pretrain-lvd1689m",
]


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    yield
    weight_cache.limit_bytes(None)
    weight_cache.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(blocks, first token alone) of each call that ran blocks together."""
    seen: list[tuple[int, bool]] = []
    together = BlockStack.run

    def spy(self: BlockStack, blocks: Any, *args: Any, **options: Any) -> Tensor | None:
        out = together(self, blocks, *args, **options)
        if out is not None:
            seen.append((len(blocks), options.get("first_token", False)))
        return out

    monkeypatch.setattr(BlockStack, "run", spy)
    return seen


def infer(model: nn.Module, inputs: dict[str, Tensor], together: bool = True) -> Tensor:
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if not together:
            patch.setattr(BlockStack, "run", lambda *_, **__: None)
        return run(model, inputs)


def all_tokens(model: Any) -> Any:
    """``model`` with somebody who looks at all tokens behind its blocks."""
    norm = (
        model.encoder.ln if hasattr(model, "encoder") and hasattr(model.encoder, "ln") else getattr(model, "norm", None)
    )
    if norm is not None:
        norm.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", [*ONE_EACH, *MORE_KINDS])
def test_same_bits_as_op_by_op(name: str, mode: str, calls: list[tuple[int, bool]]) -> None:
    if mode != "float32" and torch.bfloat16 not in CpuKernels().own_dtypes:
        pytest.skip("products in bf16 are oneDNN's on this CPU")
    _, model, inputs = pair(name)
    all_tokens(model)
    if mode == "bfloat16":
        model.bfloat16()
        inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
        wanted = infer(model, inputs, together=False)
        assert not calls
        for _ in range(2):  # the second by the plan of the first
            assert torch.equal(infer(model, inputs), wanted)
    assert sum(blocks for blocks, _ in calls) == 4


@pytest.mark.parametrize("name", [VIT, TORCHVISION, "timm/vit_small_patch14_reg4_dinov2"])
def test_the_last_block_makes_the_first_token_alone(name: str, calls: list[tuple[int, bool]]) -> None:
    original, model, inputs = pair(name)
    truth = infer(original.double(), {key: value.double() for key, value in inputs.items()})
    alone = infer(model, inputs)
    assert calls == [(2, True)]
    all_tokens(model)
    every = infer(model, inputs)
    assert calls == [(2, True), (2, False)]
    assert error(alone, truth) <= 2 * error(every, truth) + 1e-7


def test_all_tokens_where_they_are_read(calls: list[tuple[int, bool]]) -> None:
    original, model, inputs = pair(VIT)
    x = inputs["x"]
    with torch.no_grad():
        assert error(model.forward_features(x), original.forward_features(x)) <= 1e-5
        for m in (original, model):
            m.global_pool = "avg"
        assert error(model(x), original(x)) <= 1e-5
        for m in (original, model):
            m.global_pool, m.pool = "token", lambda x: x.amax(1)
        assert error(model(x), original(x)) <= 1e-5
        del original.pool, model.pool
        for m in (original, model):
            m.norm = nn.BatchNorm1d(m.blocks[0].norm1.bias.numel()).eval()
            m.norm.forward = lambda tokens: tokens - tokens.mean(1, keepdim=True)
        assert error(model(x), original(x)) <= 1e-5
    assert calls == [(2, False)] * 4


def _changed(*args: Any) -> Any:
    return args[-1].sin()


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def _own_forward(m: Any) -> None:
    original = m.blocks[1].mlp.fc2.forward
    m.blocks[1].mlp.fc2.forward = lambda x: original(x) * 1.5


def _dropout(m: Any) -> None:
    m.blocks[1].mlp.drop2 = nn.Dropout(1.0)
    m.blocks[1].mlp.drop2.train()


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook inside": lambda m: m.blocks[1].mlp.register_forward_hook(_changed),
    "hook of a block": lambda m: m.blocks[0].register_forward_hook(_changed),
    "hook of the sequence": lambda m: m.blocks.register_forward_hook(_changed),
    "hook behind": lambda m: m.norm.register_forward_hook(_changed),
    "new table of hooks": lambda m: setattr(m.blocks[1].attn, "_forward_hooks", {0: _changed}),
    "layer": lambda m: setattr(m.blocks[0].mlp, "fc1", nn.Sequential(m.blocks[0].mlp.fc1, Sine())),
    "activation": lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()),
    "activation's kind": lambda m: setattr(m.blocks[0].mlp, "act", nn.GELU("tanh")),
    "forward": _own_forward,
    "scale": lambda m: vars(m.blocks[1].attn).update(fused_attn=False, scale=100.0),
    "eps": lambda m: setattr(m.blocks[0].norm2, "eps", 0.5),
    "dropout": _dropout,
    "weight in place": lambda m: m.blocks[1].mlp.fc1.weight.data.mul_(2),
    "bias in place": lambda m: m.blocks[1].attn.qkv.bias.add_(1),
    "no bias": lambda m: setattr(m.blocks[1].attn.proj, "bias", None),
    "new parameter": lambda m: setattr(m.blocks[0].norm1, "weight", nn.Parameter(m.blocks[0].norm1.weight * 3)),
    ".data": lambda m: setattr(m.blocks[0].ls1.gamma, "data", m.blocks[0].ls1.gamma * 2),
    "state dict": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "parametrisation": lambda m: parametrize.register_parametrization(m.blocks[1].attn.proj, "weight", Sine()),
    "fewer blocks": lambda m: setattr(m, "blocks", m.blocks[:1]),
    "another order": lambda m: setattr(m, "blocks", nn.Sequential(*reversed(m.blocks))),
    "a block of another kind": lambda m: m.blocks.append(Sine()),
    "a block left out": lambda m: setattr(m.blocks, "1", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_first_call_is_seen(change: str) -> None:
    original, model, inputs = pair(VIT)
    before = infer(model, inputs)
    for m in (original, model):
        with torch.no_grad():
            CHANGES[change](m)
    expected = infer(original, inputs)
    assert error(expected, before) > 3e-5
    for _ in range(2):
        assert error(infer(model, inputs), expected) <= 1e-5


JOINED: dict[str, Callable[[Any], object]] = {
    "q in place": lambda a: a.q_proj.weight.mul_(2),
    "k new": lambda a: setattr(a.k_proj, "weight", nn.Parameter(a.k_proj.weight * -1)),
    "v's bias": lambda a: a.v_proj.bias.add_(1),
    "v's bias goes": lambda a: setattr(a.v_proj, "bias", None),
    "all of .data": lambda a: a.k_proj.weight.data.mul_(3),
    "scale": lambda a: setattr(a, "scaling", 100.0),
}


@pytest.mark.parametrize("change", JOINED)
@pytest.mark.parametrize("name", [HF, HF_DINOV3])
def test_changes_of_joined_weights_are_seen(name: str, change: str, calls: list[tuple[int, bool]]) -> None:
    original, model, inputs = pair(name)
    before = infer(model, inputs)
    for m in (original, model):
        (attn, *_) = (module for module in m.modules() if hasattr(module, "q_proj"))
        with torch.no_grad():
            JOINED[change](attn)
    expected = infer(original, inputs)
    assert error(expected, before) > 3e-5
    assert error(infer(model, inputs), expected) <= 1e-5
    assert calls == [(1, False)] * 4


def test_another_attention_function_after_the_first_call(calls: list[tuple[int, bool]]) -> None:
    """transformers changes the config for it, and no module."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out * 0.5, weights

    AttentionInterface.register("halved", halved)
    original, model, inputs = pair(HF)
    infer(model, inputs)
    for m in (original, model):
        m.set_attn_implementation("halved")
    assert error(infer(model, inputs), infer(original, inputs)) <= 1e-5
    assert calls == [(1, False)] * 2


@pytest.mark.parametrize("name", ONE_EACH)
def test_copies_files_and_the_original_leave_the_plan_behind(name: str) -> None:
    original, model, inputs = pair(name)
    attributes = [set(vars(module)) for module in original.modules()]
    wanted = infer(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(infer(twin, inputs), wanted)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.1)
        assert not torch.equal(infer(twin, inputs), wanted)
    assert torch.equal(infer(model, inputs), wanted)
    vitfast.restore(model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(infer(model, inputs), infer(original, inputs))


def test_other_backends_and_no_room_for_copies(calls: list[tuple[int, bool]]) -> None:
    original, model, inputs = pair(VIT, backend="torch")
    expected = infer(original, inputs)
    assert error(infer(model, inputs), expected) <= 1e-5
    assert not calls
    vitfast.accelerate(model)
    weight_cache.limit_bytes(0)
    assert error(infer(model, inputs), expected) <= 1e-5
    assert calls == [(2, True)]  # one packed weight in its own dtype is read where it is
    assert weight_cache.size_bytes() == 0
    original, model, inputs = pair(HF)
    assert error(infer(model, inputs), infer(original, inputs)) <= 1e-5
    assert len(calls) == 1


@pytest.mark.parametrize("name", [VIT, HF_DINOV3])
def test_frozen_blocks_while_gradients_are_on(name: str, calls: list[tuple[int, bool]]) -> None:
    original, model, inputs = pair(name)
    for m in (original, model):
        m.train().requires_grad_(False)
        last = [module for module in m.modules() if isinstance(module, nn.LayerNorm)][-1]
        last.requires_grad_(True)
        run(m, inputs).sin().sum().backward()
    frozen = sum(blocks for blocks, _ in calls)
    assert frozen > 0
    grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (original, model)]
    assert len(grads[0]) == len(grads[1]) == 2
    for theirs, ours in zip(*grads, strict=True):
        assert error(ours, theirs) <= 1e-5
    for m in (original, model):
        m.requires_grad_(True)
        m.zero_grad()
        run(m, inputs).sin().sum().backward()
    assert sum(blocks for blocks, _ in calls) == frozen
    for theirs, ours in zip(original.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None and theirs.grad.norm() > 1e-3:
            assert error(ours.grad, theirs.grad) <= 1e-4


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_model_that_ran_goes_away_at_once(name: str) -> None:
    _, model, inputs = pair(name)
    infer(model, inputs)
    gone = [weakref.ref(module) for module in model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(module() for module in gone)
    finally:
        gc.enable()


def test_weights_of_two_dtypes_multiply_in_their_own(calls: list[tuple[int, bool]]) -> None:
    model = vitfast.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    for block in model.blocks:
        block.mlp.bfloat16()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
        assert not calls
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    assert len(calls) == (torch.bfloat16 in CpuKernels().own_dtypes)


def test_slices_of_a_sequence_run_together(calls: list[tuple[int, bool]]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=3, img_size=64).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 17, 192)
    vitfast.accelerate(model)
    with torch.no_grad():
        assert error(model.blocks[1:](x), plain.blocks[1:](x)) <= 1e-5
    assert calls == [(2, False)]
    model.blocks = model.blocks[1:]
    vitfast.accelerate(model, recompute="mlp")
    assert vitfast.report(model).recompute == "mlp"
    assert type(vitfast.restore(model).blocks) is nn.Sequential


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", [*ONE_EACH, *MORE_KINDS])
def test_in_8_bits(name: str, mode: str, calls: list[tuple[int, bool]]) -> None:
    original, model, inputs = pair(name, precision="int8")
    truth = infer(original.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    if mode == "bfloat16":
        model.bfloat16()
        inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
        first = infer(model, inputs)
        assert sum(blocks for blocks, _ in calls) == 2
        assert 1e-4 < error(first, truth) < 5e-2
        joined = ("k_proj.weight", "qkv.weight", "in_proj_weight")
        weight = next(p for name, p in model.named_parameters() if name.endswith(joined))
        with torch.no_grad():
            weight.mul_(-30)
        assert not torch.equal(infer(model, inputs), first)
        vitfast.accelerate(model)
        floats = infer(model, inputs)
        vitfast.accelerate(model, precision="int8")
        assert not torch.equal(infer(model, inputs), floats)


def test_8_bits_only_where_no_gradient_is_wanted_and_all_is_plain(calls: list[tuple[int, bool]]) -> None:
    original, model, inputs = pair(VIT, precision="int8")
    assert_same_step(step(model, inputs), step(original, inputs))
    assert not calls
    floats = vitfast.accelerate(copy.deepcopy(original))
    for m in (model, floats):
        m.train().requires_grad_(False)
    assert torch.equal(infer(model, inputs), infer(floats, inputs))  # training mode
    for m in (model, floats):
        m.eval()
        m.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
        m.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    assert torch.equal(infer(model, inputs), infer(floats, inputs))


def test_8_bits_are_reported_verified_and_checked() -> None:
    original, model, inputs = pair("timm/vit_base_patch16_224", precision="int8")
    assert vitfast.report(model).precision == "int8"
    assert "precision=int8" in vitfast.report(model).summary()
    report = vitfast.verify(model, images=inputs)
    rows = {row.what: row for row in report.rows if row.dtype == "int8"}
    assert set(rows) == {"logits", "top-1 changed"}
    assert 1e-4 < rows["logits"].ours <= 0.1
    assert rows["logits"].plain <= 1e-5
    assert report.error("float32") <= 1e-5  # with gradients: floats
    _, other, inputs = pair(HF, precision="int8")
    assert {row.what for row in vitfast.verify(other, images=inputs).rows if row.dtype == "int8"} == {
        "logits",
        "top-1 changed",
    }
    normed = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, img_size=64, qk_norm=True).eval()
    vitfast.accelerate(normed, precision="int8")
    rows = vitfast.report(normed).rows
    assert {row.reason for row in rows if "Block" in row.module} == {
        "products: floats, for norms of q, k, heads or the hidden layer"
    }
    with torch.device("meta"):
        elsewhere = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, img_size=64)
    vitfast.accelerate(elsewhere, precision="int8")
    assert "products: floats, on meta" in str(vitfast.report(elsewhere))
    with pytest.raises(ValueError, match="precision is 'int4'; allowed are 'float', 'int8'"):
        vitfast.accelerate(original, precision="int4")
    with pytest.raises(ValueError, match="backend is 'torch'; with precision 'int8' allowed are 'auto', 'cpu'"):
        vitfast.accelerate(original, precision="int8", backend="torch")
    assert not vitfast.report(original).accelerated
