"""The result files: what is wrong in one is named, and none is left half written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from bench_checks import content, row

from vitfast.benchmarks import schema

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("machine"), "missing ['machine']"),
        (lambda c: c.update(more=1), "unknown ['more']"),
        (lambda c: c.update(schema=99), "schema is 99; this vitfast reads 2"),
        (lambda c: c["machine"].update(threads="two"), "machine.threads is 'two'; expected int"),
        (lambda c: c["rows"][0].pop("ms"), "rows[0]: missing ['ms']"),
        (lambda c: c["rows"][0].update(ms=True), "rows[0].ms is True"),
        (lambda c: c["rows"][0].update(dtype="int8"), "rows[0].dtype is 'int8'; allowed: float32"),
        (lambda c: c["rows"][0].update(ms_low=2.0), "ms_low <= ms <= ms_high does not hold"),
        (lambda c: c["rows"][0].update(ms=None), "all given or all null"),
        (lambda c: c["rows"][0].update(ms=None, ms_low=None, ms_high=None), "no note that says why"),
        (lambda c: c["rows"][0].update(ratio=2.0), "a ratio needs a best_peer"),
        (lambda c: c["rows"][0].update(floor_ms=math.inf), "numbers must be finite"),
        (lambda c: c["rows"].append(c["rows"][0]), "is there twice"),
    ],
)
def test_the_schema_names_what_is_wrong(damage: Any, message: str, tmp_path: Path) -> None:
    bad = json.loads(json.dumps(content(row())))
    schema.validate(bad)
    damage(bad)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the message is compared below
        schema.write(tmp_path / "x.json", bad)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    schema.write(path, content(row()))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        schema.write(path, content(row(ms=2.0)))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: "):
        schema.read(path)
