"""Compiling the Triton kernels for GPUs that are not here: a subset of `make aot`, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}


def compile_ahead(tmp_path: Path, *arguments: str) -> tuple[int, list[dict], str]:
    out = tmp_path / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vitfast.kernels.aot", "--quick", "--dtype", "bf16", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    return done.returncode, rows, done.stdout + done.stderr


@pytest.mark.parametrize("arch", INSTRUCTION)
def test_products(tmp_path, arch):
    """No spill, everything on chip, the tensor cores of that chip, and a floor that its FLOPs or bytes imply."""
    code, rows, text = compile_ahead(tmp_path, "--arch", str(arch), "--only", "mlp D=768")
    assert code == 0, text
    products = [row for row in rows if row["kernel"].startswith("mlp.")]
    assert {row["kernel"] for row in products} == {"mlp.linear", "mlp.hidden_backward"}
    for row in products:
        assert row["spills"] == 0
        assert row["tensor_core"] == INSTRUCTION[arch]
        assert row["tensor_memory"] == row["configuration"]["DESCRIPTORS"] == (arch >= 90)
        assert row["blocks"] >= 1
        rate = {80: 312e12, 90: 989e12, 100: 2250e12}[arch]
        assert row["flops"] in (2 * 64 * 197 * 768 * 3072 * k for k in (1, 2))
        assert row["floor_us"] >= row["flops"] / rate * 1e6 - 0.01


def test_layer_norm(tmp_path):
    code, rows, text = compile_ahead(tmp_path, "--arch", "90", "--only", "layer_norm D=768 fp32 stream")
    assert code == 0, text
    backward = [row for row in rows if row["kernel"] == "layer_norm.backward"]
    assert len(backward) == 2
    # 5 blocks of 4 warps on each multiprocessor is what the launch counts on
    assert all(row["spills"] == 0 and row["blocks"] >= 5 for row in backward), backward
    add = [row for row in rows if row["kernel"] == "layer_norm.scale_add"]
    moved = 64 * 197 * 768 * (4 + 2 + 4) + 768 * 4 + 64 * 4
    assert [row["bytes"] for row in add] == [moved]
    assert add[0]["floor_us"] == pytest.approx(moved / 4.8e12 * 1e6, abs=0.01)


def test_what_counts_as_a_problem(monkeypatch):
    """A spill, too much shared memory, a product beside the tensor cores, descriptors that are none."""
    from types import SimpleNamespace

    from vitfast.kernels import aot

    monkeypatch.setattr(aot, "resources", lambda cubin: (64, 8))
    metadata = SimpleNamespace(shared=300_000, num_warps=4)
    compiled = SimpleNamespace(asm={"cubin": b"", "ptx": "fma.rn.f32"}, metadata=metadata)
    row = aot.describe(90, "mlp.linear", compiled, True, True, "", True)
    assert [problem.split(" ")[0] for problem in row["problems"]] == ["spills", "shared", "16-bit", "descriptors"]
    compiled.asm["ptx"], metadata.shared = "mma.sync cp.async.bulk.tensor", 1024
    assert aot.describe(90, "mlp.linear", compiled, True, True, "known", True)["problems"] == [
        "product on the tensor cores' old interface"
    ]
    assert aot.describe(80, "mlp.linear", compiled, True, True, "known", False)["problems"] == []
