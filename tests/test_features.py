"""Features of the Vision Transformer: against timm where timm has them, otherwise against the plain computation."""

import copy

import pytest
import torch
from model_checks import assert_same, batch, flat, pair, rel, run, shake, small
from torch import nn

import vitfast
from vitfast.layers.untouched import untouched
from vitfast.models.reference import reference_forward

PLAIN, DINO, EVA = "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_base_patch16_clip_224"
REG = "vit_small_patch14_reg4_dinov2"
MIXED = "vit_small_patch16_rope_mixed_224"


def ours(name, **overrides):
    return shake(vitfast.create_model(name, **{**small(name), **overrides}))


def twins(name, first, second):
    """Two models with the same parameters and other options."""
    models = [ours(name, **options) for options in (first, second)]
    models[1].load_state_dict(models[0].state_dict())
    return models


# Hooks and replaced sub-modules


class LowRank(nn.Module):
    """An adapter as libraries put it around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


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


# Image sizes at run time


@pytest.mark.parametrize("name", [PLAIN, REG, DINO, "eva02_tiny_patch14_224", MIXED])
@pytest.mark.parametrize("pad", [False, True])
def test_run_time_image_size(name, pad):
    options = {"dynamic_img_size": True, "dynamic_img_pad": pad}
    reference, model = pair(name, **small(name), **options)
    P = model.patch_embed.patch_size[0]
    for size in [(4 * P, 4 * P), (3 * P, 5 * P), (2 * P + 3, P + 1) if pad else (6 * P, 2 * P)]:
        images, d_logits = batch(model, img_size=size)
        assert_same(run(model, images, d_logits), run(reference, images, d_logits))
        fmt = {"indices": [0], "intermediates_only": True}
        assert (
            rel(model.forward_intermediates(images, **fmt)[0], reference.forward_intermediates(images, **fmt)[0])
            <= 1e-5
        )


def test_positions_of_one_column_of_patches():
    """timm's own numbers are wrong here: it resizes a channels-last tensor, which PyTorch gets wrong at width 1."""
    model = ours(PLAIN, dynamic_img_size=True)
    grid = model.pos_embed[:, 1:].detach().double().transpose(1, 2).unflatten(2, (4, 4)).contiguous()
    wanted = nn.functional.interpolate(grid, size=(6, 1), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert rel(model.positions((6, 1))[:, 1:], wanted) <= 1e-6


def test_padding_of_raw_pixels_is_the_mean_colour():
    options = {"dynamic_img_size": True, "dynamic_img_pad": True}
    raw, plain = twins("deit_tiny_patch16_224", options | {"normalize": True}, options)
    pixels = torch.randint(0, 256, (2, 3, 30, 41), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (plain.config.mean, plain.config.std))
    assert rel(raw(pixels), plain((pixels / 255 - mean) / std)) <= 1e-5


@pytest.mark.parametrize("change", [{"img_size": (80, 48)}, {"patch_size": 8}, {"img_size": 96, "patch_size": 24}])
@pytest.mark.parametrize("name", [PLAIN, "deit3_small_patch16_224", "eva02_base_patch16_clip_224"])
def test_set_input_size(name, change):
    reference, model = pair(name, **small(name))
    model.set_input_size(**change)
    reference.set_input_size(**{key: v if isinstance(v, tuple) else (v, v) for key, v in change.items()})
    images, d_logits = batch(model)
    assert_same(run(model, images, d_logits), run(reference, images, d_logits))
    twin = type(model)(model.config)  # the configuration followed
    twin.load_state_dict(model.state_dict())
    assert rel(twin(images), model(images)) <= 1e-6


# Dropout of patches, attention weights, positions


@pytest.mark.parametrize("name", [PLAIN, REG, DINO, "eva02_tiny_patch14_224", MIXED])
def test_patch_dropout_draws_as_timm(name):
    reference, model = pair(name, **small(name), patch_drop_rate=0.4)
    images, d_logits = batch(model, 4)
    torch.manual_seed(4)
    wanted = run(reference, images, d_logits)
    torch.manual_seed(4)
    assert_same(run(model, images, d_logits), wanted)
    assert model.start(images)[0].shape[1] == model.num_prefix_tokens + 9  # int(16 * 0.6)
    assert rel(model.eval()(images), reference.eval()(images)) <= 1e-5


@pytest.mark.parametrize("name", [PLAIN, EVA, MIXED])
def test_attention_dropout_draws_as_timm(name):
    reference, model = pair(name, **small(name), attn_drop_rate=0.3)
    images, d_logits = batch(model, 4)
    torch.manual_seed(4)
    wanted = run(reference, images, d_logits)
    torch.manual_seed(4)
    got = run(model, images, d_logits)
    assert_same(got, wanted)
    assert rel(model.eval()(images), got[0]) > 1e-3
    assert rel(model(images), reference.eval()(images)) <= 1e-5


@pytest.mark.parametrize("name", [DINO, MIXED])
def test_rope_augmentation_draws_as_timm(name):
    rates = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.3, "rope_rescale_coords": 2.0}
    reference, model = pair(name, **small(name), **rates)
    images, d_logits = batch(model, 4)
    torch.manual_seed(4)
    wanted = run(reference, images, d_logits)
    torch.manual_seed(4)
    got = run(model, images, d_logits)
    assert_same(got, wanted)
    assert rel(model.eval()(images), got[0]) > 1e-4
    assert rel(model(images), reference.eval()(images)) <= 1e-5


# Norms, pooling


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"pos_embed": "none"},
        {"final_norm": False},
        {"pool_include_prefix": True, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"class_token": False, "global_pool": "avgmax", "reg_tokens": 3},
        {"global_pool": "max", "fc_norm": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_match_timm(options):
    reference, model = pair(PLAIN, **small(PLAIN), **options)
    images, d_logits = batch(model)
    assert_same(run(model, images, d_logits), run(reference, images, d_logits))


def test_eva_options_match_timm():
    options = {"qk_norm": True, "global_pool": "avgmax"}
    reference, model = pair(DINO, **small(DINO), **options)
    images, d_logits = batch(model)
    assert_same(run(model, images, d_logits), run(reference, images, d_logits))


# Masks


@pytest.mark.parametrize("kind", ["bool", "float", "per image and head"])
@pytest.mark.parametrize("name", [PLAIN, EVA])
def test_attention_masks_match_timm(name, kind):
    reference, model = pair(name, **small(name))
    images, d_logits = batch(model)
    L = model.num_prefix_tokens + 16
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(2, 2, L, L, generator=generator)
    mask = {"bool": mask[0, 0] > 0.3, "float": mask[0, 0], "per image and head": mask > 0.3}[kind]
    if mask.dtype == torch.bool:
        mask = mask | torch.eye(L, dtype=torch.bool)
    wanted = run(reference, images, d_logits, attn_mask=mask)
    assert_same(run(model, images, d_logits, attn_mask=mask), wanted)
    assert rel(model(images), wanted[0]) > 1e-3
    features = reference.forward_features(images, attn_mask=mask)
    assert rel(model.forward_features(images, attn_mask=mask), features) <= 1e-5
    layers = (
        [m.get_intermediate_layers(images, 1, attn_mask=mask)[0] for m in (model, reference)] if name == PLAIN else []
    )
    assert not layers or rel(*layers) <= 1e-5


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map"])
def test_padding_is_as_if_it_were_not_there(pool):
    """The last two columns of patches are padding; positions are off, so that the rest is an image of its own."""
    options = {"pos_embed": "none", "dynamic_img_size": True, "global_pool": pool}
    model = ours("vit_base_patch16_siglip_224" if pool == "map" else PLAIN, **options)
    images, d_logits = batch(model)
    padding = torch.zeros(2, 4, 4, dtype=torch.bool)
    padding[:, :, 2:] = True
    wanted = run(model, images[..., :32], d_logits)
    assert_same(run(model, images, d_logits, key_padding_mask=padding.flatten(1)), wanted)
    whole = torch.cat([torch.zeros(2, model.num_prefix_tokens, dtype=torch.bool), padding.flatten(1)], 1)
    assert rel(model(images, key_padding_mask=whole), wanted[0]) <= 1e-5


def test_padding_differs_from_image_to_image_and_goes_with_patch_dropout():
    model = ours(PLAIN, pos_embed="none", dynamic_img_size=True, global_pool="avg")
    images, _ = batch(model)
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 4:] = True  # the second image has one row of patches
    logits = model(images, key_padding_mask=padding)
    assert rel(logits[:1], model(images[:1])) <= 1e-5
    assert rel(logits[1:], model(images[1:, :, :16])) <= 1e-5
    model = ours(PLAIN, patch_drop_rate=0.5, global_pool="avg")
    torch.manual_seed(3)
    _, tokens = model.start(images, key_padding_mask=padding)
    assert tokens.padding.shape == (2, 9)
    assert not tokens.padding[:, 0].any()
    assert not tokens.padding[0].any()
    assert tokens.padding[1].any()


# Attention maps


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


# Packed batches


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


# Token merging


def merge_by_loops(x, metric, size, merge, prefix):
    """The paper's algorithm one image and one token at a time."""
    tokens, sizes = [], []
    for x_LD, metric_LE, size_L in zip(x, metric, size, strict=True):
        first, second = [list(range(start, len(x_LD), 2)) for start in (0, 1)]
        first, second = ([i for i in group if i >= prefix] for group in (first, second))
        unit = metric_LE / metric_LE.norm(dim=-1, keepdim=True)
        best = {i: max((float(unit[i] @ unit[j]), j) for j in second) for i in first}
        gone = sorted(first, key=lambda i: -best[i][0])[:merge]
        groups = {j: [j, *[i for i in gone if best[i][1] == j]] for j in second}
        kept = [[i] for i in range(prefix)] + [[i] for i in first if i not in gone] + [groups[j] for j in second]
        total = [sum(size_L[i] for i in group) for group in kept]
        means = [sum(x_LD[i] * size_L[i] for i in group) / n for group, n in zip(kept, total, strict=True)]
        tokens.append(torch.stack(means))
        sizes.append(torch.stack(total))
    return torch.stack(tokens), torch.stack(sizes)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("length", [17, 18])
@pytest.mark.parametrize("merge", [1, 4, 100])
def test_merging_is_the_papers(prefix, length, merge):
    from vitfast.layers.token_merging import merge_tokens

    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, length, 6, generator=generator, dtype=torch.float64)
    metric = torch.randn(3, length, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (3, length), generator=generator).double()
    wanted, sizes = merge_by_loops(x, metric, size, min(merge, (length - prefix) // 2), prefix)
    merged, total = merge_tokens(x, metric, size, merge, prefix)
    assert rel(merged, wanted) <= 1e-12
    assert torch.equal(total, sizes)
    assert torch.equal(total.sum(1), size.sum(1))  # every patch is still in some token


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("name", [PLAIN, "eva_giant_patch14_224"])
def test_token_merging_model(name, pool):
    model = ours(name, global_pool=pool, token_merging=3, depth=3)
    images, d_logits = batch(model)
    x, tokens = model.start(images)
    lengths = []
    for i, block in enumerate(model.blocks):
        x, tokens = model.run_block(i, block, x, tokens)
        lengths.append(x.shape[1])
    assert lengths == [14, 11, 8]
    assert tokens.size.sum(1).tolist() == [17.0, 17.0]
    logits, grads = run(model, images, d_logits)
    assert logits.shape == (2, 10)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert len(grads) == len(list(model.parameters()))
    plain = ours(name, global_pool=pool, depth=3)
    plain.load_state_dict(model.state_dict())  # token merging has no parameters
    assert 1e-4 < rel(logits, plain(images)) < 1.0


def test_identical_patches_merge_without_changing_anything():
    """Proportional attention and weighted pooling: a token of two equal patches counts as both of them."""
    options = {"pos_embed": "none", "global_pool": "avg"}
    merging, plain = twins(PLAIN, options | {"token_merging": 4}, options)
    patch = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    images = patch.repeat(2, 1, 4, 4)
    assert rel(merging(images), plain(images)) <= 1e-5
    maps = merging.attention_maps(images, [1], heads=[0])[1]
    assert maps.shape == (2, 1, 13, 13)
    assert torch.allclose(maps.sum(-1), torch.ones(()))


def test_token_merging_compiles_and_respects_hooks():
    model = ours(PLAIN, token_merging=3)
    images, d_logits = batch(model)
    wanted = run(model, images, d_logits)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert rel(compiled(images), wanted[0]) <= 1e-6
    fired = []
    model.blocks[0].attn.register_forward_hook(lambda *_: fired.append(1))
    assert_same(run(model, images, d_logits), wanted)
    assert fired == [1]


# What the model offers around its forward


def test_prune_intermediate_layers():
    reference, model = pair(PLAIN, **small(PLAIN, depth=3))
    images, _ = batch(model)
    wanted = reference.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == list(reference.prune_intermediate_layers([0, 1]))
    assert len(model.blocks) == model.config.depth == 2
    assert rel(model(images), reference(images)) <= 1e-5
    for got, value in zip(model.forward_intermediates(images, intermediates_only=True), wanted, strict=True):
        assert rel(got, value) <= 1e-5
    model.prune_intermediate_layers(1, prune_norm=True)
    assert isinstance(model.norm, nn.Identity)
    assert type(model)(model.config).load_state_dict(model.state_dict())


def test_intermediates_as_a_dictionary():
    reference, model = pair(REG, **small(REG))
    images, _ = batch(model)
    options = {"output_dict": True, "return_prefix_tokens": True, "indices": 1}
    found, wanted = model.forward_intermediates(images, **options), reference.forward_intermediates(images, **options)
    assert set(found) == set(wanted)
    assert rel(found["image_features"], wanted["image_features"]) <= 1e-5
    for key in ("image_intermediates", "image_intermediates_prefix"):
        assert rel(found[key][0], wanted[key][0]) <= 1e-5


@pytest.mark.parametrize("name", [MIXED, DINO])
def test_optimizer_interface_of_eva_models(name):
    reference, model = pair(name, **small(name))
    assert model.no_weight_decay() == set(reference.no_weight_decay())
    assert model.group_matcher() == reference.group_matcher()


def test_reset_classifier_is_in_the_configuration():
    model = ours(PLAIN, representation_size=24)
    model.reset_classifier(3, "avg")
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    images, _ = batch(model)
    model.head.weight.data.normal_()
    twin.load_state_dict(model.state_dict())
    assert rel(twin(images), model(images)) <= 1e-6


@pytest.mark.parametrize(
    "name",
    [
        PLAIN,
        REG,
        DINO,
        EVA,
        MIXED,
        "vit_giant_patch14_dinov2",
        "beit3_base_patch16_224",
        "vit_pe_core_tiny_patch16_384",
    ],
)
def test_plain_reference_is_the_model(name):
    model = ours(name).eval()
    images, _ = batch(model)
    assert rel(model(images), reference_forward(model, images)) <= 1e-5


@pytest.mark.parametrize(
    "name", [EVA, *(pytest.param(name, marks=pytest.mark.slow) for name in (DINO, MIXED, "vit_giant_patch14_dinov2"))]
)
def test_new_kinds_compile_and_recompute(name):
    model = ours(name)
    images, d_logits = batch(model)
    wanted = run(model, images, d_logits)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert rel(compiled(images), wanted[0]) <= 1e-6
    model.recompute = "block"
    got = run(model, images, d_logits)
    assert rel(flat(got[1]), flat(wanted[1])) <= 1e-6


def test_rotary_tables_do_not_leak_between_modes():
    model = ours(DINO)
    images, d_logits = batch(model)
    with torch.inference_mode():
        wanted = model(images)
    assert rel(run(model, images, d_logits)[0], wanted) <= 1e-6  # cached tables of inference mode could not be saved
    assert len(model.rope._cache) == 1
    assert rel(copy.deepcopy(model)(images), wanted) <= 1e-6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (PLAIN, {"mlp_layer": "glu"}, "mlp_layer must be one of 'mlp', 'swiglu_packed', 'swiglu', got 'glu'"),
        (PLAIN, {"qkv_layout": "split"}, "qkv_layout must be one of 'fused', 'split_bias', 'separate', got 'split'"),
        (PLAIN, {"block": "beit"}, "block must be one of 'vit', 'eva', got 'beit'"),
        (PLAIN, {"pos_embed": "sincos"}, "pos_embed must be one of 'learn', 'none', got 'sincos'"),
        (PLAIN, {"rope_type": "axial"}, "rope_type must be one of .*got 'axial'"),
        (PLAIN, {"patch_drop_rate": 1.0}, r"patch_drop_rate must be in \[0, 1\), got 1.0"),
        (PLAIN, {"attn_drop_rate": -0.1}, r"attn_drop_rate must be in \[0, 1\), got -0.1"),
        (PLAIN, {"token_merging": -1}, "token_merging must be an integer of at least 0, got -1"),
        (PLAIN, {"dynamic_img_pad": True}, "dynamic_img_pad=True needs dynamic_img_size=True"),
        (DINO, {"token_merging": 4}, "token_merging needs rope_type=None"),
        (DINO, {"rope_jitter_coords": 0.5}, "rope_jitter_coords must be at least 1 and finite, got 0.5"),
        (DINO, {"rope_temperature": 0.0}, "rope_temperature must be above 0, got 0.0"),
        (DINO, {"num_heads": 64}, "rope_type needs heads of a multiple of 4, got 384 / 64"),
        (DINO, {"ref_feat_shape": 14}, "ref_feat_shape is for rope_type='cat', got 'dinov3'"),
        (MIXED, {"rope_rotate_half": True}, "rope_rotate_half=True does not go with rope_type='mixed'"),
        (PLAIN, {"attn_pool_num_heads": 5}, "attn_pool_num_heads must divide embed_dim, got 5 and 192"),
    ],
)
def test_bad_settings_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        vitfast.create_model(name, **options)


def test_bad_input_is_named():
    model = ours(PLAIN, dynamic_img_size=True)
    images, _ = batch(model)
    with pytest.raises(ValueError, match=r"multiples of the patch size 16 .*got \(32, 30\)"):
        model(images[:, :, :32, :30])
    with pytest.raises(ValueError, match=r"key_padding_mask must be bool of shape \(2, 16\) or \(2, 17\), got torch.f"):
        model(images, key_padding_mask=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"layers must name blocks of 0\.\.1 "):
        model.attention_maps(images, [2])
    with pytest.raises(ValueError, match=r"heads must be numbers of 0..1 .*got \[2\]"):
        model.attention_maps(images, heads=[2])
    with pytest.raises(ValueError, match="at least one image, got none"):
        model.forward_packed([])
    with pytest.raises(ValueError, match=r"images\[1\] must be \[C, H, W\], got shape \(1, 3, 32, 32\)"):
        model.forward_packed([images[0], images[:1, :, :32, :32]])
    with pytest.raises(ValueError, match=r"images\[0\] must be multiples of the patch size 16"):
        model.forward_packed([images[0, :, :30]])
    with pytest.raises(ValueError, match="patch_size must be one number"):
        model.set_input_size(patch_size=(8, 16))
    merging = ours(PLAIN, token_merging=2)
    for call, message in [
        (lambda: merging.forward_packed([images[0]]), "forward_packed does not go with token_merging"),
        (lambda: merging.forward_intermediates(images), "output_fmt must be 'NLC' where tokens are merged"),
        (lambda: merging(images, key_padding_mask=torch.zeros(2, 16).bool()), "does not go with token_merging"),
        (lambda: reference_forward(merging, images), "no plain reference for MergingBlock"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    dropping = ours(PLAIN, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="attn_mask does not go with patch_drop_rate"):
        dropping(images, attn_mask=torch.zeros(17, 17))


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
