"""`make tune`: the rewritten table imports, decides, and survives being written again; without a GPU it says so."""

from __future__ import annotations

import runpy

import pytest
import torch

pytest.importorskip("triton")

from vitfast.kernels import configs, product_table, tune


def test_dry_run_writes_a_table_that_imports(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    out = tmp_path / "product_table.py"
    assert tune.main(["--dry", "--dtype", "float16", "--out", str(out)]) == 0
    rows = runpy.run_path(str(out))["ROWS"]
    assert len(rows) == len(configs.UNITS) * 6 + len(product_table.ROWS)
    assert all(configs.product_row(row).reason for row in rows)
    assert rows[0]["reason"].startswith("measured on nothing: a dry run")
    assert all(row["config"] for row in rows[:30]), "every tile of the search space gave a wrong result"
    assert "left out" not in capsys.readouterr().out
    assert rows[-1] == product_table.ROWS[-1]
    assert tune.source(rows) == out.read_text()


def test_the_table_as_committed_is_what_the_script_writes():
    assert tune.source(product_table.ROWS) == tune.TABLE.read_text()


def test_measured_rows_replace_their_own_only():
    def row(unit: str, dtype: str, reason: str) -> dict:
        place = {"arch": 90, "dtype": dtype, "unit": unit, "rows": "few", "width": "wide"}
        return place | {"path": "library", "config": None, "reason": reason}

    old = [row("linear", "float16", "old"), row("swiglu", "float16", "old"), *product_table.ROWS]
    new = tune.merged(old, [row("linear", "float16", "new")])
    assert [r["reason"] for r in new[:2]] == ["new", "old"]
    assert len(new) == len(old)
    assert new[-1] == product_table.ROWS[-1]


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = tune.TABLE.read_text()
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert tune.TABLE.read_text() == before


def test_dry_run_leaves_the_table_alone():
    with pytest.raises(SystemExit):
        tune.main(["--dry"])


def test_a_wrong_tile_is_left_out():
    right = [torch.ones(4, 4)]
    assert tune.close([torch.full((4, 4), 1.01)], right)
    assert not tune.close([torch.full((4, 4), 1.05)], right)


def test_candidates_differ():
    for arch, dtype in ((80, torch.bfloat16), (90, torch.bfloat16), (100, torch.float16), (90, torch.float32)):
        found = list(tune.candidates(arch, dtype, False))
        assert len(set(found)) == len(found) > 3
        assert all(not config.descriptors for config in found) == (arch < 90 or dtype == torch.float32)
