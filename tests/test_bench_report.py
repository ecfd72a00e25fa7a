"""Reports, pictures and documents are made from the result files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from bench_checks import content, row
from PIL import Image, ImageColor

from vitfast.benchmarks import plots, report, schema, standing
from vitfast.benchmarks.schema import Row
from vitfast.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


def failed(L: int) -> Row:
    return Row("attention", f"B=1 L={L}", "float32", "forward", "bad", False, note="wrong: far off")


def test_report_and_plots_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = []
    for L in (64, 128, 256):
        rows.append(row(ms=L / 100, shape=f"B=1 L={L}", best_peer="sdpa", ratio=2.0, ratio_low=1.9, ratio_high=2.1))
        rows.append(row("sdpa", L / 50, f"B=1 L={L}", best_peer="sdpa", ratio=1.0, ratio_low=1.0, ratio_high=1.0))
        rows.append(failed(L))
    for B in (1, 2, 3):
        kept = dataclasses.replace(
            failed(1), op="memory", shape=f"model=m B={B}", provider="timm", note="", kept_mib=2.0 * B
        )
        rows.append(dataclasses.replace(kept, direction="both"))
    folder = tmp_path / "results" / "machine"
    schema.write(folder / "attention.json", content(*rows))
    document = tmp_path / "doc.md"
    document.write_text(
        "a\n<!-- measured -->\nold\n<!-- /measured -->\nb\n<!-- measured all -->\n<!-- /measured -->\nc\n"
    )
    assert main(["bench", "report", str(tmp_path / "results"), "--into", str(document)]) == 0
    assert {p.name for p in folder.iterdir()} == {
        "attention.json",
        "report.md",
        *(f"{name}.png" for name in ("growth-attention-float32", "floor", "roofline", "memory")),
    }
    text = document.read_text()
    assert text.startswith(
        "a\n<!-- measured -->\n\nTest CPU, 1 thread, 2026-01-01:\n\n| kept for backward, MiB an image | timm |"
    )
    assert "| B=1 L=64 | float32 | forward | 0.640 (0.576–0.704) | sdpa | 1.28 | 2.00 (1.90–2.10) | 78% |" in text
    assert "| ms | float32 | forward | tokens (L) | 64–256 | 1.00 (1.00) | 1.00 (1.00) |" in text
    assert "no number: bad, B=1 L=64 float32 forward: wrong: far off" in text
    assert "- Other: not installed; `pip install other`" in text
    assert "](results/machine/floor.png)" in text
    assert "old" not in text
    assert report.fill(text, tmp_path / "results", tmp_path) == text
    with pytest.raises(ValueError, match="no <!-- measured -->"):
        report.fill("nothing", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="is not known"):
        report.fill("<!-- measured x -->\n<!-- /measured -->", tmp_path, tmp_path)


def test_no_points_no_picture(tmp_path: Path) -> None:
    assert plots.draw(report.Machine(tmp_path, (content(),))) == []


def test_peers_keep_their_colours_in_the_file(tmp_path: Path) -> None:
    """Also those of a few pixels: one point and an entry in the legend."""
    rows = [row(ms=L / 100, shape=f"B=1 L={L}") for L in (64, 128, 256)]
    rows += [row("sdpa", L / 50, f"B=1 L={L}") for L in (64, 128, 256)]
    rows += [row(f"peer {i}", 1.0 + i, "B=1 L=64") for i in range(len(plots._PEERS) - 1)]
    schema.write(tmp_path / "attention.json", content(*rows))
    plots.draw(next(iter(report.machines(tmp_path))))
    with Image.open(tmp_path / "growth-attention-float32.png") as image:
        found = {color for _, color in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    for name in (plots._OURS, *plots._PEERS):
        wanted = ImageColor.getrgb(name)
        assert any(max(abs(a - b) for a, b in zip(color, wanted, strict=True)) <= 2 for color in found), name


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_documents_are_up_to_date(name: str) -> None:
    """Each is what `vitfast bench report benchmarks/results --into README.md docs/performance.md` makes of it."""
    path = ROOT / name
    text = path.read_text()
    assert report.fill(text, ROOT / "benchmarks/results", path.parent) == text
    for file in (ROOT / "benchmarks/results").rglob("*.json"):
        schema.read(file)


def test_the_summary_is_of_whole_models() -> None:
    def whole(provider: str, ms: float, **values: Any) -> Row:
        made = row(provider, ms, "model=vit_base_patch16_224 B=8", **values)
        return dataclasses.replace(made, op="model", ours=provider == "vitfast")

    won = {"best_peer": "OpenVINO", "ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}
    lost = {"best_peer": "OpenVINO", "ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6}
    rows = [whole("vitfast", 100.0, **won), whole("timm", 400.0), whole("OpenVINO", 150.0)]
    slow = dataclasses.replace(whole("vitfast", 300.0, **lost), dtype="bfloat16")
    rows += [slow, dataclasses.replace(whole("OpenVINO", 150.0), dtype="bfloat16")]
    machine = report.Machine(Path(), (content(*rows),))
    text = standing.summary(machine)
    assert "| inference | ViT-B/16, 8 images, fp32 | 100 | 400 | OpenVINO 150 | 1.50 (1.40–1.60) |" in text
    text = standing.standing(machine)
    assert "| model | fp32 | forward | 1 | 0 | 0 | 1.50 |" in text
    assert "| model | model=vit_base_patch16_224 B=8 | bf16 | forward | OpenVINO | 0.50 (0.40–0.60) |" in text
    assert standing.model_text("vit_large_patch14_336") == "ViT-L/14 at 336 px"
    assert standing.model_text("resnet20") == "resnet20"
