"""The Vision Transformers by name: a row per model, in families that share settings. Names and values are timm's."""

from typing import Any

from vitfast.models.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, ViTConfig
from vitfast.models.table_eva import EVA_CONFIGS
from vitfast.models.table_rows import family

IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
ZERO_ONE = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
CLIP = {"mean": CLIP_MEAN, "std": CLIP_STD, "pre_norm": True, "norm_eps": 1e-5}
DEIT3 = {**IMAGENET, "init_values": 1e-6, "no_embed_class": True}
DINOV2 = {**IMAGENET, "init_values": 1e-5, "crop_pct": 1.0}
DINOV2_REG = {**DINOV2, "reg_tokens": 4, "no_embed_class": True}
TIPS = {**ZERO_ONE, "init_values": 1.0, "reg_tokens": 1, "no_embed_class": True}
_SQUASH = {"crop_mode": "squash"}
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}  # average pooling after the final norm
MAP = {"class_token": False, "global_pool": "map"}
TANH = {"activation": "gelu_tanh"}
QUICK = {"activation": "quick_gelu"}
SWIGLU_GIANT = {"embed_dim": 1536, "num_heads": 24, "mlp_ratio": 2.66667, "mlp_layer": "swiglu_packed"}
SBB = {
    "class_token": False,
    "global_pool": "avg",
    "init_values": 1e-5,
    "no_embed_class": True,
}  # "searching better ViTs"
SMALL_IMAGES = {"class_token": False, "global_pool": "avg", "crop_pct": 1.0}

CONFIGS: dict[str, ViTConfig] = {}


def _family(shared: dict[str, Any], **rows: tuple) -> None:
    CONFIGS.update(family(shared, **rows))


# Dosovitskiy et al. 2021 (base, large, huge); Steiner et al. 2022 (tiny, small); Zhai et al. 2022 (giant, gigantic)
_family(
    {},
    vit_tiny_patch16_224=("tiny", 16, 224),
    vit_tiny_patch16_384=("tiny", 16, 384, 1.0),
    vit_tiny_patch32_224=("tiny", 32, 224),  # this one and the next are not in timm's table
    vit_tiny_patch32_384=("tiny", 32, 384, 1.0),
    vit_small_patch8_224=("small", 8, 224, 0.9, IMAGENET),
    vit_small_patch16_224=("small", 16, 224),
    vit_small_patch16_384=("small", 16, 384, 1.0),
    vit_small_patch16_36x1_224=("small36", 16, 224, 0.9, {"init_values": 1e-5}),
    vit_small_patch32_224=("small", 32, 224),
    vit_small_patch32_384=("small", 32, 384, 1.0),
    vit_base_patch8_224=("base", 8, 224),
    vit_base_patch16_224=("base", 16, 224),
    vit_base_patch16_384=("base", 16, 384, 1.0),
    vit_base_patch16_224_miil=("base", 16, 224, 0.875, {"qkv_bias": False}, ZERO_ONE, {"interpolation": "bilinear"}),
    vit_base_patch16_gap_224=("base48", 16, 224, 0.9, GAP),
    vit_base_patch16_plus_240=("plus", 16, 240, 0.95, {"init_values": 1e-5}),
    vit_base_patch32_224=("base", 32, 224),
    vit_base_patch32_384=("base", 32, 384, 1.0),
    vit_base_patch32_plus_256=("plus", 32, 256, 0.95, {"init_values": 1e-5}),
    vit_large_patch14_224=("large", 14, 224),
    vit_large_patch16_224=("large", 16, 224),
    vit_large_patch16_384=("large", 16, 384, 1.0),
    vit_large_patch32_224=("large", 32, 224),
    vit_large_patch32_384=("large", 32, 384, 1.0),
    vit_huge_patch14_224=("huge", 14, 224),
    vit_huge_patch14_gap_224=("huge", 14, 224, 0.9, GAP, IMAGENET),
    vit_huge_patch16_gap_448=("huge", 16, 448, 1.0, GAP, IMAGENET),
    vit_giant_patch14_224=("giant", 14, 224),
    vit_giant_patch16_gap_224=("giant", 16, 224, 0.9, GAP, IMAGENET),
    vit_gigantic_patch14_224=("gigantic", 14, 224),
)

# Touvron et al. 2021 (DeiT) and 2022 (DeiT-3)
_family(
    IMAGENET,
    deit_tiny_patch16_224=("tiny", 16, 224),
    deit_small_patch16_224=("small", 16, 224),
    deit_base_patch16_224=("base", 16, 224),
    deit_base_patch16_384=("base", 16, 384, 1.0),
)
_family(
    DEIT3,
    deit3_small_patch16_224=("small", 16, 224),
    deit3_small_patch16_384=("small", 16, 384, 1.0),
    deit3_medium_patch16_224=("medium", 16, 224),
    deit3_base_patch16_224=("base", 16, 224),
    deit3_base_patch16_384=("base", 16, 384, 1.0),
    deit3_large_patch16_224=("large", 16, 224),
    deit3_large_patch16_384=("large", 16, 384, 1.0),
    deit3_huge_patch14_224=("huge", 14, 224),
)

# Beyer et al. 2023 (FlexiViT)
_family(
    {"no_embed_class": True},
    flexivit_small=("small", 16, 240, 0.95),
    flexivit_base=("base", 16, 240, 0.95),
    flexivit_large=("large", 16, 240, 0.95),
)

# Oquab et al. 2023 (DINOv2), Darcet et al. 2024 (registers), TIPS v2
_family(
    DINOV2,
    vit_small_patch14_dinov2=("small", 14, 518),
    vit_base_patch14_dinov2=("base", 14, 518),
    vit_large_patch14_dinov2=("large", 14, 518),
    vit_giant_patch14_dinov2=("giant", 14, 518, 1.0, SWIGLU_GIANT),
)
_family(
    DINOV2_REG,
    vit_small_patch14_reg4_dinov2=("small", 14, 518),
    vit_base_patch14_reg4_dinov2=("base", 14, 518),
    vit_large_patch14_reg4_dinov2=("large", 14, 518),
    vit_giant_patch14_reg4_dinov2=("giant", 14, 518, 1.0, SWIGLU_GIANT),
)
_family(
    TIPS,
    vit_base_patch14_reg1_tipsv2=("base", 14, 448, 1.0),
    vit_large_patch14_reg1_tipsv2=("large", 14, 448, 1.0),
    vit_so400m_patch14_reg1_tipsv2=("so400m", 14, 448, 1.0),
    vit_giant_patch14_reg1_tipsv2=("giant", 14, 448, 1.0, SWIGLU_GIANT),
)

# Radford et al. 2021 (CLIP) and its successors with the exact GELU
_HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_family(
    CLIP,
    vit_xsmall_patch16_clip_224=("xsmall", 16, 224),
    vit_medium_patch16_clip_224=("medium", 16, 224),
    vit_medium_patch32_clip_224=("medium", 32, 224),
    vit_betwixt_patch32_clip_224=("betwixt", 32, 224),
    vit_base_patch16_clip_224=("base", 16, 224, 0.95),
    vit_base_patch16_clip_384=("base", 16, 384, 1.0, _SQUASH),
    vit_base_patch16_plus_clip_240=("plus", 16, 240, 1.0),
    vit_base_patch32_clip_224=("base", 32, 224),
    vit_base_patch32_clip_256=("base", 32, 256, 1.0),
    vit_base_patch32_clip_384=("base", 32, 384, 1.0),
    vit_base_patch32_clip_448=("base", 32, 448, 1.0),
    vit_large_patch14_clip_224=("large", 14, 224, 1.0, _HALF),
    vit_large_patch14_clip_336=("large", 14, 336, 1.0, _HALF, _SQUASH),
    vit_huge_patch14_clip_224=("huge", 14, 224, 1.0),
    vit_huge_patch14_clip_336=("huge", 14, 336, 1.0, _SQUASH),
    vit_huge_patch14_clip_378=("huge", 14, 378, 1.0),
    vit_giant_patch14_clip_224=("giant", 14, 224, 1.0),
    vit_gigantic_patch14_clip_224=("gigantic", 14, 224, 1.0),
    vit_gigantic_patch14_clip_378=("gigantic", 14, 378, 1.0, _SQUASH),
)
_family(
    {**CLIP, **QUICK},  # as OpenAI trained them
    vit_base_patch16_clip_quickgelu_224=("base", 16, 224, 1.0),
    vit_base_patch32_clip_quickgelu_224=("base", 32, 224),
    vit_large_patch14_clip_quickgelu_224=("large", 14, 224, 1.0),
    vit_large_patch14_clip_quickgelu_336=("large", 14, 336, 1.0),
    vit_huge_patch14_clip_quickgelu_224=("huge", 14, 224, 1.0),
    vit_huge_patch14_clip_quickgelu_378=("huge", 14, 378, 1.0),
    vit_gigantic_patch14_clip_quickgelu_224=("gigantic", 14, 224, 1.0),
)

# Wang et al. 2023 (BEiT-3), Chen et al. 2024 (InternViT), Fang et al. 2023 (EVA in the plain layout)
_BEIT3 = {**IMAGENET, "scale_attn_norm": True, "scale_mlp_norm": True, "global_pool": "avg", "norm_eps": 1e-5}
_family(
    {},
    beit3_base_patch16_224=("base", 16, 224, 1.0, _BEIT3),
    beit3_large_patch16_224=("large", 16, 224, 1.0, _BEIT3),
    beit3_giant_patch14_224=("giant", 14, 224, 1.0, _BEIT3),
    beit3_giant_patch14_336=("giant", 14, 336, 1.0, _BEIT3),
    vit_intern300m_patch14_448=(
        "large",
        14,
        448,
        1.0,
        IMAGENET,
        {"init_values": 0.1, "final_norm": False, "dynamic_img_size": True},
    ),
    eva_large_patch14_196=("large", 14, 196, 1.0, {"mean": CLIP_MEAN, "std": CLIP_STD, "global_pool": "avg"}),
    eva_large_patch14_336=("large", 14, 336, 1.0, {"mean": CLIP_MEAN, "std": CLIP_STD, "global_pool": "avg"}, _SQUASH),
)

# Zhai et al. 2023 (SigLIP), Tschannen et al. 2025 (SigLIP 2)
_family(
    MAP,
    vit_base_patch32_siglip_256=("base", 32, 256, 0.9, TANH),
    vit_base_patch16_siglip_224=("base", 16, 224),
    vit_base_patch16_siglip_256=("base", 16, 256),
    vit_base_patch16_siglip_384=("base", 16, 384),
    vit_base_patch16_siglip_512=("base", 16, 512),
    vit_large_patch16_siglip_256=("large", 16, 256),
    vit_large_patch16_siglip_384=("large", 16, 384),
    vit_large_patch16_siglip_512=("large", 16, 512, 0.9, TANH),
    vit_so400m_patch14_siglip_224=("so400m", 14, 224),
    vit_so400m_patch14_siglip_378=("so400m", 14, 378),
    vit_so400m_patch16_siglip_256=("so400m", 16, 256, 0.9, TANH),
    vit_so400m_patch16_siglip_384=("so400m", 16, 384, 0.9, TANH),
    vit_so400m_patch16_siglip_512=("so400m", 16, 512, 0.9, TANH),
    vit_giantopt_patch16_siglip_256=("giantopt", 16, 256, 0.9, TANH),
    vit_giantopt_patch16_siglip_384=("giantopt", 16, 384, 0.9, TANH),
)
_family(
    GAP,
    vit_base_patch32_siglip_gap_256=("base", 32, 256, 0.9, TANH),
    vit_base_patch16_siglip_gap_224=("base", 16, 224),
    vit_base_patch16_siglip_gap_256=("base", 16, 256),
    vit_base_patch16_siglip_gap_384=("base", 16, 384),
    vit_base_patch16_siglip_gap_512=("base", 16, 512),
    vit_large_patch16_siglip_gap_256=("large", 16, 256),
    vit_large_patch16_siglip_gap_384=("large", 16, 384),
    vit_large_patch16_siglip_gap_512=("large", 16, 512, 0.9, TANH),
    vit_so400m_patch14_siglip_gap_224=("so400m", 14, 224),
    vit_so400m_patch14_siglip_gap_378=("so400m", 14, 378),
    vit_so400m_patch14_siglip_gap_448=("so400m", 14, 448, 1.0),
    vit_so400m_patch14_siglip_gap_896=("so400m", 14, 896, 1.0),
    vit_so400m_patch16_siglip_gap_256=("so400m", 16, 256, 0.9, TANH),
    vit_so400m_patch16_siglip_gap_384=("so400m", 16, 384, 0.9, TANH),
    vit_so400m_patch16_siglip_gap_512=("so400m", 16, 512, 0.9, TANH),
    vit_giantopt_patch16_siglip_gap_256=("giantopt", 16, 256, 0.9, TANH),
    vit_giantopt_patch16_siglip_gap_384=("giantopt", 16, 384, 0.9, TANH),
)

# timm's own shapes with average pooling
_NO_QKV_BIAS = {"qkv_bias": False, "init_values": 1e-6}
_SO150M = {"class_token": False, "reg_tokens": 4}
_SO150M2 = {"class_token": False, "reg_tokens": 1, "global_pool": "avg", "init_values": 1e-5, "qkv_bias": False}
_family(
    {**GAP, **_NO_QKV_BIAS},
    vit_medium_patch16_gap_240=("medium", 16, 240, 0.95),
    vit_medium_patch16_gap_256=("medium", 16, 256, 0.95),
    vit_medium_patch16_gap_384=("medium", 16, 384, 0.95, _SQUASH),
    vit_betwixt_patch16_gap_256=("betwixt", 16, 256, 0.95),
)
_family(
    {**SBB, "reg_tokens": 1},
    vit_wee_patch16_reg1_gap_256=("wee", 16, 256, 0.95),
    vit_little_patch16_reg1_gap_256=("little", 16, 256, 0.95),
    vit_medium_patch16_reg1_gap_256=("medium", 16, 256, 0.95),
    vit_betwixt_patch16_reg1_gap_256=("betwixt", 16, 256, 0.95),
)
_family(
    {**SBB, "reg_tokens": 4},
    vit_little_patch16_reg4_gap_256=("little", 16, 256, 0.95),
    vit_medium_patch16_reg4_gap_256=("medium", 16, 256, 0.95),
    vit_mediumd_patch16_reg4_gap_256=("mediumd", 16, 256, 0.95),
    vit_mediumd_patch16_reg4_gap_384=("mediumd", 16, 384, 1.0),
    vit_betwixt_patch16_reg4_gap_256=("betwixt", 16, 256, 0.95),
    vit_betwixt_patch16_reg4_gap_384=("betwixt", 16, 384, 1.0),
    vit_base_patch16_reg4_gap_256=("base", 16, 256, 0.9, {"init_values": None}),
)
_family(
    {},
    vit_so150m_patch16_reg4_map_256=("so150m", 16, 256, 0.9, _SO150M, {"global_pool": "map"}),
    vit_so150m_patch16_reg4_gap_256=("so150m", 16, 256, 0.95, GAP, _SO150M),
    vit_so150m_patch16_reg4_gap_384=("so150m", 16, 384, 1.0, GAP, _SO150M),
    vit_so150m2_patch16_reg1_gap_256=("so150m2", 16, 256, 1.0, _SO150M2),
    vit_so150m2_patch16_reg1_gap_384=("so150m2", 16, 384, 1.0, _SO150M2),
    vit_so150m2_patch16_reg1_gap_448=("so150m2", 16, 448, 1.0, _SO150M2, _SQUASH),
)

# This project's own, for small images: the digits (8 pixels), Fashion-MNIST (28), CIFAR (32)
_family(
    SMALL_IMAGES,
    vit_tiny_patch2_8=("digits", 2, 8),
    vit_tiny_patch4_28=("compact", 4, 28),
    vit_tiny_patch4_32=("compact", 4, 32),
)

CONFIGS.update(EVA_CONFIGS)
