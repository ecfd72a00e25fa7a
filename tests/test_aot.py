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
import torch

pytest.importorskip("triton")
from vitfast.kernels import (
    aot_cases,
    aot_compile,
    aot_tuned,
    attention_backward,
    attention_bias,
    attention_forward,
    configs,
    device,
    tile_rows,
    tune_attention,
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


def tuned_rows(arch: int, dtype: str, precision: str) -> list[dict]:
    """A table in which each measured range of lengths has a row that no rule chooses."""
    rows, common = [], {"arch": arch, "dtype": dtype, "precision": precision, "head_dim": (49, 64)}
    for (biased, prepared), lengths in itertools.product(tune_attention.KINDS, tune_attention.LENGTHS):
        where = common | {"length": lengths, "biased": biased, "prepared": prepared}
        tile = {"queries": 32, "keys": 16, "chunks": (), "warps": 2, "stages": 5}
        back = {"own": 32, "step": 64, "chunks": (), "warps": 2, "stages": 5}
        if lengths == (257, 272):
            tile, back = tile | {"keys": 0, "chunks": (256, 16, 0)}, back | {"own": 0, "chunks": (256, 16, 0)}
        rows.append({"kernel": "attention_forward", "where": where, "config": tile, "reason": "a test"})
        rows.append({"kernel": "attention_backward", "where": where, "config": back, "reason": "a test"})
    for prepared in (False, True):
        tile = {"tile": 128, "warps": 16, "programs": 7}
        where = common | {"prepared": prepared}
        rows.append({"kernel": "bias_gradient", "where": where, "config": tile, "reason": "a test"})
    return rows


@pytest.mark.parametrize("dtype", aot_cases.ALL)
@pytest.mark.parametrize("arch", CHIPS)
def test_the_list_reaches_every_row_of_attention(arch, dtype, monkeypatch):
    """Whatever length, head dim and options: the row they choose is compiled, or one with more keys in each chunk."""
    assert_the_list_reaches_every_row(arch, dtype, monkeypatch)


@pytest.mark.parametrize(("name", "dtype", "precision"), [("bf16", "bfloat16", "ieee"), ("tf32", "float32", "tf32")])
def test_the_list_reaches_every_tuned_row_of_attention(name, dtype, precision, monkeypatch):
    with tile_rows.trying(*tuned_rows(90, dtype, precision)):
        assert_the_list_reaches_every_row(90, name, monkeypatch, head_dims=(48, 64, 72))


def assert_the_list_reaches_every_row(arch, dtype, monkeypatch, head_dims=range(8, 257, 8)):
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
        for case in (*map(aot_tuned.by_rules, aot_cases.attention_cases()), *aot_tuned.tuned_cases()):
            if dtype in case.dtypes:
                case.launch(kind)

    def covered(entry, done):
        return any(other[1:] == entry[1:] and aot_cases.stands_for(other[0], entry[0]) for other in done)

    lengths, flags = (*range(1, 330), 577, 1025), (False, True)
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


def test_tuned_rows_of_the_other_kernels_are_compiled(monkeypatch):
    """On their own architecture, in their own dtype, at widths in use that they hold for."""
    from vitfast.kernels import layer_norm, patch_embed

    chosen = set()

    def watched(function):
        def choose(*arguments):
            config = function(*arguments)
            chosen.add((function.kernel, config))
            return config

        return choose

    for module in (layer_norm, patch_embed):
        for name, value in list(vars(module).items()):
            if isinstance(value, tile_rows.Tuned):
                monkeypatch.setattr(module, name, watched(value))
            elif name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder())
    monkeypatch.setattr("vitfast.kernels.reduce._sum_partials_kernel", Recorder())
    for name in ("_patchify_kernel", "_unpatchify_kernel", "_assemble_kernel"):
        monkeypatch.setattr(f"vitfast.kernels.patchify.{name}", Recorder())
    norm = {"arch": 90, "dtype": "float32", "columns": (257, 512)}
    product = {"arch": 90, "dtype": "bfloat16", "precision": "ieee"}
    rows_512 = {"rows": 2, "width": 512, "warps": 2, "programs": 3}
    tile = {"rows": 32, "columns": 32, "depth": 16, "warps": 2, "stages": 1}
    rows = [
        {"kernel": "layer_norm", "where": norm, "config": rows_512},
        {"kernel": "layer_norm_backward", "where": norm, "config": rows_512},
        {"kernel": "patch_embed", "where": product | {"columns": (513, 1024), "depth": (588, 588)}, "config": tile},
        {
            "kernel": "patch_weight",
            "where": product | {"wide_pixels": True, "rows": (1025, None), "columns": (588, 588)},
            "config": tile,
        },
        {"kernel": "patch_image", "where": product | {"columns": (588, 588), "depth": (1, 512)}, "config": tile},
    ]
    with tile_rows.trying(*(row | {"reason": "a test"} for row in rows)):
        expected = {(row.kernel, row.config) for row in tile_rows.rows()}
        for arch in (80, 90):
            with mock.patch.object(device, "device_properties", return_value=CHIPS[arch].device):
                for case in aot_tuned.tuned_cases():
                    for dtype in case.dtypes:
                        case.launch(aot_cases.DTYPES[dtype])
            assert (expected <= chosen) == (arch == 90)


def test_measured_product_tiles_are_compiled(monkeypatch):
    from vitfast.kernels import mlp

    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append(kwargs["num_stages"])

    for name in ("_linear_kernel", "_hidden_backward_kernel"):
        monkeypatch.setattr(mlp, name, Kernel())
    monkeypatch.setattr("vitfast.kernels.reduce._sum_partials_kernel", Recorder())
    place = {"arch": 90, "dtype": "bfloat16", "rows": "few", "width": "narrow", "path": "fused", "reason": "a test"}
    tile = {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 7}
    rows = [configs.product_row(place | {"unit": unit, "config": tile}) for unit in configs.UNITS]
    monkeypatch.setattr(configs, "product_rows", lambda: tuple(rows))
    for arch, count in ((80, 0), (90, len(rows))):
        seen.clear()
        with mock.patch.object(device, "device_properties", return_value=CHIPS[arch].device):
            for case in aot_tuned.product_cases():
                assert case.dtypes == ("bf16",)
                case.launch(torch.bfloat16)
        assert seen == [7] * count
