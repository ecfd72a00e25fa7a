"""The options of a benchmark run, shared by `vitfast bench` and `python -m vitfast.benchmarks.rows`. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .schema import DIRECTIONS, DTYPES, PRESETS

if TYPE_CHECKING:
    from .suites import Item, Session

SUITES = ("attention", "patch_embed", "layer_norm", "mlp", "model", "int8", "train", "accelerate", "overhead", "memory")
MINUTES = {"overview": 1.7, "smoke": 0.6}  # then no new case starts, so that the last one ends at about two, and one
TIMINGS = ("device", "host", "graph")
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _dtype(text: str) -> str:
    name = _DTYPE_ALIASES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype; allowed: {', '.join((*DTYPES, *_DTYPE_ALIASES))}")
    return name


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not over zero")
    return value


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What is measured and how."""
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=(),
        metavar="AXIS=N[,N...]",
        help="sizes, as B=1,8 L=197,577; every combination is run, axes not named keep their default",
    )
    parser.add_argument("--dtype", nargs="+", type=_dtype, default=(), metavar="DTYPE", help=", ".join(DTYPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, help="default: all that the benchmark has")
    parser.add_argument(
        "--providers",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="run only these, as 'vitfast*' timm; '!PATTERN' leaves out. Slow ones (max-autotune) run only when named",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="overview: a few small cases; standard: the cases of a suite; growth: one axis after the other growing, with "
        "the exponents; threads: from one CPU thread to all; smoke: a minute of small cases, for CI; dry: tiny, only to see "
        "that everything runs (default: standard, overview without a name)",
    )
    parser.add_argument("--seconds", type=_positive, default=2.0, help="of timing for each case and pass (default 2)")
    parser.add_argument("--minutes", type=_positive, help="start no new case after so many minutes (overview: 1.7)")
    parser.add_argument(
        "--longest",
        type=_positive,
        metavar="SECONDS",
        help="leave out whoever takes longer for one call (default: growth and threads 10, smoke 3)",
    )
    parser.add_argument("--timing", choices=TIMINGS, help="GPU: device time, host time, or a CUDA graph's")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's")


def run(names: tuple[str, ...], args: argparse.Namespace, command: str, path: Path | None) -> dict[str, Any]:
    """Measure; returns the result file's content, and writes it to ``path`` after each case."""
    import time

    start = time.monotonic()
    session, items = prepare(names, args, command, path)
    minutes = args.minutes or MINUTES.get(preset_of(names, args))
    return session.run(items, None if minutes is None else start + 60 * minutes)


def file_name(suite: str | None, preset: str) -> str:
    """model.json, model-growth.json, overview.json, smoke.json: several runs fit in one folder."""
    words = [] if suite is None else [suite]
    if preset != "standard" or suite is None:
        words.append(preset)
    return "-".join(words) + ".json"


def device_of(args: argparse.Namespace) -> str:
    """The device to measure on; sets the threads. Raises ValueError where that cannot be."""
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; allowed: 1 and more")
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no CUDA GPU here")
    return device


def preset_of(names: tuple[str, ...], args: argparse.Namespace) -> str:
    return args.preset or ("standard" if len(names) == 1 else "overview")


def prepare(
    names: tuple[str, ...], args: argparse.Namespace, command: str, path: Path | None
) -> tuple[Session, list[Item]]:
    """The session and its cases. Raises ValueError for a device or shapes that are not there."""
    from .harness import Settings
    from .presets import adjusted
    from .suites import Session, check, plan

    device = device_of(args)
    preset = preset_of(names, args)
    items = plan(names, device, preset, args.shapes, args.dtype)
    if preset == "threads" and device != "cpu":
        raise ValueError("--preset threads compares numbers of CPU threads; it needs --device cpu")
    settings = Settings(
        seconds=args.seconds,
        directions=tuple(args.direction) if args.direction else None,
        providers=tuple(args.providers),
        timing=args.timing,
        longest=args.longest,
    )
    settings = adjusted(settings, preset)
    check(items, device, settings)
    return Session(device, command, settings, path, preset), items
