"""``vitfast.accelerate`` on real architectures: the same numbers, and everything around them as it was."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from accelerate_checks import Calls, assert_same_step, blocks, error, pair, run, step
from torch import nn
from torch.nn.utils import prune

import vitfast
from vitfast.benchmarks.architectures import NAMES, build

VIT = "timm/deit3_base_patch16_224"  # class token, LayerScale
DINOV3 = "timm/vit_small_patch16_dinov3"  # rotary positions, registers
TORCHVISION = "torchvision/vit_b_16"
HF = "google/vit-base-patch16-224"
HF_DINOV3 = "facebook/dinov3-vits16-pretrain-lvd1689m"
ONE_EACH = [VIT, DINOV3, TORCHVISION, HF, HF_DINOV3]

# The same kind as another name once they are small
TWINS = {
    "timm/vit_base_patch16_224",
    "timm/vit_base_patch8_224",
    "timm/vit_so400m_patch14_siglip_224",
    "timm/vit_base_patch14_dinov2",
    "timm/eva02_base_patch14_224",
    "torchvision/vit_l_16",
    "torchvision/vit_b_32",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
NOT_ALL_FUSED = {"timm/vit_base_patch16_rope_mixed_224": "learned for each head"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in TWINS])
def test_parity_and_gradients(name: str) -> None:
    """fp32 within 1e-5, every gradient, and bf16 within 1.2 of the original's own error: what ``verify`` calls passed."""
    model, inputs = build(name, small=True, batch=8)
    vitfast.accelerate(model)
    report = vitfast.verify(model, images=inputs)
    assert report.passed, f"\n{report}"
    worst = {row.worst: row.worst_error for row in report.rows if (row.dtype, row.what) == ("float32", "gradients")}
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("name", [n for n in NAMES if n not in TWINS])
@pytest.mark.parametrize("batch", [1, 10])
def test_every_block_runs_fused(name: str, batch: int) -> None:
    """At inference, where a small batch has its own way with separate q, k and v."""
    original, inputs = build(name, small=True, batch=batch)
    model = copy.deepcopy(original)
    count = len(blocks(model))
    vitfast.accelerate(model)
    with Calls() as calls, torch.no_grad():
        ours = run(model, inputs)
    with torch.no_grad():
        assert error(ours, run(original, inputs)) <= 1e-5
        assert error(run(model, inputs), ours) <= 1e-6  # with nothing watching, ops skip the dispatcher
    rows = [row for row in vitfast.report(model).rows if "attention" in row.fused or "mlp" in row.fused]
    assert len(rows) == count
    if name in NOT_ALL_FUSED:
        assert all(NOT_ALL_FUSED[name] in row.reason for row in rows)
    else:
        assert calls["attention"] + calls["norm_attention"] == count
        assert {row.action for row in rows} == {"replaced"}
    assert calls["norm_mlp"] + calls["norm_linear"] >= count
    assert calls["patch_embed"] == ("naflex" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parity_at_full_width(name: str) -> None:
    model, inputs = build(name)
    for parent in model.modules():  # full width, six blocks: a giant's fp64 step would take minutes otherwise
        for child_name, child in parent.named_children():
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 6 and blocks(child):
                setattr(parent, child_name, child[:6])
    vitfast.accelerate(model)
    report = vitfast.verify(model, images=inputs)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("name", ONE_EACH)
def test_state_class_and_parameters_stay(name: str) -> None:
    original, inputs = build(name, small=True)
    state, text, classes = original.state_dict(), repr(original), [type(m) for m in original.modules()]
    tensors = dict(original.named_parameters())
    model = vitfast.accelerate(original)
    assert model is original
    assert list(model.state_dict()) == list(state)
    assert all(model.state_dict()[k].data_ptr() == v.data_ptr() for k, v in state.items())
    assert all(p is tensors[n] for n, p in model.named_parameters())
    assert repr(model) == text
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    model.load_state_dict(state, strict=True)
    run(model, inputs)
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("name", ONE_EACH)
def test_restore_gives_the_original_bits(name: str) -> None:
    model, inputs = build(name, small=True)
    classes, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    before = run(model, inputs)
    assert not torch.equal(run(vitfast.accelerate(model), inputs), before)  # fp32 rounds differently: ours did run
    assert vitfast.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(run(model, inputs), before)
    assert vitfast.restore(model) is model


@pytest.mark.parametrize("name", ONE_EACH)
def test_copy_pickle_and_save(name: str) -> None:
    _, model, inputs = pair(name, recompute="mlp")
    wanted = run(model, inputs)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]
    for twin in twins:
        assert torch.equal(run(twin, inputs), wanted)
        assert vitfast.report(twin).recompute == "mlp"


@pytest.mark.parametrize("name", [VIT, HF])
def test_optimizer_made_before_still_trains(name: str) -> None:
    original, inputs = build(name, small=True)
    model = copy.deepcopy(original)
    after = []
    for m in (original, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        if m is model:
            vitfast.accelerate(m)
        for _ in range(2):
            optimizer.zero_grad()
            run(m, inputs).square().mean().backward()
            optimizer.step()
        after.append(run(m, inputs))
    assert error(after[1], after[0]) <= 1e-5
    assert error(after[1], run(vitfast.accelerate(build(name, small=True)[0]), inputs)) > 1e-4  # it did move


HOOKED = ["attn", "attn.qkv", "norm1", "ls1", "mlp", "mlp.fc1", "mlp.act", "norm2", "drop_path2"]


@pytest.mark.parametrize("path", HOOKED)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_inside_a_block_fire(path: str, kind: str) -> None:
    original, model, inputs = pair(VIT)
    wanted = step(original, inputs)
    seen = []
    target = model.blocks[0].get_submodule(path)
    handle = getattr(target, f"register_{kind}_hook")(lambda *_: seen.append(path))
    with Calls() as calls:
        ours = step(model, inputs)
    assert seen == [path]
    assert calls["attention"] + calls["norm_mlp"] == 3  # only the hooked half of the first block went its own way
    assert_same_step(ours, wanted)
    handle.remove()
    with Calls() as calls:
        step(model, inputs)
    assert calls["attention"] + calls["norm_mlp"] == 4


def test_a_hook_changes_the_output_as_before() -> None:
    original, model, inputs = pair(VIT)
    for m in (original, model):
        m.blocks[1].attn.register_forward_hook(lambda _m, _i, out: out * 2)
        m.blocks[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
        m.norm.register_forward_hook(lambda _m, _i, out: out - 1)
        m.patch_embed.proj.register_forward_hook(lambda _m, _i, out: out + 0.5)
    assert error(run(model, inputs), run(original, inputs)) <= 1e-5


def test_global_hooks_see_every_module() -> None:
    original, model, inputs = pair(VIT)
    names: list[list[str]] = []
    for m in (original, model):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda mod, *_, s=seen: s.append(type(mod).__name__))
        run(m, inputs)
        handle.remove()
        names.append(seen)
    assert names[0] == names[1]


class Lora(nn.Linear):
    """A linear layer with a low-rank addition, as adapters put it in a model's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(0.1 * torch.randn(4, base.in_features, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, 4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_replaced_layers_are_used_and_reported(path: str, late: bool) -> None:
    original, _ = build(VIT, small=True)
    model = copy.deepcopy(original)
    if late:
        vitfast.accelerate(model)
    for m in (original, model):
        for block in m.blocks:
            parent, name = path.split(".")
            setattr(block.get_submodule(parent), name, Lora(block.get_submodule(path)))
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    vitfast.accelerate(model)
    assert_same_step(step(model, inputs), step(original, inputs))
    rows = [row for row in vitfast.report(model).rows if row.module == "timm.Block"]
    assert {row.action for row in rows} == {"partly replaced"}
    assert all(path in row.reason and "Lora" in row.reason for row in rows)


class WithMask(nn.Module):
    """A backbone inside somebody's model, with a block of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build(VIT, small=True)[0]
        self.backbone.blocks[1].mlp = nn.Sequential(nn.Linear(128, 128), nn.Tanh())
        self.head = nn.Linear(100, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def test_inside_a_bigger_model_with_a_layer_of_its_own() -> None:
    original = WithMask()
    model = vitfast.accelerate(copy.deepcopy(original))
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    assert_same_step(step(model, inputs), step(original, inputs))
    reasons = {row.path: row.reason for row in vitfast.report(model).rows}
    assert reasons["backbone.blocks.1"] == "mlp: mlp is torch.Sequential"
    assert reasons["backbone.blocks.0"] == ""


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)


def old_weight_norm(model: Any) -> None:
    nn.utils.weight_norm(model.blocks[0].mlp.fc1)


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.blocks[0].mlp.fc2, "weight", 0.5)


def own_forward(model: Any) -> None:
    model.blocks[0].attn.forward = lambda x, **_: x * 3


def no_bias(model: Any) -> None:
    model.blocks[0].norm1.register_parameter("bias", None)


def wrapped_tensor(model: Any) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    for block in model.blocks:
        w = block.mlp.fc1.weight.detach()
        block.mlp.fc1.weight = nn.Parameter(TwoTensor(w, w.clone()))


CHANGES = [parametrized, old_weight_norm, pruned, own_forward, no_bias]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_what_others_do_to_a_layer_is_respected(change: Callable[[Any], None], late: bool) -> None:
    original, inputs = build(VIT, small=True)
    model = build(VIT, small=True)[0]
    if late:
        vitfast.accelerate(model)
    change(original)
    change(model)
    vitfast.accelerate(model)
    assert_same_step(step(model, inputs), step(original, inputs))
    partly = [row.path for row in vitfast.report(model).rows if row.action == "partly replaced"]
    assert partly == ["blocks.0"]


def test_wrapping_tensors_go_to_the_original_code() -> None:
    original, model, inputs = pair(VIT)
    wrapped_tensor(original)
    wrapped_tensor(model)
    with torch.no_grad():
        ours, theirs = run(model, inputs), run(original, inputs)
    assert type(ours) is type(theirs)
    assert error(ours.a, theirs.a) <= 1e-5  # type: ignore[attr-defined]
    assert "TwoTensor" in vitfast.report(model).rows[-1].reason


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_drop_path_draws_what_the_original_draws(autocast: bool) -> None:
    original, inputs = build(VIT, small=True, batch=16)
    for i, block in enumerate(original.blocks):
        block.drop_path1, block.drop_path2 = (timm.layers.DropPath(0.3 + 0.2 * i) for _ in range(2))
    model = vitfast.accelerate(copy.deepcopy(original)).train()
    original.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = run(original, inputs)
        after = torch.get_rng_state()
        with Calls() as calls:
            ours = run(model, inputs)
    assert calls["attention"] == 2
    assert torch.equal(torch.get_rng_state(), after)
    assert ours.dtype == theirs.dtype
    # one sample that is dropped on one side only would be an error of order 1
    assert error(ours, theirs) <= (2e-2 if autocast else 1e-5)
    assert error(ours, run(model, inputs, seed=1)) > 0.1


def dropouts(name: str, drop: str) -> Any:
    if name == "timm":
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=64,
            depth=2,
            **{{"attention": "attn_drop_rate", "output": "proj_drop_rate"}[drop]: 0.3},
        )
    rates = {"attention": "attention_dropout", "output": "dropout"}
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, **{rates[drop]: 0.3})


@pytest.mark.parametrize("drop", ["attention", "output"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_dropout_in_training_is_the_originals(library: str, drop: str) -> None:
    original = dropouts(library, drop)
    with torch.no_grad():
        for p in original.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = vitfast.accelerate(copy.deepcopy(original))
    inputs = {"x": torch.randn(4, 3, 64, 64)}
    assert_same_step(step(model.train(), inputs), step(original.train(), inputs))
    with Calls() as calls:
        run(model, inputs)
    assert calls["attention"] == 0
    with Calls() as calls:
        run(model.eval(), inputs)
    assert calls["attention"] == 2
    reasons = [row.reason for row in vitfast.report(model).rows if "attention" in row.fused]
    assert len(reasons) == 2
    assert all("p=0.3 in training" in reason for reason in reasons)


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    padding = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    padding[1, ..., 12:] = False
    return {
        "padding": padding,
        "bool": torch.rand(2, 1, 17, 17, generator=generator) > 0.3,
        "shared": torch.rand(17, 17, generator=generator) > 0.3,
        "float": torch.randn(2, 2, 17, 17, generator=generator),
    }


@pytest.mark.parametrize("kind", list(masks()))
def test_attention_masks(kind: str) -> None:
    original, model, inputs = pair(VIT)
    mask = masks()[kind]
    with Calls() as calls:
        ours = step(model, inputs, attn_mask=mask)
    assert calls["attention"] == 2
    assert_same_step(ours, step(original, inputs, attn_mask=mask))


def test_causal_attention_and_wrong_masks_are_the_originals() -> None:
    original, model, inputs = pair(VIT)
    with Calls() as calls:
        ours = run(model, inputs, is_causal=True)
    assert calls["attention"] == 0
    assert error(ours, run(original, inputs, is_causal=True)) <= 1e-5
    with pytest.raises(RuntimeError):
        run(model, inputs, attn_mask=torch.ones(3, 5))


@pytest.mark.parametrize("name", [VIT, DINOV3])
def test_patch_dropout_and_checkpointing_of_timm(name: str) -> None:
    original, inputs = build(name, small=True)
    if name == VIT:
        original.patch_drop = timm.layers.PatchDropout(0.5, num_prefix_tokens=1)
    else:
        original.patch_drop = timm.layers.PatchDropoutWithIndices(0.5, num_prefix_tokens=5)
    model = vitfast.accelerate(copy.deepcopy(original))
    for m in (original, model):
        m.train()
        m.set_grad_checkpointing()
    assert_same_step(step(model, inputs), step(original, inputs))


@pytest.mark.parametrize("name", [VIT, DINOV3])
def test_intermediates_of_timm(name: str) -> None:
    original, model, inputs = pair(name)
    ours, theirs = (m.forward_intermediates(inputs["x"], indices=[0, 1], norm=True) for m in (model, original))
    assert error(ours[0], theirs[0]) <= 1e-5
    assert all(error(a, b) <= 1e-5 for a, b in zip(ours[1], theirs[1], strict=True))


def test_dynamic_image_size_and_padding_of_timm() -> None:
    original = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True, dynamic_img_pad=True
    ).eval()
    model = vitfast.accelerate(copy.deepcopy(original))
    for size in ((64, 64), (80, 48), (70, 50)):
        inputs = {"x": torch.randn(2, 3, *size)}
        with Calls() as calls:
            ours = run(model, inputs)
        assert calls["patch_embed"] == 1
        assert error(ours, run(original, inputs)) <= 1e-5


def test_wrong_images_raise_what_they_raised() -> None:
    original, model, _ = pair(VIT)
    for images in (torch.randn(2, 3, 60, 64), torch.randn(2, 1, 64, 64), torch.randn(2, 3, 64, 64).double()):
        with pytest.raises((AssertionError, RuntimeError)) as theirs:
            original(images)
        with pytest.raises(type(theirs.value)) as ours:
            model(images)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ONE_EACH)
def test_autocast_gives_the_same_dtypes(name: str, dtype: torch.dtype) -> None:
    original, model, inputs = pair(name)
    got: list[list[torch.dtype]] = []
    for m in (original, model):
        found: list[torch.dtype] = []
        for block in blocks(m):
            block.register_forward_hook(lambda _m, _i, out, f=found: f.append(out.dtype))
        with torch.autocast("cpu", dtype):
            out = run(m, inputs)
        found.append(out.dtype)
        got.append(found)
    assert got[0] == got[1]


def test_half_weights_under_autocast_keep_their_dtype() -> None:
    """A fp32 LayerScale makes the original's residual stream fp32; the next block then meets fp32 where it has bf16."""
    original, model, _ = pair(VIT)
    x = torch.randn(2, 17, 128, dtype=torch.bfloat16)
    found = []
    for m in (original, model):
        block = m.bfloat16().blocks[1]
        block.ls2.float()
        with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
            found.append((block(x).dtype, calls["attention"], calls["norm_mlp"]))
    assert found == [(torch.float32, 0, 0), (torch.float32, 1, 0)]


def test_frozen_backbone_and_gradient_of_the_images() -> None:
    original, model, inputs = pair(VIT)
    found = []
    for m in (original, model):
        m.requires_grad_(False)
        m.head.requires_grad_(True)
        m.blocks[1].attn.proj.weight.requires_grad_(True)
        images = inputs["x"].clone().requires_grad_()
        found.append(step(m, {"x": images}) | {"images": images.grad})
    assert len(found[1]) == 5
    assert_same_step(found[1], found[0])


def test_functional_call_grad_vmap_and_forward_mode() -> None:
    original, model, inputs = pair(VIT)
    parameters = dict(original.named_parameters())

    def loss(p: dict[str, torch.Tensor], m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(m, p, (x,)).square().mean()

    ours = torch.func.grad(loss)(parameters, model, inputs["x"])
    theirs = torch.func.grad(loss)(parameters, original, inputs["x"])
    assert_same_step(ours, theirs)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))
    images = inputs["x"][:, None]
    for name, value in per_sample(parameters, original, images).items():
        torch.testing.assert_close(per_sample(parameters, model, images)[name], value)
        break
    tangent = torch.randn_like(inputs["x"])
    for block in (*model.blocks, *original.blocks):
        block.attn.fused_attn = False  # timm's other path: PyTorch's attention on the CPU has no forward mode
    with torch.autograd.forward_ad.dual_level():
        slopes = [
            torch.autograd.forward_ad.unpack_dual(m(torch.autograd.forward_ad.make_dual(inputs["x"], tangent))).tangent
            for m in (model, original)
        ]
    assert error(slopes[0], slopes[1]) <= 1e-5


def kept_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """What autograd keeps for backward, parameters apart."""
    parameters = {p.data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(model, inputs)
    out.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("name", [VIT, HF])
def test_recompute_keeps_less_and_changes_nothing(name: str) -> None:
    original, inputs = build(name, small=True, batch=16)
    kept = {"original": kept_bytes(original, inputs)}
    wanted = step(original, inputs)
    for recompute in ("none", "fused", "mlp", "block"):
        model = vitfast.accelerate(copy.deepcopy(original), recompute=recompute)
        assert_same_step(step(model, inputs), wanted)
        kept[recompute] = kept_bytes(model, inputs)
    assert kept["original"] > kept["fused"] > kept["mlp"] > kept["block"]
    assert kept["none"] > kept["fused"]


def test_block_recompute_draws_drop_path_once() -> None:
    original, inputs = build(VIT, small=True, batch=8)
    for block in original.blocks:
        block.drop_path1, block.drop_path2 = (timm.layers.DropPath(0.5) for _ in range(2))
    model = vitfast.accelerate(copy.deepcopy(original), recompute="block").train()
    assert_same_step(step(model, inputs), step(original.train(), inputs))


@pytest.mark.parametrize("name", [DINOV3, TORCHVISION, HF_DINOV3])
def test_compiles_to_one_graph(name: str) -> None:
    _, model, inputs = pair(name)
    torch.compiler.reset()
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ours = step(compiled, inputs)
    assert sum("vitfast.attention" in target for target in targets) == 2
    theirs = step(model, inputs)
    assert_same_step({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if "mae" not in n])
def test_every_architecture_compiles(name: str) -> None:
    _, model, inputs = pair(name)
    torch.compiler.reset()
    if "naflex" in name:
        pytest.skip("transformers reads the images' shapes out of a tensor")
    ours = run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert error(ours, run(model, inputs)) <= 1e-6


@pytest.mark.parametrize("name", [VIT, HF])
def test_exports_with_a_dynamic_batch(name: str) -> None:
    _, model, inputs = pair(name)
    (key, images), batch = next(iter(inputs.items())), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={key: {0: batch}} if name == VIT else None)
    graph = program.module()
    assert any("vitfast" in str(node.target) for node in program.graph.nodes)
    sizes = (2, 5, 40) if name == VIT else (2,)
    for size in sizes:
        more = {key: torch.randn(size, *images.shape[1:])}
        assert error(run(graph, more), run(model, more)) <= 1e-5


def test_ddp_and_fsdp(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    original, model, inputs = pair(VIT)
    wanted = step(original, inputs)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        with Calls() as calls:
            ours = step(replicated, inputs)
        assert calls["attention"] == 2
        assert_same_step({name.removeprefix("module."): value for name, value in ours.items()}, wanted)

        mesh = distributed.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with Calls() as calls:
            sharded = step(model, inputs)
        assert calls["attention"] + calls["norm_mlp"] == 4
        full = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in sharded.items()}
        assert_same_step(full, wanted)
        with pytest.raises(ValueError, match=r"blocks.0 was wrapped as FSDPBlock after accelerate"):
            vitfast.restore(model)
    finally:
        distributed.destroy_process_group()


def test_report_is_a_table_and_data() -> None:
    original, model, _ = pair("timm/vit_base_patch16_siglip_224")
    report = vitfast.report(model)
    assert report.accelerated
    assert (report.backend, report.recompute) == ("auto", "fused")
    assert report.count("replaced") == 4
    assert [row.path for row in report.rows if row.action == "left"] == ["attn_pool"]
    assert {"path", "module", "action", "fused", "reason"} == set(report.as_dicts()[0])
    assert "blocks.*" in str(report)
    assert "pooling" in str(report)
    before = vitfast.report(original)
    assert not before.accelerated
    assert {row.action for row in before.rows} == {"left"}
    assert str(before).startswith("VisionTransformer: not accelerated")


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = build(VIT, small=True)
    with caplog.at_level(logging.INFO, "vitfast"):
        vitfast.accelerate(model)
        vitfast.accelerate(model)
        vitfast.accelerate(model, recompute="mlp")
    first, second, third = (record.message for record in caplog.records)
    assert "2 x timm.Block" in first
    assert "already" in second
    assert "recompute=mlp" in third
    assert vitfast.report(model).recompute == "mlp"


def test_unsupported_models_are_named_and_untouched() -> None:
    for model in (
        timm.create_model("resnet18", pretrained=False),
        timm.create_model("swin_tiny_patch4_window7_224", pretrained=False),
        torchvision.models.resnet18(),
        nn.Linear(3, 3),
    ):
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=rf"{type(model).__name__}.*timm VisionTransformer.*torchvision.*DINOv3"):
            vitfast.accelerate(model)
        assert [type(m) for m in model.modules()] == classes
        assert vitfast.restore(model) is model


def test_bad_arguments() -> None:
    model, _ = build(VIT, small=True)
    with pytest.raises(ValueError, match="backend is 'fast'; allowed are"):
        vitfast.accelerate(model, backend="fast")
    with pytest.raises(ValueError, match="recompute is 'all'; allowed are 'none', 'fused', 'mlp', 'block'"):
        vitfast.accelerate(model, recompute="all")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        vitfast.accelerate(model, backend="cuda")
    for call in (vitfast.accelerate, vitfast.report, vitfast.restore):
        with pytest.raises(ValueError, match="model is a str"):
            call("vit")
    assert not vitfast.report(model).accelerated


def test_our_own_models_are_returned_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1)
    classes = [type(m) for m in model.modules()]
    with caplog.at_level(logging.INFO, "vitfast"):
        assert vitfast.accelerate(model) is model
    assert "already" in caplog.text
    assert [type(m) for m in model.modules()] == classes


def test_mixed_devices_are_left_and_reported() -> None:
    model, _ = build(VIT, small=True)
    model.blocks[0].mlp.fc1.to("meta")
    model.blocks[1].to("meta")
    vitfast.accelerate(model)
    rows = {row.path: row for row in vitfast.report(model).rows}
    assert rows["blocks.0"].fused == ("attention",)
    assert "on cpu and meta" in rows["blocks.0"].reason
    assert rows["blocks.1"].action == "replaced"  # it is on one device; where x is elsewhere, its own code complains


class OwnBlock(timm.models.vision_transformer.Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_subclasses_and_other_blocks_are_left() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, block_fn=OwnBlock)
    vitfast.accelerate(model)  # its patches and its norm
    reasons = [row.reason for row in vitfast.report(model).rows if row.module.endswith("OwnBlock")]
    assert reasons == ["a subclass of a known block, which may compute something else"] * 2
    model = timm.create_model("vit_base_patch16_rpn_224", img_size=64, depth=2)
    vitfast.accelerate(model)
    assert [r.reason for r in vitfast.report(model).rows if "ResPost" in r.module] == [
        "a post-norm block: its norms stand behind the branches"
    ] * 2


def test_quantised_and_gated_attention_is_left() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    model.blocks[0].attn.gate = nn.Linear(192, 192)
    model.blocks[1].norm1 = timm.layers.RmsNorm(192)
    original = copy.deepcopy(model)
    vitfast.accelerate(model)
    reasons = {row.path: row.reason for row in vitfast.report(model).rows}
    assert "gate" in reasons["blocks.0"]
    assert "RmsNorm" in reasons["blocks.1"]
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    assert_same_step(step(model, inputs), step(original, inputs))


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_query_and_key_norms(kind: str) -> None:
    norm = timm.layers.LayerNorm if kind == "layer_norm" else timm.layers.RmsNorm
    original = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, qk_norm=True)
    with torch.no_grad():
        for block in original.blocks:
            block.attn.q_norm, block.attn.k_norm = norm(64), norm(64)
        for p in original.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = vitfast.accelerate(copy.deepcopy(original))
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    with Calls() as calls:
        ours = step(model, inputs)
    assert calls["attention"] == 2
    assert_same_step(ours, step(original, inputs))


def test_second_derivatives() -> None:
    _, model, inputs = pair(VIT)
    images = inputs["x"].requires_grad_()
    (slope,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        slope.sum().backward()
    original, model, inputs = pair(VIT, backend="composite")
    found = []
    for m in (original, model):
        for block in m.blocks:
            block.attn.fused_attn = False  # PyTorch's fused attention has no second derivative on the CPU
        images = inputs["x"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(m(images).square().sum(), images, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), images)[0])
    assert error(found[1], found[0]) <= 1e-5
