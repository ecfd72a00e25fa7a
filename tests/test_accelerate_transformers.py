"""``vitfast.accelerate`` on transformers' models: what their callers can ask for is answered as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate_checks import HF, HF_DINOV3, Calls, assert_same_step, check_dropout_in_training, error, pair, run, step
from torch import nn

import vitfast
from vitfast.benchmarks.architectures import build, shake

transformers = pytest.importorskip("transformers")

DINOV2 = "facebook/dinov2-base"
SIGLIP = "google/siglip-base-patch16-224"
CLIP = "openai/clip-vit-base-patch32"


@pytest.mark.parametrize("name", [HF, DINOV2, HF_DINOV3, SIGLIP, CLIP])
def test_output_hidden_states(name: str) -> None:
    original, model, inputs = pair(name)
    with Calls() as calls:
        ours = model(**inputs, output_hidden_states=True).hidden_states
    theirs = original(**inputs, output_hidden_states=True).hidden_states
    assert calls["attention"] == 2
    assert len(ours) == len(theirs) == 3
    assert all(error(a, b) <= 1e-5 for a, b in zip(ours, theirs, strict=True))
    with Calls() as calls:  # transformers leaves its recording hooks behind, idle
        run(model, inputs)
    assert calls["attention"] == 2


@pytest.mark.parametrize("name", [HF, HF_DINOV3, SIGLIP])
def test_output_attentions(name: str) -> None:
    original, model, inputs = pair(name)
    for m in (original, model):
        m.set_attn_implementation("eager")
    with Calls() as calls:
        ours = model(**inputs, output_attentions=True).attentions
    assert calls["attention"] == 0
    assert calls["norm_mlp"] == 2
    theirs = original(**inputs, output_attentions=True).attentions
    assert len(ours) == len(theirs) == 2
    assert all(error(a, b) <= 1e-5 for a, b in zip(ours, theirs, strict=True))
    with Calls() as calls:
        plain = run(model, inputs)
    assert calls["attention"] == 2
    assert error(plain, run(original, inputs)) <= 1e-5


def test_a_users_hook_on_attention_fires_beside_the_recorders() -> None:
    original, model, inputs = pair(HF)
    model(**inputs, output_hidden_states=True)
    for m in (original, model):
        m.vit.layers[0].attention.register_forward_hook(lambda _m, _i, out: (out[0] * 2, *out[1:]))
    assert error(run(model, inputs), run(original, inputs)) <= 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [HF, DINOV2])
def test_attention_masks(name: str, implementation: str) -> None:
    original, model, inputs = pair(name)
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[1, 9:] = 0
    for m in (original, model):
        m.set_attn_implementation(implementation)
    with Calls() as calls:
        ours = step(model, inputs, attention_mask=mask)
    assert calls["attention"] == 2
    assert_same_step(ours, step(original, inputs, attention_mask=mask))
    assert error(ours[""], run(original, inputs)) > 1e-3  # the mask does something


def test_somebodys_own_attention_function_is_called() -> None:
    from transformers import AttentionInterface

    seen = []

    def twice(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
        seen.append(module)
        return 2 * nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("twice", twice)
    original, model, inputs = pair(HF)
    for m in (original, model):
        m.set_attn_implementation("twice")
    assert error(run(model, inputs), run(original, inputs)) <= 1e-5
    assert len(seen) == 4
    assert "attn_implementation is 'twice'" in str(vitfast.report(model))


@pytest.mark.parametrize("name", [DINOV2, HF_DINOV3])
def test_drop_path_and_rope_augmentation_in_training(name: str) -> None:
    original, inputs = build(name, small=True, batch=16)
    for layer in original.modules():
        if type(layer).__name__.endswith("Layer"):
            home = __import__(type(layer).__module__, fromlist=["x"])
            kind = getattr(home, "Dinov2DropPath", None) or home.Dinov3ViTDropPath
            layer.drop_path = kind(0.4)
    if name == HF_DINOV3:
        original.config.pos_embed_shift, original.config.pos_embed_jitter = 0.2, 1.5
        original.config.pos_embed_rescale = 2.0
    model = vitfast.accelerate(copy.deepcopy(original)).train()
    original.train()
    with Calls() as calls:
        ours = step(model, inputs)
    after = torch.get_rng_state()
    assert calls["attention"] == 2
    assert_same_step(ours, step(original, inputs))
    assert torch.equal(torch.get_rng_state(), after)
    assert error(ours[""], run(model, inputs, seed=3)) > 1e-2


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_in_training_is_the_originals(rate: str) -> None:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64, **{rate: 0.3}
    )
    original = transformers.ViTModel(config, add_pooling_layer=False)
    shake(original)
    check_dropout_in_training(original, {"pixel_values": torch.randn(2, 3, 64, 64)})


def test_gradient_checkpointing_of_transformers() -> None:
    original, model, inputs = pair(HF)
    for m in (original, model):
        m.gradient_checkpointing_enable()
        m.train()
    with Calls() as calls:
        ours = step(model, inputs)
    assert calls["attention"] == 4  # each layer a second time in backward
    assert_same_step(ours, step(original, inputs))


def test_interpolated_positions_and_masked_patches() -> None:
    original, model, _ = pair(DINOV2)
    for size in ((56, 56), (84, 56)):
        inputs = {
            "pixel_values": torch.randn(2, 3, *size),
            "bool_masked_pos": torch.rand(2, size[0] * size[1] // 196) > 0.5,
        }
        assert_same_step(step(model, inputs), step(original, inputs))


def test_text_towers_are_left() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98},
        vision_config={**text, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    original = transformers.CLIPModel(config).eval()
    shake(original)
    model = vitfast.accelerate(copy.deepcopy(original))
    inputs = {"input_ids": torch.randint(0, 98, (2, 9)), "pixel_values": torch.randn(2, 3, 64, 64)}
    with Calls() as calls:
        ours = model(**inputs)
    theirs = original(**inputs)
    assert calls["attention"] == 2
    assert error(ours.logits_per_image, theirs.logits_per_image) <= 1e-5
    reasons = [row.reason for row in vitfast.report(model).rows if row.path.startswith("text_model")]
    assert reasons == ["a text layer"] * 2


def test_layers_of_older_versions_are_left() -> None:
    """Their forward takes other arguments and returns tuples."""
    original, inputs = build(CLIP, small=True)
    kind = type(original.vision_model.encoder.layers[0])
    forward = kind.forward

    def older(self: Any, hidden_states: Any, attention_mask: Any, causal_mask: Any = None, **kwargs: Any) -> Any:
        return forward(self, hidden_states, attention_mask, **kwargs)

    kind.forward = older
    try:
        vitfast.accelerate(original)
        reasons = {r.reason for r in vitfast.report(original).rows if r.module.endswith("Layer")}
        run(original, inputs)
    finally:
        kind.forward = forward
    assert reasons == {"its forward takes causal_mask: transformers 5 and later are supported"}


def test_a_save_and_load_of_transformers(tmp_path: Any) -> None:
    original, model, inputs = pair(HF)
    model.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, inputs), run(original, inputs))


def test_unpickling_needs_no_accelerate_before(tmp_path: Any) -> None:
    """In a fresh process, and the function is not hidden by a module of its name afterwards."""
    import subprocess
    import sys

    _, model, inputs = pair(SIGLIP)
    torch.save((model, inputs, run(model, inputs)), tmp_path / "model.pt")
    code = (
        "import torch, vitfast\n"
        f"model, inputs, wanted = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(torch.equal(model(**inputs)[0], wanted), vitfast.report(model).accelerated, callable(vitfast.accelerate))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr
