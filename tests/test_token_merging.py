"""Token merging against the paper's algorithm in loops, and in whole models."""

import pytest
import torch
from model_checks import PLAIN, assert_same, batch, ours, rel, run, twins


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
