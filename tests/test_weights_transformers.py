"""Weights of transformers' models, and of DINOv2 and DINOv3 as released, give the source's numbers."""

import pytest
import torch
from model_checks import rel
from weights_checks import SMALL, images, shaken, tiny

import vitfast


@pytest.mark.parametrize("names", ["transformers 5", "older"])
def test_hugging_face_weights(tmp_path, names):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
        num_labels=10,
        initializer_range=0.1,
    )
    source = transformers.ViTForImageClassification(config).eval()
    state_dict = source.state_dict()
    if names == "older":  # as the published files are written
        new_to_old = {
            "vit.layers.": "vit.encoder.layer.",
            ".attention.q_proj.": ".attention.attention.query.",
            ".attention.k_proj.": ".attention.attention.key.",
            ".attention.v_proj.": ".attention.attention.value.",
            ".attention.o_proj.": ".attention.output.dense.",
            ".mlp.fc1.": ".intermediate.dense.",
            ".mlp.fc2.": ".output.dense.",
        }
        for new, old in new_to_old.items():
            state_dict = {key.replace(new, old): value for key, value in state_dict.items()}
    torch.save(state_dict, tmp_path / "vit.bin")
    model = vitfast.load_pretrained(tiny(norm_eps=1e-12), tmp_path / "vit.bin")
    assert rel(model(images()), source(images()).logits) <= 1e-5


HF = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}


def hugging_face(kind):
    """A random model of transformers, a name and options of ours, and what to compare."""
    transformers = pytest.importorskip("transformers", minversion="5")
    mlp = {"intermediate_size": 256}
    make = lambda model, config, **options: getattr(transformers, model)(  # noqa: E731
        getattr(transformers, config)(**HF, **options)
    )
    features = {"num_classes": 0}
    if kind == "mae":
        return make("ViTMAEModel", "ViTMAEConfig", **mlp, mask_ratio=0.0), "vit_tiny_patch16_224", {"norm_eps": 1e-12}
    if kind == "dinov2":
        return make("Dinov2Model", "Dinov2Config"), "vit_small_patch14_dinov2", features
    if kind == "dinov2 swiglu":
        options = {"mlp_ratio": 176 / 64, **features}
        return make("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True), "vit_giant_patch14_dinov2", options
    if kind == "dinov2 registers":
        model = make("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig")
        return model, "vit_small_patch14_reg4_dinov2", features
    if kind == "dinov3":
        model = make("DINOv3ViTModel", "DINOv3ViTConfig", **mlp, num_register_tokens=4)
        return model, "vit_small_patch16_dinov3_qkvb", features
    if kind == "dinov3 gated":
        no_bias = {"query_bias": False, "value_bias": False}
        model = make(
            "DINOv3ViTModel",
            "DINOv3ViTConfig",
            **mlp,
            num_register_tokens=4,
            hidden_act="silu",
            use_gated_mlp=True,
            **no_bias,
        )
        return model, "vit_small_plus_patch16_dinov3", features
    if kind == "siglip":
        model = make("SiglipVisionModel", "SiglipVisionConfig", **mlp, hidden_act="gelu_pytorch_tanh")
        return model, "vit_base_patch16_siglip_224", {"activation": "gelu_tanh", **features}
    model = make("CLIPVisionModelWithProjection", "CLIPVisionConfig", **mlp, projection_dim=10)
    return model, "vit_base_patch32_clip_quickgelu_224", {}


@pytest.mark.parametrize(
    "kind",
    ["mae", "dinov2", "dinov2 swiglu", "dinov2 registers", "dinov3", "dinov3 gated", "siglip", "clip"],
)
def test_transformers_models(tmp_path, kind):
    source, name, options = hugging_face(kind)
    source = shaken(source)
    source.save_pretrained(tmp_path)  # as published files are written
    model = vitfast.load_pretrained(name, tmp_path, **SMALL, **options).eval()
    with torch.no_grad():
        theirs = source(images())
        if kind == "clip":
            assert rel(model(images()), theirs.image_embeds) <= 1e-5
        elif kind == "siglip":
            assert rel(model(images()), theirs.pooler_output) <= 1e-5
        elif kind == "mae":  # its encoder shuffles patches
            assert set(model.state_dict()) == set(tiny(num_classes=0).state_dict())
            assert torch.equal(model.blocks[1].attn.qkv.weight[:64], source.layers[1].attention.q_proj.weight)
        else:
            assert rel(model.forward_features(images()), theirs.last_hidden_state) <= 1e-5


def test_dinov2_and_dinov3_as_released(tmp_path):
    model = shaken(vitfast.create_model("vit_giant_patch14_reg4_dinov2", **{**SMALL, "num_classes": 0}))
    weights = {
        key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): v for key, v in model.state_dict().items()
    }
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), weights["pos_embed"]], dim=1)
    weights["mask_token"] = torch.ones(1, 64)
    torch.save(weights, tmp_path / "dinov2.pth")
    loaded = vitfast.load_pretrained("vit_giant_patch14_reg4_dinov2", tmp_path / "dinov2.pth", **SMALL).eval()
    assert rel(loaded(images()), model(images())) <= 1e-5

    model = shaken(vitfast.create_model("vit_small_patch16_dinov3_qkvb", **{**SMALL, "num_classes": 0}))
    weights = {}
    for key, value in model.state_dict().items():
        if key.endswith("attn.q_bias"):
            v_bias = model.state_dict()[key.replace("q_bias", "v_bias")]
            weights[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros(64), v_bias])
            weights[key.replace("q_bias", "qkv.bias_mask")] = torch.ones(192)
        elif not key.endswith("attn.v_bias"):
            key = (
                key.replace("reg_token", "storage_tokens")
                .replace("gamma_1", "ls1.gamma")
                .replace("gamma_2", "ls2.gamma")
            )
            weights[key] = value
    weights |= {"rope_embed.periods": torch.ones(16), "mask_token": torch.ones(1, 64)}
    torch.save({"model": weights}, tmp_path / "dinov3.pth")
    loaded = vitfast.load_pretrained("vit_small_patch16_dinov3_qkvb", tmp_path / "dinov3.pth", **SMALL).eval()
    assert rel(loaded(images()), model(images())) <= 1e-5
