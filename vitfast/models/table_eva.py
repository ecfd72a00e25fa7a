"""The models of timm's EVA family by name: rotary positions, SwiGLU, other parameter names. Values are timm's."""

from typing import Any

from vitfast.models.config import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, ViTConfig
from vitfast.models.table_rows import family

SQUASH = {"crop_mode": "squash"}
SWIGLU = {"mlp_ratio": 4 * 2 / 3, "mlp_layer": "swiglu_packed"}
SWIGLU_APART = {"mlp_ratio": 4 * 2 / 3, "mlp_layer": "swiglu", "scale_mlp_norm": True, "qkv_layout": "separate"}
ALIGNED_SWIGLU = {"mlp_layer": "swiglu", "swiglu_align_to": 8}
EVA = {
    "block": "eva",
    "qkv_layout": "split_bias",
    "global_pool": "avg",
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
}
EVA02 = {**EVA, "rope_type": "cat", "ref_feat_shape": 16}
DINOV3 = {
    **EVA,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_pct": 1.0,
    "dynamic_img_size": True,
    "init_values": 1e-5,
    "pos_embed": "none",
    "reg_tokens": 4,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "fc_norm": False,
    "norm_eps": 1e-5,
}
NO_BIAS = {"qkv_bias": False}
ROPE_VIT = {
    "block": "eva",
    "init_values": 1e-5,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "pos_embed": "none",
    "rope_type": "cat",
    "rope_temperature": 100.0,
    "rope_grid_indexing": "xy",
}
APE = {"pos_embed": "learn", "no_embed_class": True}
MIXED = {"rope_type": "mixed", "rope_temperature": 10.0}
ROPE_GAP = {
    **EVA02,
    "mean": HALF,
    "std": HALF,
    "crop_pct": 0.95,
    "class_token": False,
    "init_values": 1e-5,
    "pos_embed": "none",
    "reg_tokens": 1,
}
PE: dict[str, Any] = {
    "block": "eva",
    "global_pool": "avg",
    "mean": HALF,
    "std": HALF,
    "crop_pct": 1.0,
    "norm_eps": 1e-5,
    "pre_norm": True,
    "rope_type": "cat",
    "rope_grid_indexing": "xy",
    "rope_grid_offset": 1.0,
}
PE_CORE = {
    **PE,
    "global_pool": "map",
    "pool_include_prefix": True,
    "attn_pool_num_heads": 8,
    "attn_pool_mlp_ratio": 4.0,
}
PE_PLAIN = {**PE, "final_norm": False, "fc_norm": False, "ref_feat_shape": 32}
PE_GIGANTIC = {
    "embed_dim": 1536,
    "mlp_ratio": 8960 / 1536,
    "class_token": False,
    "rope_grid_offset": 0.0,
    "ref_feat_shape": 32,
}

EVA_CONFIGS: dict[str, ViTConfig] = {
    # Fang et al. 2023 (EVA)
    **family(
        EVA,
        eva_giant_patch14_224=("giant", 14, 224),
        eva_giant_patch14_336=("giant", 14, 336, 1.0, SQUASH),
        eva_giant_patch14_560=("giant", 14, 560, 1.0, SQUASH, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}),
        eva_giant_patch14_clip_224=("giant", 14, 224, 0.9, {"global_pool": "token"}),
    ),
    # Fang et al. 2023 (EVA-02, arXiv:2303.11331), Sun et al. 2023 (EVA-CLIP)
    **family(
        EVA02,
        eva02_tiny_patch14_224=("tiny", 14, 224, 0.9, SWIGLU),
        eva02_tiny_patch14_336=("tiny", 14, 336, 1.0, SWIGLU),
        eva02_small_patch14_224=("small", 14, 224, 0.9, SWIGLU),
        eva02_small_patch14_336=("small", 14, 336, 1.0, SWIGLU),
        eva02_base_patch14_224=("base", 14, 224, 0.9, SWIGLU_APART),
        eva02_base_patch14_448=("base", 14, 448, 1.0, SWIGLU_APART, SQUASH),
        eva02_large_patch14_224=("large", 14, 224, 0.9, SWIGLU_APART),
        eva02_large_patch14_448=("large", 14, 448, 1.0, SWIGLU_APART, SQUASH),
    ),
    **family(
        {**EVA02, **SWIGLU_APART, "scale_attn_norm": True, "global_pool": "token"},
        eva02_base_patch16_clip_224=("base", 16, 224),
        eva02_large_patch14_clip_224=("large", 14, 224),
        eva02_large_patch14_clip_336=("large", 14, 336, 1.0),
    ),
    # Simeoni et al. 2025 (DINOv3, arXiv:2508.10104)
    **family(
        DINOV3,
        vit_tiny_patch16_dinov3_qkvb=("tiny", 16, 256),
        vit_small_patch16_dinov3=("small", 16, 256, 1.0, NO_BIAS),
        vit_small_patch16_dinov3_qkvb=("small", 16, 256),
        vit_small_plus_patch16_dinov3=("small", 16, 256, 1.0, NO_BIAS, ALIGNED_SWIGLU),
        vit_small_plus_patch16_dinov3_qkvb=("small", 16, 256, 1.0, ALIGNED_SWIGLU),
        vit_base_patch16_dinov3=("base", 16, 256, 1.0, NO_BIAS),
        vit_base_patch16_dinov3_qkvb=("base", 16, 256),
        vit_large_patch16_dinov3=("large", 16, 256, 1.0, NO_BIAS),
        vit_large_patch16_dinov3_qkvb=("large", 16, 256),
        vit_huge_plus_patch16_dinov3=("huge", 16, 256, 1.0, NO_BIAS, ALIGNED_SWIGLU, {"num_heads": 20}),
        vit_huge_plus_patch16_dinov3_qkvb=("huge", 16, 256, 1.0, ALIGNED_SWIGLU, {"num_heads": 20}),
        vit_7b_patch16_dinov3=("7b", 16, 256, 1.0, NO_BIAS, {**ALIGNED_SWIGLU, "swiglu_align_to": 64}),
    ),
    # LingBot-Vision: DINOv3's architecture with the class token as output
    **family(
        {**DINOV3, **SQUASH, "global_pool": "token", "interpolation": "bilinear"},
        vit_small_patch16_lingbot=("small", 16, 512),
        vit_base_patch16_lingbot=("base", 16, 512),
        vit_large_patch16_lingbot=("large", 16, 512),
        vit_giant_patch16_lingbot=(
            "giantopt",
            16,
            512,
            1.0,
            NO_BIAS,
            ALIGNED_SWIGLU,
            {"mlp_ratio": 4 * 2 / 3, "num_heads": 24},
        ),
    ),
    # Heo et al. 2024 (RoPE-ViT, arXiv:2403.13298)
    **{
        name: config
        for infix, kind in (("", {}), ("_ape", APE), ("_mixed", MIXED), ("_mixed_ape", {**MIXED, **APE}))
        for size in ("small", "base", "large")
        for name, config in family(
            {**ROPE_VIT, **kind}, **{f"vit_{size}_patch16_rope{infix}_224": (size, 16, 224)}
        ).items()
    },
    # timm's own shapes with average pooling
    **family(
        ROPE_GAP,
        vit_medium_patch16_rope_reg1_gap_256=("medium", 16, 256),
        vit_mediumd_patch16_rope_reg1_gap_256=("mediumd", 16, 256, 0.95, NO_BIAS),
        vit_betwixt_patch16_rope_reg4_gap_256=(
            "betwixt",
            16,
            256,
            0.95,
            {"reg_tokens": 4, "mean": CLIP_MEAN, "std": CLIP_STD},
        ),
        vit_base_patch16_rope_reg1_gap_256=("base", 16, 256),
    ),
    # Bolya et al. 2025 (Perception Encoder, arXiv:2504.13181)
    **family(
        PE_CORE,
        vit_pe_core_tiny_patch16_384=("tiny", 16, 384, 1.0, {"ref_feat_shape": 24}),
        vit_pe_core_small_patch16_384=("small", 16, 384, 1.0, {"ref_feat_shape": 24}),
        vit_pe_core_base_patch16_224=("base", 16, 224, 1.0, {"ref_feat_shape": 14}),
        vit_pe_core_large_patch14_336=("large", 14, 336, 1.0, {"ref_feat_shape": 24}),
        vit_pe_core_gigantic_patch14_448=("gigantic", 14, 448, 1.0, {**PE_GIGANTIC, "depth": 50}),
    ),
    **family(
        PE_PLAIN,
        vit_pe_lang_large_patch14_448=("large", 14, 448, 1.0, {"init_values": 0.1, "depth": 23}),
        vit_pe_lang_gigantic_patch14_448=("gigantic", 14, 448, 1.0, {**PE_GIGANTIC, "init_values": 0.1, "depth": 47}),
        vit_pe_spatial_tiny_patch16_512=("tiny", 16, 512),
        vit_pe_spatial_small_patch16_512=("small", 16, 512),
        vit_pe_spatial_base_patch16_512=("base", 16, 512),
        vit_pe_spatial_large_patch14_448=("large", 14, 448),
        vit_pe_spatial_gigantic_patch14_448=(
            "gigantic",
            14,
            448,
            1.0,
            {**PE_GIGANTIC, "init_values": 0.1, "depth": 50},
        ),
    ),
}
