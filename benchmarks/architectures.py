"""Real architectures of other libraries, by name, with random weights: what ``vitfast.accelerate`` is held to.

Every tensor is random (zero biases, tiny LayerScales and fresh norms would hide a missing term). ``small=True`` keeps the
kind and cuts the cost: two blocks, few heads of the real width, a 4 x 4 or 3 x 3 grid of patches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

# timm name -> overrides that both sizes get
TIMM = (
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch16_224",
    "vit_base_patch8_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_so400m_patch14_siglip_224",
    "vit_base_patch16_siglip_224",
    "deit_small_distilled_patch16_224",
    "deit3_base_patch16_224",
    "vit_base_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "beit3_base_patch16_224",
    "vit_intern300m_patch14_448",
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_base_patch16_rope_mixed_224",
    "vit_pe_core_base_patch16_224",
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
)
TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_h_14")


def _timm(name: str, small: bool, batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import timm

    overrides: dict[str, Any] = {}
    if small:
        with torch.device("meta"):
            like: Any = timm.create_model(name)
        attn = like.blocks[0].attn
        patch = like.patch_embed.patch_size[0]
        overrides = {
            "depth": 2,
            "num_heads": 2,
            "embed_dim": 2 * attn.head_dim,
            "num_classes": 100,
            "img_size": 4 * patch,
        }
        if "siglip" in name or "so400m" in name:
            overrides["num_classes"] = 0
    model: Any = timm.create_model(name, **overrides)
    return model, {"x": torch.randn(batch, 3, *model.patch_embed.img_size)}


def _torchvision(name: str, small: bool, batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from torchvision import models

    if not small:
        model = getattr(models, name)()
    else:
        with torch.device("meta"):
            like = getattr(models, name)()
        attn = like.encoder.layers[0].self_attention
        width = 2 * attn.head_dim
        model = models.VisionTransformer(4 * like.patch_size, like.patch_size, 2, 2, width, 4 * width, num_classes=100)
    return model, {"x": torch.randn(batch, 3, model.image_size, model.image_size)}


def _transformers(
    classes: tuple[str, str], settings: dict[str, Any], small: bool, batch: int
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    config = getattr(transformers, classes[0])(**settings)
    if "ForImageClassification" in classes[1]:
        settings = {**settings, "num_labels": 100}
        config = getattr(transformers, classes[0])(**settings)
    if small:
        head_dim = config.hidden_size // config.num_attention_heads
        reduced = settings | {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 2 * head_dim}
        if hasattr(config, "intermediate_size"):
            reduced["intermediate_size"] = config.intermediate_size * 2 * head_dim // config.hidden_size
        if hasattr(config, "image_size"):
            reduced["image_size"] = 4 * config.patch_size
        if classes[0] == "ViTMAEConfig":
            reduced |= {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
            reduced |= {"decoder_intermediate_size": 128}
        config = getattr(transformers, classes[0])(**reduced)
    model = getattr(transformers, classes[1])(config)
    if "Siglip2" in classes[0]:
        grid = 4 if small else 16
        pixels = torch.randn(batch, grid * grid, 3 * config.patch_size**2)
        mask = torch.ones(batch, grid * grid, dtype=torch.int64)
        mask[-1, grid * (grid - 1) :] = 0  # the last image has one row of patches less
        shapes = torch.tensor([[grid, grid]] * (batch - 1) + [[grid - 1, grid]])
        return model, {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return model, {"pixel_values": torch.randn(batch, 3, config.image_size, config.image_size)}


_BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
_HUGE = {"hidden_size": 1280, "num_attention_heads": 16, "num_hidden_layers": 32, "intermediate_size": 5120}
# the Hub's name: configuration and model class, and the settings that differ from the configuration's defaults
TRANSFORMERS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "google/vit-base-patch16-224": (("ViTConfig", "ViTForImageClassification"), {}),
    "facebook/deit-base-distilled-patch16-224": (("DeiTConfig", "DeiTForImageClassificationWithTeacher"), {}),
    "facebook/dinov2-base": (("Dinov2Config", "Dinov2Model"), {"patch_size": 14, "image_size": 518, **_BASE}),
    "facebook/dinov2-giant": (
        ("Dinov2Config", "Dinov2Model"),
        {
            "patch_size": 14,
            "image_size": 518,
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "num_hidden_layers": 40,
            "use_swiglu_ffn": True,
        },
    ),
    "facebook/dinov2-with-registers-base": (
        ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
        {"patch_size": 14, "image_size": 518, **_BASE},
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        ("DINOv3ViTConfig", "DINOv3ViTModel"),
        {"num_register_tokens": 4, "layerscale_value": 1.0},
    ),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": (
        ("DINOv3ViTConfig", "DINOv3ViTModel"),
        {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu", **_HUGE, "num_attention_heads": 20},
    ),
    "google/siglip-base-patch16-224": (("SiglipVisionConfig", "SiglipVisionModel"), {}),
    "google/siglip2-base-patch16-naflex": (("Siglip2VisionConfig", "Siglip2VisionModel"), {}),
    "openai/clip-vit-base-patch32": (("CLIPVisionConfig", "CLIPVisionModelWithProjection"), {}),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (
        ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
        {"patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024, **_HUGE},
    ),
    "facebook/vit-mae-base": (("ViTMAEConfig", "ViTMAEForPreTraining"), {"mask_ratio": 0.5}),
}

_BUILDERS: dict[str, Any] = (
    {f"timm/{name}": partial(_timm, name) for name in TIMM}
    | {f"torchvision/{name}": partial(_torchvision, name) for name in TORCHVISION}
    | {name: partial(_transformers, *entry) for name, entry in TRANSFORMERS.items()}
)
NAMES = tuple(_BUILDERS)


def build(
    name: str, *, small: bool = False, batch: int = 2, seed: int = 0
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """(model in eval mode with random weights, its inputs by keyword).

    The random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = _BUILDERS[name](small, batch)
        shake(model)
    return model.eval(), inputs


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move every parameter away from its start: vectors by 0.1, the rest by 0.02; LayerScales to 0.5 to 1.5."""
    for name, p in model.named_parameters():
        if "gamma" in name or "lambda1" in name:
            p.uniform_(0.5, 1.5)
        else:
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.02))
