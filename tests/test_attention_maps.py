"""Attention maps are the softmax that timm's unfused attention computes."""

import pytest
import torch
from model_checks import DINO, EVA, MIXED, PLAIN, REG, LowRank, batch, ours, rel, shake, small

import vitfast


@pytest.mark.parametrize("name", [PLAIN, REG, DINO, EVA, MIXED])
def test_attention_maps_are_the_softmax(name):
    import timm
    from timm.layers import set_fused_attn

    set_fused_attn(False)
    try:
        reference = shake(timm.create_model(name, **small(name, depth=3))).eval()
    finally:
        set_fused_attn(True)
    model = vitfast.create_model(name, **small(name, depth=3)).eval()
    model.load_state_dict(reference.state_dict())
    images, _ = batch(model)
    wanted = {}
    for i, block in enumerate(reference.blocks):
        block.attn.attn_drop.register_forward_hook(lambda _m, args, _out, i=i: wanted.__setitem__(i, args[0]))
    reference(images)
    maps = model.attention_maps(images)
    assert list(maps) == [0, 1, 2]
    for i, found in maps.items():
        assert found.shape == wanted[i].shape
        assert rel(found, wanted[i]) <= 1e-5
        assert torch.allclose(found.sum(-1), torch.ones(()))
    ran = []
    model.blocks[2].register_forward_pre_hook(lambda *_: ran.append(2))
    (chosen,) = model.attention_maps(images, layers=[-2], heads=[1]).values()
    assert rel(chosen, wanted[1][:, 1:]) <= 1e-5
    assert ran == []


def test_attention_maps_have_gradients_and_respect_adapters_and_padding():
    model = ours(PLAIN)
    images, _ = batch(model)
    model.attention_maps(images, 1)[1][..., 0, 1:].sum().backward()
    assert model.blocks[1].attn.qkv.weight.grad.any()
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[:, 8:] = True
    (masked,) = model.attention_maps(images, [0], key_padding_mask=padding).values()
    assert not masked[..., 9:].any()
    wanted = model.attention_maps(images, [0])[0]
    model.blocks[0].attn.qkv = LowRank(model.blocks[0].attn.qkv)
    assert rel(model.attention_maps(images, [0])[0], wanted) > 1e-3
