"""Compiling the Triton kernels for GPUs that are not here: the quick list of `make aot`, in a process without the
interpreter, and what the whole list covers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("triton")
from vitfast.kernels import (
    aot_cases,
    aot_compile,
    attention_backward,
    attention_bias,
    attention_forward,
    configs,
    device,
)
from vitfast.kernels.chips import CHIPS

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}


def compile_ahead(out: Path, *arguments: str) -> tuple[int, list[dict], str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vitfast.kernels.aot", "--quick", "--dtype", "bf16", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    return done.returncode, rows, done.stdout + done.stderr


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory) -> list[dict]:
    """The quick list, every kernel of it free of problems."""
    code, rows, text = compile_ahead(tmp_path_factory.mktemp("aot") / "aot.json")
    assert code == 0, text
    assert not any(row["problems"] for row in rows)
    return rows


def test_every_kernel_for_every_chip(quick_rows):
    kernels = {arch: {row["kernel"] for row in quick_rows if row["arch"] == arch} for arch in CHIPS}
    assert {name.partition(".")[0] for name in kernels[90]} == {
        "activation", "attention_backward", "attention_bias", "attention_forward", "layer_norm", "mlp", "patch_embed",
        "patchify", "reduce",
    }  # fmt: skip
    assert {"attention_forward.one_pass", "attention_forward.looped", "attention_backward.one_pass"} <= kernels[90]
    assert {"attention_backward.keys", "attention_backward.queries"} <= kernels[80]
    for row in quick_rows:
        if row["kernel"].startswith("attention_forward"):
            assert row["tensor_core"] == INSTRUCTION[row["arch"]], row
            assert row["flops"] == 4 * 64 * 12 * row["shape"]["L"] ** 2 * row["shape"]["E"]


@pytest.mark.parametrize("arch", INSTRUCTION)
def test_products(quick_rows, arch):
    """No spill, everything on chip, the tensor cores of that chip, and a floor that its FLOPs or bytes imply."""
    products = [row for row in quick_rows if row["arch"] == arch and row["kernel"].startswith("mlp.")]
    assert {row["kernel"] for row in products} == {"mlp.linear", "mlp.hidden_backward"}
    for row in products:
        assert row["spills"] == 0
        assert row["tensor_core"] == INSTRUCTION[arch]
        assert row["tensor_memory"] == row["configuration"]["DESCRIPTORS"] == (arch >= 90)
        assert row["blocks"] >= 1
        rate = {80: 312e12, 90: 989e12, 100: 2250e12}[arch]
        assert row["flops"] in (2 * 64 * 197 * 768 * 3072 * k for k in (1, 2))
        assert row["floor_us"] >= row["flops"] / rate * 1e6 - 0.01


def test_layer_norm(quick_rows):
    rows = [row for row in quick_rows if row["arch"] == 90 and row["case"] == "layer_norm D=768 fp32 stream"]
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
    monkeypatch.setattr(aot_compile, "resources", lambda cubin: (64, 8))
    metadata = SimpleNamespace(shared=300_000, num_warps=4)
    compiled = SimpleNamespace(asm={"cubin": b"", "ptx": "fma.rn.f32"}, metadata=metadata)
    row = aot_compile.describe(90, "mlp.linear", compiled, True, True, True)
    assert [problem.split(" ")[0] for problem in row["problems"]] == ["spills", "shared", "16-bit", "descriptors"]
    monkeypatch.setattr(aot_compile, "resources", lambda cubin: (64, 0))
    compiled.asm["ptx"], metadata.shared = "mma.sync cp.async.bulk.tensor", 1024
    assert aot_compile.describe(90, "mlp.linear", compiled, True, True, True)["problems"] == [
        "product on the tensor cores' old interface"
    ]
    assert aot_compile.describe(80, "mlp.linear", compiled, True, True, False)["problems"] == []


def test_a_kernel_that_does_not_compile_is_a_problem_and_not_the_end(tmp_path):
    """A tile over 2**20 elements is refused by Triton's front end; the kernels after it are compiled all the same."""
    script = (
        "import sys; from unittest import mock; from vitfast.kernels import aot, configs, layer_norm;"
        "big = configs.RowConfig(rows=4096, width=1024, warps=4);"
        "mock.patch.object(layer_norm, 'row_config', lambda *_: big).start(); sys.exit(aot.main(sys.argv[1:]))"
    )
    out = tmp_path / "aot.json"
    arguments = ["--quick", "--jobs", "1", "--arch", "80", "--only", "layer_norm D=768 fp32", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads(out.read_text())
    failed = [row for row in result["rows"] if row["problems"]]
    assert result["problems"] == len(failed) > 0
    assert all(row["problems"][0].startswith("does not compile: ") for row in failed), failed
    assert any(row["kernel"] == "layer_norm.backward" and not row["problems"] for row in result["rows"])


class Recorder:
    """Stands in for a kernel: any launch, no compilation."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("dtype", aot_cases.ALL)
@pytest.mark.parametrize("arch", CHIPS)
def test_the_list_reaches_every_row_of_attention(arch, dtype, monkeypatch):
    """Whatever length, head dim and options: the row they choose is compiled, or one with more keys in each chunk."""
    compiled: dict[str, set] = {"forward": set(), "backward": set(), "bias": set()}

    def kinds(flags):  # biased, prepared: in bf16 each row is compiled for all that choose it
        return flags if dtype == "bf16" else ()

    def recorded(name, choose):
        def run(*arguments):
            config = choose(*arguments)
            compiled[name].add((config, *kinds(arguments[-2:] if name != "bias" else arguments[-1:])))
            return config

        return run

    places = (
        ("forward", attention_forward, "attention_forward_config"),
        ("backward", attention_backward, "attention_backward_config"),
        ("bias", attention_bias, "bias_gradient_config"),
    )
    for name, module, function in places:
        monkeypatch.setattr(module, function, recorded(name, getattr(configs, function)))
        for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder())
    monkeypatch.setattr("vitfast.kernels.reduce._sum_partials_kernel", Recorder())
    kind = aot_cases.DTYPES[dtype]
    precision = "tf32" if dtype == "tf32" else "ieee"
    monkeypatch.setattr(device, "dot_precision", lambda dtype: precision)
    with mock.patch.object(device, "device_properties", return_value=CHIPS[arch].device):
        for case in aot_cases.attention_cases():
            if dtype in case.dtypes:
                case.launch(kind)

    def covered(entry, done):
        return any(other[1:] == entry[1:] and aot_cases.stands_for(other[0], entry[0]) for other in done)

    lengths, head_dims, flags = (*range(1, 330), 577, 1025), range(8, 257, 8), (False, True)
    for L, E, biased, prepared in itertools.product(lengths, head_dims, flags, flags):
        if configs.attention_why_not(E, kind) is None:
            rest = (E, kind, precision, arch)
            kind_flags = kinds((biased, prepared))
            forward = (configs.attention_forward_config(L, *rest, biased, prepared), *kind_flags)
            backward = (configs.attention_backward_config(L, *rest, biased, prepared), *kind_flags)
            assert covered(forward, compiled["forward"]), (L, E, biased, prepared, forward)
            assert covered(backward, compiled["backward"]), (L, E, biased, prepared, backward)
            if configs.attention_why_not(E, kind, True, prepared):
                continue
            bias_gradient = (configs.bias_gradient_config(*rest, prepared), *kinds((prepared,)))
            assert bias_gradient in compiled["bias"], (E, prepared, bias_gradient)
