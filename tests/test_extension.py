"""Without the C++ extension, or with a damaged one, everything still works and `vitfast info` says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """A copy of the package without its built libraries."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "vitfast", tmp_path / "vitfast", ignore=ignored)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MODEL = """
import torch, vitfast
model = vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
model(torch.randn(2, 3, 32, 32)).sum().backward()
print(vitfast.__file__)
"""


@pytest.mark.parametrize("damage", [None, b"not a library"])
def test_works_without_it(bare_package: Path, damage: bytes | None) -> None:
    if damage is not None:
        (bare_package / "vitfast/_C.abi3.so").write_bytes(damage)
    assert run(bare_package, "-c", MODEL).strip().startswith(str(bare_package))
    facts = json.loads(run(bare_package, "-m", "vitfast.cli.main", "info", "--json"))
    status = facts["extension"]["_C"]
    assert not status["loaded"]
    expected = "is not built" if damage is None else "_C.abi3.so: "  # the loader's own words name the file
    assert expected in status["error"]
    assert facts["cpu"]["tflops_measured_by"] == "the fastest matrix product"
    assert all(rate > 0 for rate in facts["cpu"]["tflops"].values())
    reasons = {row["reason"] for row in facts["backends"] if row["backend"] == "cpu"}
    assert all("did not load" in reason and expected in reason for reason in reasons)
    assert status["error"].splitlines()[0][:40] in run(bare_package, "-m", "vitfast.cli.main", "info")


def test_is_built_for_the_tests() -> None:
    """The rest of the suite must not skip the C++ backend unnoticed."""
    from vitfast.ops import extension_status

    assert extension_status()["_C"]["loaded"], extension_status()["_C"]["error"]
