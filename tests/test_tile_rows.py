"""Rows of tile_table.py: taken where they hold and nowhere else, right in the kernels, refused with a reason if wrong."""

from __future__ import annotations

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from op_checks import DEVICE, check_parity
from test_attention import optional_case
from test_layer_norm import add_case

pytest.importorskip("triton")

from test_kernels_triton import test_patch_embed as check_patch_embed

from vitfast.kernels import (
    attention_backward,
    attention_bias,
    attention_forward,
    configs,
    device,
    layer_norm,
    patch_embed,
    tile_rows,
)

ARCH = device.device_properties(torch.device(DEVICE)).arch
PRODUCT = {"arch": ARCH, "dtype": "float16", "precision": "ieee"}
HEAD = PRODUCT | {"head_dim": (9, 16)}
# 33 to 48 keys as 32 and 16, of which only the 16 may be cut off: no rule pads these lengths so.
ONE_PASS = {"queries": 32, "keys": 0, "chunks": (32, 16, 0), "warps": 4}
LOOPED = {"queries": 128, "keys": 16, "chunks": (), "warps": 8, "stages": 2}
BACK_ONE_PASS = {"own": 0, "step": 64, "chunks": (32, 16, 0), "warps": 4, "stages": 1}
BACK_LOOPED = {"own": 128, "step": 16, "chunks": (), "warps": 8, "stages": 1}


def entry(kernel: str, where: dict, config: dict) -> dict:
    return {"kernel": kernel, "where": where, "config": config, "reason": "a test"}


def attention_row(kernel: str, config: dict, first: int, last: int | None, biased: bool, prepared: bool) -> dict:
    return entry(kernel, HEAD | {"length": (first, last), "biased": biased, "prepared": prepared}, config)


FORWARD = attention_row("attention_forward", ONE_PASS, 33, 48, False, False)


@pytest.fixture
def chosen(monkeypatch):
    """The configurations that launches took, by kernel."""
    found: dict[str, list] = {}

    def watched(function):
        def choose(*arguments):
            config = function(*arguments)
            found.setdefault(function.kernel, []).append(config)
            return config

        return choose

    for module in (attention_forward, attention_backward, attention_bias, layer_norm, patch_embed):
        for name, value in list(vars(module).items()):
            if isinstance(value, tile_rows.Tuned):
                monkeypatch.setattr(module, name, watched(value))
    return found


def test_the_committed_table_is_valid():
    assert len(tile_rows.rows()) == len(tile_rows.ROWS)


# The ends of the range and one between; the first is where the last chunk has one key, the last where nothing is cut off.
@pytest.mark.parametrize("L", [33, 41, 48])
@pytest.mark.parametrize("options", ["", "bias padding", "rope norm"])
@pytest.mark.parametrize("looped", [False, True], ids=["one pass", "looped"])
def test_attention_takes_the_row(L, options, looped, chosen):
    words = set(options.split())
    flags = (bool(words & {"bias", "padding"}), bool(words & {"rope", "norm"}))
    forward, backward = (LOOPED, BACK_LOOPED) if looped else (ONE_PASS, BACK_ONE_PASS)
    rows = [
        attention_row("attention_forward", forward, 33, 48, *flags),
        attention_row("attention_backward", backward, 33, 48, *flags),
        entry("bias_gradient", HEAD | {"prepared": False}, {"tile": 32, "warps": 4, "programs": 3}),
    ]
    more = dict.fromkeys(words & {"bias", "padding"}, True)
    if "rope" in words:
        more |= {"rope": "half", "norm": "mixed"}
    with tile_rows.trying(*rows):
        check_parity(optional_case((1, L, 1, 16), **more), "attention", "triton", torch.float16)
        expected = {
            row["kernel"]: tile_rows.tile_row(row).config
            for row in rows
            if words & {"bias"} or "length" in row["where"]
        }
    assert {kernel: set(taken) for kernel, taken in chosen.items()} == {k: {c} for k, c in expected.items()}


def test_packed_sequences_shorter_than_the_rows_lengths(chosen):
    """The longest sequence chooses; the others end in any chunk."""
    from vitfast import ops

    generator = torch.Generator().manual_seed(0)
    lengths = (5, 40, 1, 32, 33)
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=generator).to(DEVICE, torch.float16)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    with tile_rows.trying(FORWARD):
        found = ops.attention(qkv, cu_seqlens=starts, max_seqlen=40, backend="triton")
    assert [config.chunks for config in chosen["attention_forward"]] == [(32, 16, 0)]
    alone = [ops.attention(part[None].double(), backend="torch")[0] for part in qkv.split(lengths)]
    torch.testing.assert_close(found.double(), torch.cat(alone), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("wide", [False, True])
def test_layer_norm_takes_the_row(wide, chosen):
    """By the stream's dtype forward, by the norm's output's backward; the same row at every width that its tile covers."""
    where = {"arch": ARCH, "dtype": "float32" if wide else "float16", "columns": (65, 128)}
    rows = [
        entry("layer_norm", where, {"rows": 1, "width": 128, "warps": 1}),
        entry(
            "layer_norm_backward",
            where | {"dtype": "float16"},
            {"rows": 4, "width": 128, "warps": 4, "programs": 2, "scale_apart": True},
        ),
    ]
    with tile_rows.trying(*rows):
        for D in (65, 72, 128):
            check_parity(add_case((2, 5, D), True, True, wide), "layer_norm", "triton", torch.float16)
        expected = {row["kernel"]: {tile_rows.tile_row(row).config} for row in rows}
    assert {kernel: set(taken) for kernel, taken in chosen.items()} == expected


def test_patch_embedding_takes_the_rows(chosen):
    tile = {"rows": 32, "columns": 64, "depth": 16, "warps": 4, "stages": 2}
    sides = {
        "patch_embed": {"columns": (17, 64), "depth": (588, 588)},
        "patch_weight": {"wide_pixels": False, "rows": (17, 64), "columns": (588, 588)},
        "patch_image": {"columns": (588, 588), "depth": (17, 64)},
    }
    with tile_rows.trying(*(entry(kernel, PRODUCT | where, tile) for kernel, where in sides.items())):
        check_patch_embed("uint8", 3, 14, (28, 42), 24, 5, "patches", "NHWC", torch.float16)
    tiles = {kernel: {configs.ProductConfig(**tile)} for kernel in sides}
    assert {kernel: set(taken) for kernel, taken in chosen.items()} == tiles


def test_a_row_is_never_used_outside_what_it_holds_for():
    arguments = {
        "length": 40, "head_dim": 16, "dtype": torch.float16, "precision": "ieee", "arch": ARCH,
        "biased": False, "prepared": False,
    }  # fmt: skip
    choose, ours = configs.attention_forward_config, configs.AttentionConfig(**ONE_PASS)
    others = {
        "length": [*range(1, 33), *range(49, 330), 577, 1025], "head_dim": [*range(1, 9), *range(17, 257)],
        "dtype": [torch.bfloat16, torch.float32], "arch": [80, 86, 100, 103], "biased": [True], "prepared": [True],
    }  # fmt: skip
    with tile_rows.trying(FORWARD):
        assert all(choose(*(arguments | {"length": n}).values()) == ours for n in range(33, 49))
        for name, values in others.items():
            for value in values:
                given = tuple((arguments | {name: value}).values())
                assert choose(*given) == choose.rule(*given), (name, value)
                if choose(*given).chunks:
                    assert sum(choose(*given).chunks) >= given[0]
    assert choose(*arguments.values()) == choose.rule(*arguments.values()) != ours


def test_the_first_row_that_fits_decides():
    general = attention_row("attention_forward", LOOPED, 1, None, False, False)
    with tile_rows.trying(FORWARD, general):
        rest = (16, torch.float16, "ieee", ARCH, False, False)
        found = [bool(configs.attention_forward_config(length, *rest).chunks) for length in (32, 33, 48, 49, 5000)]
    assert found == [False, True, True, False, False]


def test_what_is_refused_stays_refused():
    """The op asks before any table: a row for a head dim that spills brings nothing back."""
    row = attention_row("attention_forward", LOOPED, 1, None, False, False)
    row["where"] |= {"head_dim": (257, 300)}
    with tile_rows.trying(row):
        assert "spill" in configs.attention_why_not(264, torch.float16)
        case = optional_case((1, 4, 1, 264))
        with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="head dim 264"):
            case.op(**case.inputs(torch.float16, DEVICE), backend="triton")


def test_rows_of_the_same_arguments_are_looked_up_once():
    with tile_rows.trying(FORWARD), mock.patch.object(tile_rows, "rows", wraps=tile_rows.rows) as looked:
        for _ in range(3):
            configs.attention_forward_config(40, 16, torch.float16, "ieee", ARCH, False, False)
        assert looked.call_count == 1


def changed(**changes) -> dict:
    where = FORWARD["where"] | {k: v for k, v in changes.items() if k in FORWARD["where"]}
    config = FORWARD["config"] | {k: v for k, v in changes.items() if k not in FORWARD["where"]}
    return FORWARD | {"where": where, "config": config}


NORM = partial(entry, "layer_norm", {"arch": 90, "dtype": "float32", "columns": (513, 1024)})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (FORWARD | {"kernel": "attention"}, "kernel is 'attention'"),
        (FORWARD | {"reason": ""}, "reason is ''"),
        (FORWARD | {"path": "fused"}, "row is"),
        ({"kernel": "attention_forward"}, "row is"),
        (FORWARD | {"where": {"arch": 90}}, "where is"),
        (FORWARD | {"config": {"queries": 64}}, "config is"),
        (changed(width=64), "config is"),
        (changed(arch="sm_90"), "arch is 'sm_90'"),
        (changed(dtype="half"), "dtype is 'half'"),
        (changed(precision="tf32"), "precision is 'tf32'"),
        (changed(biased=None), "biased is None"),
        (changed(head_dim=64), "head_dim is 64"),
        (changed(head_dim=(64, 49)), "head_dim is"),
        (changed(length=(33, 49)), r"length is \(33, 49\)"),  # more keys than the chunks hold
        (changed(length=(33, None)), "length is"),
        (changed(length=(31, 48)), "length is"),  # would cut off the first chunk, where nothing is masked
        (changed(queries=48), "queries is 48"),
        (changed(queries=8), "queries is 8"),
        (changed(keys=48), "keys is 48"),
        (changed(chunks=(48, 0, 0)), "chunks is"),
        (changed(chunks=(32, 0, 16)), "chunks is"),
        (changed(chunks=[32, 16, 0]), "chunks is"),
        (changed(chunks=()), "keys is 0"),
        (changed(warps=3), "warps is 3"),
        (changed(stages=0), "stages is 0"),
        (changed(registers=300), "registers is 300"),
        (NORM({"rows": 4, "width": 512, "warps": 4}), r"columns is \(513, 1024\)"),  # a row wider than the tile
        (NORM({"rows": 3, "width": 1024, "warps": 4}), "rows is 3"),
        (NORM({"rows": 4, "width": 1024, "warps": 4, "scale_apart": 1}), "scale_apart is 1"),
        (NORM({"rows": 4, "width": 1024, "warps": 4}) | {"kernel": "layer_norm_backward"}, "programs is 0"),
    ],
)
def test_wrong_rows_name_the_field(row, message):
    with pytest.raises(ValueError, match=rf"tile_table\.py.*{message}"):
        tile_rows.tile_row(row)
