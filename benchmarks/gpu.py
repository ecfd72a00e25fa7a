"""`make gpu OUT=dir`: build, parity, benchmarks and their report on the GPU at hand, in under ten minutes.

Needs a clone, plain `python3` with PyTorch and Triton, and for _C_cuda a CUDA toolkit; pytest, rich and matplotlib are used
where they are. Each part runs in a process of its own with a limit, and what it has measured by then is kept. `--dry` walks
the same way on the CPU at tiny sizes, Triton in its interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import report, schema, standing
from .suites import SUITES

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 560.0
BUILD_SECONDS = 200.0
PARITY_SECONDS = 130.0
TEST_SECONDS = 110.0
TEST_FILES = ("test_attention", "test_layer_norm", "test_patch_embed", "test_units", "test_kernels_triton")
DRY_TESTS = "test_every_remainder and (1-triton or 1-torch)"
# share of the time that is left for benchmarks, and how each suite is run; in order of what matters most
PARTS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("attention", "standard", 1.2, ("--providers", "!*torch.compile*")),
    ("layer_norm", "standard", 0.7, ()),
    ("patch_embed", "standard", 0.8, ()),
    ("mlp", "standard", 0.8, ()),
    ("model", "standard", 2.0, ()),
    ("train", "standard", 2.2, ()),
    ("memory", "standard", 0.6, ("--dtype", "bfloat16", "--providers", "!*torch.compile*")),
    ("overhead", "standard", 0.2, ()),
    ("attention", "growth", 0.7, ("--direction", "forward", "--providers", "vitfast*", "sdpa*", "flash*")),
)
_RESTARTS = 3
MOST_PLOTS = 4


@dataclass
class Run:
    """What has happened so far: lines for the report, the log, and the time that is left."""

    dry: bool
    log: Path
    start: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)
    failed: bool = False

    def left(self) -> float:
        return TOTAL_SECONDS - (time.monotonic() - self.start)

    def say(self, text: str, wrong: bool = False) -> None:
        self.lines.append(text)
        self.failed |= wrong
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)

    def process(self, command: Sequence[str], limit: float) -> tuple[int, str]:
        """(exit code, output); 124 after ``limit`` seconds, when the process is ended. The output goes to the log too."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if self.dry:
            environment |= {"TRITON_INTERPRET": "1", "VITFAST_BUILD_CUDA": "0"}  # Triton's switch and the build's own
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=max(limit, 1.0),
            )
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            said = late.stdout or b""
            code, output = 124, said.decode(errors="replace") if isinstance(said, bytes) else said
        with self.log.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n{output}\n(exit code {code})\n")
        return code, output


def last_line(output: str) -> str:
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")


def build(run: Run) -> None:
    """The extension in place; in a dry run only where it is not there yet."""
    if run.dry and (ROOT / "vitfast/_C.abi3.so").exists():
        run.say("build: the extension is there")
        return
    code, output = run.process([sys.executable, "setup.py", "build_ext", "--inplace"], BUILD_SECONDS)
    cuda = (ROOT / "vitfast/_C_cuda.abi3.so").exists()
    if code:
        run.say(f"build: failed ({last_line(output)}); going on without what is missing", wrong=True)
    else:
        run.say(f"build: done, {'with' if cuda else 'without'} CUDA kernels", wrong=not cuda and not run.dry)


def parity(run: Run) -> None:
    """The sweep; a backend that breaks the device is left out of the next try, and is a failure."""
    skip: list[str] = []
    for _ in range(_RESTARTS + 1):
        command = [sys.executable, "-m", "vitfast.benchmarks.parity"]
        command += ["--dry", "--device", "cpu", "--dtype", "float32"] if run.dry else []
        command += ["--skip", *skip] if skip else []
        code, output = run.process(command, PARITY_SECONDS)
        for line in output.splitlines():
            if line.startswith(("FAILED", "DEVICE LOST")):
                run.lines.append(line)
        run.say(f"parity: {'no end in time' if code == 124 else last_line(output)}", wrong=code != 0)
        lost = [line for line in output.splitlines() if line.startswith("DEVICE LOST ")]
        if code != 3 or not lost:
            return
        skip.append(lost[-1].removeprefix("DEVICE LOST ").split(":")[0])


def tests(run: Run) -> None:
    """The test suite's own parity tests, each file in its process, side by side; only where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        run.say("tests: pytest is not installed here; the sweep above stands for them")
        return
    files = TEST_FILES[:1] if run.dry else TEST_FILES
    options = ["-k", DRY_TESTS] if run.dry else ["--slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(files)) as pool:
        done = list(pool.map(lambda name: run.process([*command, f"tests/{name}.py"], TEST_SECONDS), files))
    for name, (code, output) in zip(files, done, strict=True):
        for line in output.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                run.lines.append(line[:300])
        run.say(f"tests: {name}: {'no end in time' if code == 124 else last_line(output)}", wrong=code != 0)


def benchmarks(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Every part's results; a provider that breaks the GPU is left out when the part is run again."""
    results = []
    for i, (suite, preset, _, options) in enumerate(PARTS):
        share = PARTS[i][2] / sum(weight for _, _, weight, _ in PARTS[i:])
        seconds = max((run.left() - 15) * share, 5.0)  # 15 s for the report
        out = folder / f"{i}-{suite}.json"
        arguments = (
            dry_options(suite, preset, options) if run.dry else ["--preset", preset, "--seconds", "0.3", *options]
        )
        arguments += ["--minutes", f"{seconds / 60:.3f}"]
        excluded: list[str] = []
        for attempt in range(_RESTARTS):
            path = out.with_name(f"{out.stem}-{attempt}.json")
            extra = _with_exclusions(arguments, excluded)
            command = [sys.executable, "-m", "vitfast.benchmarks.rows", suite, "--out", str(path), *extra]
            code, output = run.process(command, min(seconds * 1.5 + 30, run.left()))
            if path.exists():
                results.append(schema.read(path))
            count = len(results[-1]["rows"]) if path.exists() else 0
            how = {0: "done", 124: "stopped: no time left", 3: last_line(output)}.get(
                code, f"failed: {last_line(output)}"
            )
            run.say(f"bench: {suite} {preset}: {count} rows, {how}", wrong=code not in (0, 124) or not count)
            if code != 3:
                break
            excluded.append(last_line(output).removeprefix("device lost: ").split(":")[0])
    return results


def _with_exclusions(arguments: list[str], excluded: Sequence[str]) -> list[str]:
    if not excluded:
        return arguments
    patterns = [f"!{name}" for name in excluded]
    if "--providers" in arguments:
        place = arguments.index("--providers") + 1
        return [*arguments[:place], *patterns, *arguments[place:]]
    return [*arguments, "--providers", *patterns]


def dry_options(suite: str, preset: str, options: Sequence[str]) -> list[str]:
    """The same part at tiny sizes on the CPU: ours with Triton's interpreter, and plain PyTorch."""
    providers = ["vitfast*", "pytorch eager", "sdpa", "timm"]
    arguments = ["--device", "cpu", "--threads", "1", "--seconds", "0.01", "--dtype", "float32", "--preset", "dry"]
    if preset == "growth":
        small = SUITES[suite].module.SHAPES["dry"][0]
        sizes = [f"{axis}={size}" for axis, size in small.items() if axis != "L"]
        arguments += ["--shapes", *sizes, "L=4,8,16", "--direction", "forward"]
    elif suite == "memory":
        arguments += ["--shapes", "model=vit_tiny_patch16_224", "depth=1", "B=1,2,3"]
        providers = ["vitfast fused", "timm"]
    elif suite not in ("attention", "model"):  # each pass is walked once; the interpreter is slow
        arguments += ["--direction", "both"]
    return [*arguments, "--providers", *providers]


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result file of all; a row that two parts measured counts once, the first time."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    absent: dict[tuple[str, str], dict[str, str]] = {}
    machine = dict(results[0]["machine"])
    for content in results:
        for rates in ("matrix_tflops", "product_tflops"):
            machine[rates] = machine.get(rates, {}) | content["machine"].get(rates, {})
        for entry in content["rows"]:
            rows.setdefault(schema.Row(**entry).key, entry)
        for entry in content["absent"]:
            absent.setdefault((entry["provider"], entry["reason"]), entry)
    first = results[0]
    return first | {
        "machine": machine,
        "command": "make gpu",
        "rows": list(rows.values()),
        "absent": list(absent.values()),
    }


def write(run: Run, results: Sequence[dict[str, Any]], out: Path) -> None:
    """results.json, results.csv, report.md and up to four plots; with the log at most eight files."""
    links: list[str] = []
    text = ["# vitfast on this machine", "\n".join(f"- {line}" for line in run.lines)]
    if results:
        content = merged(results)
        machine = report.Machine(out, (content,))
        schema.write(out / "results.json", content)
        schema.write_text(out / "results.csv", schema.to_csv(schema.rows_of(content)))
        try:
            from . import plots

            links = [path.name for path in plots.draw(machine, most=MOST_PLOTS)]
        except ImportError as error:
            text.append(f"No plots: {error}.")
        text += [standing.summary(machine), report.everything(machine, links)]
    schema.write_text(out / "report.md", "\n\n".join(text) + "\n")


def main(argv: list[str] | None = None) -> int:
    """0 if everything was right and measured, 1 if not (the report says what), 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of at most eight files")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, Triton in its interpreter")
    args = parser.parse_args(argv)
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("make gpu: PyTorch finds no CUDA GPU here; make gpu-dry walks the same way without one", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "log.txt"
    log.write_text("")
    run = Run(args.dry, log)
    build(run)
    parity(run)
    tests(run)
    with tempfile.TemporaryDirectory() as folder:
        results = benchmarks(run, Path(folder))
    write(run, results, args.out)
    run.say(f"written to {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    return int(run.failed or not results)


if __name__ == "__main__":
    sys.exit(main())
