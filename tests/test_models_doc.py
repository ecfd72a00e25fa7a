"""docs/models.md lists every model and the measured table; `python tests/test_models_doc.py` writes both anew."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # examples/ is no package
DOC = ROOT / "docs" / "models.md"
DATA = ROOT / "docs" / "token_merging.json"

# the first pattern that a name contains
FAMILIES = {
    "DINOv3": "dinov3",
    "LingBot-Vision": "lingbot",
    "DINOv2": "dinov2",
    "TIPS v2": "tipsv2",
    "SigLIP, SigLIP 2": "siglip",
    "EVA-02": "eva02",
    "EVA": "eva_",
    "CLIP": "clip",
    "Perception Encoder": "vit_pe_",
    "RoPE-ViT": r"rope(?!.*gap)",
    "BEiT-3": "beit3",
    "FlexiViT": "flexivit",
    "DeiT-3": "deit3",
    "DeiT": "deit_",
    "InternViT": "intern300m",
    "timm's own shapes": "_gap_|_map_|36x1|plus|miil",
    "small images": r"patch2_8|patch4_",
    "ViT, AugReg": "vit_",
}


def names_block() -> str:
    from vitfast.models.registry import BASELINES
    from vitfast.models.table import CONFIGS

    groups: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in sorted(CONFIGS):
        groups[next(family for family, pattern in FAMILIES.items() if re.search(pattern, name))].append(name)
    lines = [f"{len(CONFIGS)} Vision Transformers and {len(BASELINES)} convolutional baselines.", ""]
    for family, names in [*groups.items(), ("Baselines", sorted(BASELINES))]:
        lines.append(f"* **{family}** ({len(names)}): {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines)


def merging_block() -> str:
    from examples.token_merging import table

    return table(json.loads(DATA.read_text()))


BLOCKS = {"names": names_block, "token merging": merging_block}


def written() -> str:
    """The document with its generated parts made anew."""
    text = DOC.read_text()
    for name, make in BLOCKS.items():
        start, end = f"<!-- generated: {name} -->\n", f"\n<!-- end: {name} -->"
        before, rest = text.split(start)
        text = before + start + make() + end + rest.split(end, 1)[1]
    return text


def test_generated_parts_are_up_to_date():
    assert DOC.read_text() == written()


def test_token_merging_table_is_of_a_model_that_learned():
    result = json.loads(DATA.read_text())
    first, *others = result["rows"]
    assert first["merged_per_block"] == 0
    assert first["accuracy"] > 0.95
    assert all(row["multiply_adds"] < first["multiply_adds"] for row in others)


if __name__ == "__main__":
    DOC.write_text(written())
