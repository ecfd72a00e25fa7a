"""`make tune`: the rewritten tables import, decide, and survive being written again; without a GPU it says so."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import pytest
import torch
from op_checks import DEVICE

pytest.importorskip("triton")

from vitfast.kernels import (
    attention_backward,
    attention_bias,
    attention_forward,
    configs,
    layer_norm,
    patch_embed,
    product_table,
    tile_rows,
    tile_table,
    tune,
    tune_attention,
    tune_products,
    tune_tiles,
    tune_trial,
)
from vitfast.kernels.tune_trial import Run, Setting

TABLES = (product_table, tile_table)
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for machines without a GPU")


@interpreted
def test_dry_run_of_products(tmp_path, capsys):
    assert tune.main(["--dry", "--dtype", "float16", "--unit", *tune.UNITS, "--out", str(tmp_path)]) == 0
    out = tmp_path / "product_table.py"
    rows = runpy.run_path(str(out))["ROWS"]
    assert len(rows) == len(configs.UNITS) * 6 + len(configs.PATCH_UNITS) * 4 + len(product_table.ROWS)
    assert all(configs.product_row(row).reason for row in rows)
    assert rows[0]["reason"].startswith("measured on nothing: a dry run")
    assert all(row["config"] for row in rows[:30]), "every tile of the search space gave a wrong result"
    assert "left out" not in capsys.readouterr().out
    assert rows[-1] == product_table.ROWS[-1]
    assert tune.source(product_table, rows) == out.read_text()
    assert not (tmp_path / "tile_table.py").exists()


@interpreted
def test_dry_run_of_every_other_kernel(tmp_path, capsys, monkeypatch):
    """Each place gets a row, whose configuration every launch of its trial really took."""
    names = {
        attention_forward: ("attention_forward_config",),
        attention_backward: ("attention_backward_config",),
        attention_bias: ("bias_gradient_config",),
        layer_norm: ("row_config", "backward_rows"),
        patch_embed: ("patch_embed_config", "patch_weight_config", "patch_image_config"),
    }
    taken = set()

    def watched(function):
        def choose(*arguments):
            config = function(*arguments)
            for row in tile_rows.rows():
                if row.kernel == function.kernel:
                    assert config == row.config, (row, arguments)
                    taken.add((row.kernel, config))
            return config

        return choose

    for module, functions in names.items():
        for name in functions:
            monkeypatch.setattr(module, name, watched(getattr(configs, name)))
    assert tune.main(["--dry", "--dtype", "float16", "--kernel", *tune.PLACES, "--out", str(tmp_path)]) == 0
    assert "left out" not in capsys.readouterr().out
    out = tmp_path / "tile_table.py"
    rows = runpy.run_path(str(out))["ROWS"]
    assert {row["kernel"] for row in rows} == set(tile_rows.KERNELS) == set(tune.PLACES)
    assert {(row["kernel"], tile_rows.tile_row(row).config) for row in rows} <= taken
    assert tune.source(tile_table, rows) == out.read_text()
    assert not (tmp_path / "product_table.py").exists()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__.rpartition(".")[2])
def test_the_tables_as_committed_are_what_the_script_writes(table):
    assert tune.source(table, table.ROWS) == tune.table_path(table, None).read_text()


def tile(arch: int, reason: str) -> dict:
    where = {"arch": arch, "dtype": "float16", "columns": (513, 1024)}
    return {"kernel": "layer_norm", "where": where, "config": {"rows": 4, "width": 1024, "warps": 4}, "reason": reason}


def product(unit: str, reason: str) -> dict:
    place = {"arch": 90, "dtype": "float16", "unit": unit, "rows": "few", "width": "wide"}
    return place | {"path": "library", "config": None, "reason": reason}


@pytest.mark.parametrize(
    "old",
    [[product("linear", "old"), product("swiglu", "old")], [tile(90, "old"), tile(80, "old")]],
    ids=["products", "tiles"],
)
def test_measured_rows_replace_their_own_only(old):
    place = tune.place_of(old[0])
    new = tune.merged(old, [(place, old[0] | {"reason": "new"})])
    assert [row["reason"] for row in new] == ["new", "old"]
    # measured, and nothing beats the rule any more
    assert tune.merged(old, [(place, None)]) == old[1:]


def test_interrupted_it_keeps_what_was_measured(tmp_path):
    def measured():
        yield tune.place_of(tile(90, "")), tile(90, "new")
        raise KeyboardInterrupt

    assert not tune.fill(tile_table, measured(), tmp_path)
    out = tmp_path / "tile_table.py"
    assert runpy.run_path(str(out))["ROWS"][0] == tile(90, "new")
    before = out.read_text()

    def at_once():
        raise KeyboardInterrupt
        yield

    assert not tune.fill(tile_table, at_once(), tmp_path)
    assert out.read_text() == before


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = [tune.table_path(table, None).read_text() for table in TABLES]
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert [tune.table_path(table, None).read_text() for table in TABLES] == before


def test_dry_run_leaves_the_tables_alone():
    with pytest.raises(SystemExit):
        tune.main(["--dry"])


def test_a_wrong_tile_is_left_out(monkeypatch):
    right = [torch.ones(4, 4)]
    assert tune_trial.close([torch.full((4, 4), 1.01)], right)
    assert not tune_trial.close([torch.full((4, 4), 1.05)], right)
    out = torch.ones(4, 4)  # right from before, and then not written
    assert tune_trial.why_not(Run(lambda: None, [out]).results, right) == "wrong result"
    assert tune_trial.why_not(Run(lambda: out.fill_(1), [out]).results, right) is None


def test_what_spills_or_does_not_fit_is_left_out(monkeypatch):
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    right = [torch.ones(2)]
    compiled = SimpleNamespace(n_spills=2)
    monkeypatch.setattr(JITFunction, "run", lambda self: compiled)

    def launch():
        JITFunction.run(None)
        return right

    assert tune_trial.why_not(launch, right) == "spills"
    compiled.n_spills = 0
    assert tune_trial.why_not(launch, right) is None

    def too_large():
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert tune_trial.why_not(too_large, right).startswith("does not fit")

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        tune_trial.why_not(broken, right)


@pytest.mark.parametrize(("fast", "taken"), [(0.9, True), (0.99, False)])
@pytest.mark.parametrize("heavy_fits", [True, False])
def test_a_row_beats_the_rule_by_the_margin_and_fits_its_heaviest_options(monkeypatch, fast, taken, heavy_fits):
    width, out = (513, 1024), torch.ones(1)

    def run() -> Run:
        return Run(lambda: out.fill_(1), [out])

    heavy = Run(lambda: out.fill_(2 if tile_rows.rows() and not heavy_fits else 1), [out])
    where = {"arch": 90, "dtype": "float16", "columns": width}
    choices = (configs.RowConfig(8, 1024, 4), configs.RowConfig(4, 1024, 8))
    place = tune_tiles.Place("layer_norm", where, {"one": run, "two": run}, (lambda: heavy,), choices, 0.0)
    # the second candidate is the fast one, at one of the two shapes only by `fast`
    times = iter([100.0, 100.0, 120.0, 80.0, 50.0, 100 * fast])
    monkeypatch.setattr(tune_tiles, "microseconds", lambda *_: next(times))
    row = tune_tiles.measure(place, Setting("cpu", 90, "here", dry=False))
    assert (row is not None) == (taken and heavy_fits)
    if row is not None:
        assert row["config"]["warps"] == 8
        assert row["reason"] == "here: 50.0 us against the rule's 100.0 at one, 90.0 us against the rule's 100.0 at two"


def test_candidates_differ():
    for arch, dtype in ((80, torch.bfloat16), (90, torch.bfloat16), (100, torch.float16), (90, torch.float32)):
        found = list(tune_products.candidates("linear", arch, dtype, False))
        assert len(set(found)) == len(found) > 3
        assert all(not config.descriptors for config in found) == (arch < 90 or dtype == torch.float32)


@pytest.mark.parametrize("arch", configs.CHIPS)
@pytest.mark.parametrize("dtype", tune.DTYPES)
def test_every_candidate_is_a_valid_row(arch, dtype):
    """At the real sizes, without measuring: chunks cover their lengths, and no place is left without a choice."""
    setting, places = Setting("cpu", arch, "nowhere", dry=False), []
    for name, place in tune.all_places(tune.PLACES, [dtype], setting):
        places.append({"kernel": place.kernel, "where": place.where})
        assert name == dtype
        assert len(set(place.candidates)) == len(place.candidates) >= 4
        for config in place.candidates:
            assert tile_rows.tile_row(place.row(config, "a test")).config == config
    assert len(places) == len({str(place) for place in places})
    assert {place["kernel"] for place in places} >= set(tune.PLACES) - {"layer_norm", "layer_norm_backward"}


def test_measured_lengths_lie_in_their_ranges():
    for (first, last), timed in tune_attention.LENGTHS.items():
        heaviest = tile_rows.heaviest_length(first, last)
        assert all(first <= length <= (last or length) for length in (timed, heaviest))
        every = range(first, (last or first + 127) + 1)
        for step in (16, 32, 64):
            tails = {configs.tail_size(step, length, torch.bfloat16) for length in every}
            assert configs.tail_size(step, heaviest, torch.bfloat16) == max(tails)
