"""`vitfast bench` from the command line: its files, its answers to bad arguments, and Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vitfast.benchmarks import schema, suites
from vitfast.benchmarks.schema import Row
from vitfast.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = ["bench", "layer_norm", "--preset", "dry", "--dtype", "fp32", "--seconds", "0.001", "--threads", "1"]
    run += ["--direction", "forward", "--providers", "vitfast torch", "pytorch eager"]
    assert main([*run, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("add_layer_norm", "vitfast torch", "pytorch eager", "ratio", "copy", "Liger: needs a CUDA GPU"):
        assert word in printed
    saved = schema.read(tmp_path / "layer_norm-dry.json")
    assert (tmp_path / "layer_norm-dry.csv").read_text().count("\n") == 1 + len(saved["rows"])
    assert (tmp_path / "report.md").exists()

    def baseline(factor: float) -> str:
        path = tmp_path / f"baseline-{factor}.json"
        rows = [
            entry | {name: entry[name] * factor for name in ("ratio", "ratio_low", "ratio_high")}
            for entry in saved["rows"]
        ]
        schema.write(path, saved | {"rows": rows})
        return str(path)

    assert main([*run, "--check", baseline(1e-3)]) == 0
    assert "0 worse by more than the noise" in capsys.readouterr().out
    assert main([*run, "--check", baseline(1e3)]) == 1
    assert "worse: layer_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--shapes", "Q=1"], "does not fit attention"),
        (["attention", "--dtype", "int4"], "'int4' is no dtype"),
        (["report"], "report needs the folder"),
        (["report", "/nowhere"], "holds no result files"),
        (["mlp", "somewhere"], "go with `vitfast bench report` only"),
        (["mlp", "--check", "/nowhere.json"], "No such file"),
        (["mlp", "--threads", "0"], "--threads is 0"),
        (["mlp", "--seconds", "0"], "0 is not over zero"),
        (["softmax"], "invalid choice: 'softmax'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    try:
        code = main(["bench", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("vitfast: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("known_machine")
def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_case, calls = suites.run_case, []

    def interrupted(*args: Any) -> list[Row]:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_case(*args)

    monkeypatch.setattr(suites, "run_case", interrupted)
    command = ["bench", "layer_norm", "--preset", "dry", "--seconds", "0.001", "--direction", "forward"]
    command += ["--providers", "vitfast torch", "pytorch eager", "--out", str(tmp_path)]
    assert main(command) == 130
    assert "interrupted; the tables have 1 of 4 cases" in capsys.readouterr().err
    saved = schema.read(tmp_path / "layer_norm-dry.json")
    assert {entry["op"] for entry in saved["rows"]} == {"layer_norm"}
    assert sum(entry["reason"] == "stopped before it was done" for entry in saved["absent"]) == 3
    assert (tmp_path / "report.md").exists()
