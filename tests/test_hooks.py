"""Hooks, adapters and replaced parts of a block take part, and leave the other blocks fused."""

import copy

import pytest
import torch
from model_checks import EVA, PLAIN, LowRank, assert_same, batch, ours, pair, rel, run, small

from vitfast.layers.untouched import untouched

PARTS = ["norm1", "attn", "attn.qkv", "attn.proj", "ls1", "drop_path1", "norm2", "mlp", "mlp.fc1", "mlp.fc2", "ls2"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre"])
def test_hooks_on_parts_of_a_block_fire(part, kind):
    model = ours("deit3_small_patch16_224", depth=1)
    images, d_logits = batch(model)
    wanted = run(model, images, d_logits)
    assert untouched(model.blocks[0])
    fired = []
    register = {
        "forward": "register_forward_hook",
        "pre": "register_forward_pre_hook",
        "backward": "register_full_backward_hook",
        "backward_pre": "register_full_backward_pre_hook",
    }[kind]
    handle = getattr(model.blocks[0].get_submodule(part), register)(lambda *_: fired.append(part))
    assert_same(run(model, images, d_logits), wanted, allowed=1e-5)
    assert fired == [part]
    handle.remove()
    assert untouched(model.blocks[0])


@pytest.mark.parametrize("part", ["attn.q_proj", "attn.k_proj", "attn.norm", "mlp.fc1_g", "mlp.fc1_x", "mlp.norm"])
def test_hooks_on_parts_of_an_eva_block_fire(part):
    model = ours(EVA, depth=1)
    images, d_logits = batch(model)
    wanted = run(model, images, d_logits)
    fired = []
    model.blocks[0].get_submodule(part).register_forward_hook(lambda *_: fired.append(part))
    assert_same(run(model, images, d_logits), wanted)
    assert fired == [part]


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_adapters_take_part(part):
    model = ours(PLAIN, depth=1)
    images, d_logits = batch(model)
    before, _ = run(model, images, d_logits)
    parent, name = part.split(".")
    layer = getattr(model.blocks[0], parent)
    adapter = LowRank(getattr(layer, name))
    setattr(layer, name, adapter)
    logits, grads = run(model, images, d_logits)
    assert rel(logits, before) > 1e-3
    assert grads[f"blocks.0.{part}.up.weight"].any()
    merged = adapter.base
    with torch.no_grad():
        merged.weight += adapter.up.weight @ adapter.down.weight
    setattr(layer, name, merged)
    assert rel(model(images), logits) <= 1e-5


def test_parametrised_and_wrapped_parts_take_part():
    model = ours(PLAIN, depth=2)
    images, _ = batch(model)
    doubled, plain = copy.deepcopy(model), copy.deepcopy(model)
    torch.nn.utils.parametrizations.weight_norm(doubled.blocks[0].mlp.fc1)
    with torch.no_grad():
        doubled.blocks[0].mlp.fc1.parametrizations.weight.original0 *= 2
        plain.blocks[0].mlp.fc1.weight *= 2
    assert rel(doubled(images), plain(images)) <= 1e-5
    calls, forward = [], model.blocks[1].mlp.forward
    model.blocks[1].mlp.forward = lambda x: calls.append(1) or forward(x)  # as offloading libraries do
    assert rel(model(images), plain(images)) > 1e-3
    assert calls == [1]


def test_one_hook_leaves_the_other_blocks_fused():
    model = ours(PLAIN)
    model.blocks[0].attn.register_forward_hook(lambda *_: None)
    assert [untouched(block) for block in model.blocks] == [False, True]


def test_hooks_compile_to_one_graph():
    model = ours(PLAIN)
    model.blocks[0].mlp.register_forward_hook(lambda _module, _args, out: 2 * out)
    images, _ = batch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert rel(compiled(images), model(images)) <= 1e-6


def test_hooked_blocks_draw_dropout_as_timm():
    rates = {"proj_drop_rate": 0.1, "drop_path_rate": 0.3}
    reference, model = pair(PLAIN, **small(PLAIN), **rates)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: None)
    images, d_logits = batch(model, 6)
    torch.manual_seed(4)
    wanted = run(reference, images, d_logits)
    torch.manual_seed(4)
    assert_same(run(model, images, d_logits), wanted)
