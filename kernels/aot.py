"""Compile every Triton kernel as its launcher would, for chips that need not be here, and say what each costs.

    python -m vitfast.kernels.aot [--quick] [--arch 80 90 100] [--dtype bf16 fp16 fp32 tf32] [--only NAME ...] [--jobs N]
        [--out FILE]

The launchers run on meta tensors with the launch itself replaced by compilation, so what is compiled is what would run; what is
covered, and why that is enough, say aot_cases.py (by the rules of configs.py) and aot_tuned.py (rows that make tune wrote).
Prints and writes, for each kernel, configuration, dtype and architecture, registers, spills (a kernel's STACK bytes), shared
memory, blocks per multiprocessor, the tensor-core instruction, whether the tensor memory accelerator fetches the operands, and the floor: the time that its FLOPs and its
tensors, moved once, take at the published rates of the named GPU (chips.py) for the case's shape. Fails on a kernel that does
not compile, on a spill, on shared memory over the chip's limit, on a 16-bit product without tensor cores (on Hopper and
later: a product of mlp.py without theirs), and on descriptors without the accelerator.

`--jobs` processes compile side by side, one for each CPU unless given. A run that was interrupted, or follows a change of
configurations, finds what is unchanged in Triton's own cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.runtime.jit import JITFunction

from . import layer_norm
from .aot_cases import ALL, BATCH
from .aot_compile import compile_case
from .aot_tuned import cases
from .chips import CHIPS

HEADER = f"{'arch':<7}{'dtype':<5}{'case':<41}{'kernel':<30} regs spills  shared warps blocks floor us  tensor cores"
# What a process has compiled: the same kernel of two cases is described once.
KNOWN = set[str]()


def compile_task(task: tuple[int, int, str, bool]) -> list[dict]:
    arch, index, dtype, quick = task
    return compile_case(arch, cases(quick)[index], dtype, KNOWN)


def compile_all(tasks: list[tuple[int, int, str, bool]], jobs: int) -> Iterator[list[dict]]:
    """The rows of each task, in order. Processes are spawned, as Triton's compiler does not survive a fork."""
    if jobs == 1:
        yield from map(compile_task, tasks)
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            yield from pool.imap(compile_task, tasks)


def line(row: dict) -> str:
    note = "; ".join(row["problems"])
    start = f"sm_{row['arch']:<4}{row['dtype']:<5}{row['case']:<41}{row['kernel']:<30}"
    if "registers" not in row:
        return f"{start}  {note}"
    core = row["tensor_core"] + (" tma" if row["tensor_memory"] else "")
    return (
        f"{start}{row['registers']:>5}{row['spills']:>7}{row['shared']:>8}{row['warps']:>6}{row['blocks']:>7}"
        f"{row['floor_us']:>9.1f}  {core:<13}{note}"
    ).rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and report what they cost.")
    parser.add_argument("--quick", action="store_true", help="ViT-B's shapes in bf16 only")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(CHIPS), default=sorted(CHIPS))
    parser.add_argument("--dtype", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one for each CPU")
    parser.add_argument("--out", type=Path, default=Path("build/aot.json"))
    options = parser.parse_args(argv)
    if not isinstance(layer_norm._forward_kernel, JITFunction):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    tasks = [
        (arch, index, dtype, options.quick)
        for arch in options.arch
        for index, case in enumerate(cases(options.quick))
        if any(part in case.name for part in options.only)
        for dtype in case.dtypes
        if dtype in options.dtype
    ]
    print(HEADER, flush=True)
    started, rows, known = time.monotonic(), [], set[str]()
    for found in compile_all(tasks, options.jobs):
        for row in found:
            if row["hash"] not in known or not row["hash"]:
                known.add(row["hash"])
                rows.append(row)
                print(line(row), flush=True)
    failed = [row for row in rows if row["problems"]]
    result = {"triton": triton.__version__, "kernels": len(rows), "problems": len(failed), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    gpus = ", ".join(CHIPS[arch].name for arch in options.arch)
    print(f"Floors are for {BATCH} images of each case's shape, or one, on {gpus}, at published rates.")
    counts = f"{len(rows)} kernels compiled with Triton {triton.__version__}, {len(failed)} with problems"
    print(f"{counts}, {time.monotonic() - started:.0f} s; rows in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
