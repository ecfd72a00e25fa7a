"""How a row of the table of names becomes a configuration."""

from typing import Any

from vitfast.models.config import ViTConfig

# name of a size -> width, depth, heads, MLP hidden over width
SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (192, 12, 3, 4),
    "xsmall": (256, 10, 4, 4),
    "wee": (256, 14, 4, 5),
    "little": (320, 14, 5, 5.6),
    "small": (384, 12, 6, 4),
    "small36": (384, 36, 6, 4),
    "medium": (512, 12, 8, 4),
    "mediumd": (512, 20, 8, 4),
    "betwixt": (640, 12, 10, 4),
    "base": (768, 12, 12, 4),
    "base48": (768, 12, 16, 4),  # sixteen heads of 48
    "plus": (896, 12, 14, 4),
    "so150m": (896, 18, 14, 2.572),
    "so150m2": (832, 21, 13, 34 / 13),
    "large": (1024, 24, 16, 4),
    "so400m": (1152, 27, 16, 3.7362),
    "huge": (1280, 32, 16, 4),
    "giant": (1408, 40, 16, 48 / 11),
    "giantopt": (1536, 40, 16, 4),
    "gigantic": (1664, 48, 16, 64 / 13),
    "7b": (4096, 40, 32, 2),
    "digits": (128, 6, 4, 4),  # this project's own, for images of 8 to 32 pixels
    "compact": (192, 6, 3, 4),
}


def family(shared: dict[str, Any], **rows: tuple) -> dict[str, ViTConfig]:
    """Configurations of rows name = (size, patch size, image size[, crop_pct[, further fields, ...]]), pixels."""
    configs = {}
    for name, (size, patch_size, img_size, *rest) in rows.items():
        embed_dim, depth, num_heads, mlp_ratio = SIZES[size]
        fields: dict[str, Any] = {
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            **shared,
        }
        if rest:
            fields["crop_pct"] = rest[0]
        for further in rest[1:]:
            fields.update(further)
        configs[name] = ViTConfig(name=name, img_size=img_size, patch_size=patch_size, **fields)
    return configs
