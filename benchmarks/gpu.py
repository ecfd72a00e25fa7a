"""`make gpu OUT=dir`: build, parity, benchmarks and their report on the GPU at hand, in under ten minutes.

Needs a clone, plain `python3` with PyTorch and Triton, and for _C_cuda a CUDA toolkit; pytest, pytest-xdist, rich and
matplotlib are used where they are. Each part runs in processes of its own with a limit, and what it has measured by then is
kept. Parity spends its time compiling some hundreds of Triton kernels, so it is split over the CPUs; Triton's cache keeps
them for the benchmarks, which have the GPU to themselves. `--dry` walks the same way on the CPU at tiny sizes, Triton in
its interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import report, schema, standing
from .suites import SUITES

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 560.0
BUILD_SECONDS = 200.0
PARITY_SECONDS = 120.0  # of the sweep and of the tests, which run side by side
MOST_PROCESSES = 12  # of the sweep: each has a CUDA context of about 0.5 GiB
# These need no extension, so they run while it is built.
RAW_TESTS = ("test_kernels_triton", "test_kernels_triton_attention")
OP_TESTS = ("test_attention", "test_layer_norm", "test_patch_embed", "test_units")
DRY_TESTS = {
    "test_kernels_triton": "test_many_partial_sums",
    "test_kernels_triton_attention": "test_attention_empty",
    "test_attention": "test_every_remainder and (1-triton or 1-torch)",
}
NOT_HERE = "not compile and not gradcheck and not opcheck"  # these say nothing about the device, and take minutes
# compiling timm's models takes a minute each, so only what the project is held against runs
MODELS = ("vitfast", "vitfast fused", "timm", "timm torch.compile")
# share of the time that is left for benchmarks, and how each suite is run; in order of what matters most
PARTS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("attention", "standard", 1.2, ("--providers", "!*torch.compile*")),
    ("layer_norm", "standard", 0.5, ("--providers", "!*max-autotune*")),
    ("patch_embed", "standard", 0.6, ("--providers", "!*max-autotune*")),
    ("mlp", "standard", 0.6, ("--providers", "!*max-autotune*")),
    ("model", "standard", 1.8, ("--providers", *MODELS)),
    ("train", "standard", 3.4, ("--providers", *MODELS)),
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

    def process(self, command: Sequence[str], limit: float, more: dict[str, str] | None = None) -> tuple[int, str]:
        """(exit code, output); 124 after ``limit`` seconds, when the process and all that it started are ended.

        ``more``: environment variables. The output goes to the log too.
        """
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if self.dry:
            environment |= {"TRITON_INTERPRET": "1", "VITFAST_BUILD_CUDA": "0"}  # Triton's switch and the build's own
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | (more or {}),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(limit, 1.0))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(
                    ProcessLookupError
                ):  # its workers too: they would run on beside the benchmarks
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = 124
            said.seek(0)
            output = said.read()
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
    """The sweep, a share of it in each process, and the ops' tests beside it."""
    shares = 2 if run.dry else min(MOST_PROCESSES, os.cpu_count() or 1)
    with ThreadPoolExecutor(shares + 1) as pool:
        others = pool.submit(tests, run, OP_TESTS[:1] if run.dry else OP_TESTS)
        counts = list(pool.map(lambda i: sweep(run, f"{i}/{shares}"), range(shares)))
        others.result()
    passed, failed = (sum(column) for column in zip(*counts, strict=True))
    run.say(f"parity: {passed} passed, {failed} failed in {shares} processes", wrong=failed > 0 or not passed)


def sweep(run: Run, share: str) -> tuple[int, int]:
    """(passed, failed) of one share; a backend that breaks the device is left out of the next try, and is a failure."""
    skip: list[str] = []
    passed = failed = 0
    for _ in range(_RESTARTS + 1):
        command = [sys.executable, "-m", "vitfast.benchmarks.parity", "--share", share]
        command += ["--dry", "--device", "cpu", "--dtype", "float32"] if run.dry else []
        command += ["--skip", *skip] if skip else []
        code, output = run.process(command, PARITY_SECONDS, {"OMP_NUM_THREADS": "1"})
        lines = output.splitlines()
        run.lines += [line for line in lines if line.startswith(("FAILED", "DEVICE LOST"))]
        counted = re.search(r"(\d+) passed, (\d+) failed", last_line(output))
        if counted is None:  # it was stopped, or never began
            run.say(f"parity {share}: {'no end in time' if code == 124 else last_line(output)}", wrong=True)
            return passed, failed + 1
        passed, failed = int(counted[1]), int(counted[2])
        lost = [line for line in lines if line.startswith("DEVICE LOST ")]
        if not lost:
            return passed, failed + len(skip)
        skip.append(lost[-1].removeprefix("DEVICE LOST ").split(":")[0])
    return passed, failed + len(skip)


def tests(run: Run, names: Sequence[str]) -> None:
    """Files of the test suite, side by side, each in its process or, with pytest-xdist, its four; only where pytest is
    installed."""
    if importlib.util.find_spec("pytest") is None:
        run.say(f"tests: pytest is not installed here: no {', '.join(names)}")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not run.dry and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4"]

    def one(name: str) -> tuple[int, str]:
        chosen = DRY_TESTS[name] if run.dry else NOT_HERE
        return run.process([*command, "-k", chosen, f"tests/{name}.py"], PARITY_SECONDS, {"OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(len(names)) as pool:
        done = list(pool.map(one, names))
    for name, (code, output) in zip(names, done, strict=True):
        run.lines += [line[:300] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
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
    with ThreadPoolExecutor(1) as pool:
        raw = pool.submit(tests, run, RAW_TESTS)
        build(run)
        raw.result()
    parity(run)
    with tempfile.TemporaryDirectory() as folder:
        results = benchmarks(run, Path(folder))
    write(run, results, args.out)
    run.say(f"written to {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    return int(run.failed or not results)


if __name__ == "__main__":
    sys.exit(main())
