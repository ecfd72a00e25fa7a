"""Packed batches of images of several sizes against each image alone."""

import pytest
import torch
from model_checks import DINO, EVA, MIXED, PLAIN, REG, assert_same, batch, ours, rel, twins


@pytest.mark.parametrize("name", [PLAIN, REG, "vit_base_patch16_siglip_224", DINO, EVA, MIXED])
def test_packed_is_each_image_alone(name):
    model = ours(name, dynamic_img_size=True)
    P = model.patch_embed.patch_size[0]
    generator = torch.Generator().manual_seed(5)
    sizes = [(4, 4), (2, 3), (4, 4), (1, 5), (2, 3)]
    images = [torch.randn(3, rows * P, columns * P, generator=generator) for rows, columns in sizes]
    d_logits = torch.randn(5, 10, generator=generator)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    alone.backward(d_logits)
    wanted = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    packed = model.forward_packed(images)
    packed.backward(d_logits)
    assert_same((packed, {key: p.grad for key, p in model.named_parameters()}), (alone, wanted))


def test_packed_drops_paths_and_attention_of_whole_images():
    model, alone = twins(PLAIN, {"drop_path_rate": 0.5, "attn_drop_rate": 0.1}, {"dynamic_img_size": True})
    images = [torch.randn(3, side, 32, generator=torch.Generator().manual_seed(side)) for side in (32, 48, 64)]
    torch.manual_seed(5)
    drop = model.blocks[1].drop_path1
    factor = drop.sample(torch.empty(9, 4), torch.tensor([0, 2, 5, 9], dtype=torch.int32))
    assert factor.shape == (9,)
    assert all(len(set(part.tolist())) == 1 for part in factor.split([2, 3, 4]))
    assert model.forward_packed(images).isfinite().all()
    model.eval()
    assert rel(model.forward_packed(images), torch.cat([alone(image[None]) for image in images])) <= 1e-5
    attn = model.blocks[0].attn.train()
    attn.attn_drop = 1e-9  # the path that draws, dropping next to nothing: images still do not see each other
    assert rel(model.forward_packed(images), torch.cat([alone(image[None]) for image in images])) <= 1e-5


@pytest.mark.parametrize("name", [DINO])
def test_packed_and_masked_forwards_compile_to_one_graph(name):
    model = ours(name).eval()
    P = model.patch_embed.patch_size[0]
    images = [torch.randn(3, side * P, 2 * P, generator=torch.Generator().manual_seed(side)) for side in (1, 2, 1)]
    torch.compiler.reset()
    packed = torch.compile(model.forward_packed, fullgraph=True, backend="aot_eager")
    assert rel(packed(images), model.forward_packed(images)) <= 1e-6
    whole, _ = batch(model)
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 9:] = True
    masked = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert rel(masked(whole, key_padding_mask=padding), model(whole, key_padding_mask=padding)) <= 1e-6
