"""Every op, backend and dtype against fp64 on the device at hand, at the lengths where kernels break; needs no pytest.

The same gate as before a timing: results and all gradients, at most twice plain PyTorch's own error.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from vitfast.ops.dispatch import TABLE

from . import bench_attention, bench_layer_norm, bench_mlp, bench_patch_embed
from .gate import FLOOR, Gate, Inputs
from .harness import TORCH_DTYPE, Case, DeviceLost, Provider, raise_if_lost, shape_text
from .parity_cases import more_cases
from .schema import write_text

# 16 + r for every remainder r, and ViT lengths with their neighbours
_LENGTHS: tuple[int, ...] = (
    1,
    2,
    *range(16, 32),
    49,
    50,
    63,
    64,
    65,
    127,
    128,
    129,
    191,
    192,
    193,
    196,
    197,
    201,
    255,
    256,
    257,
    320,
    577,
)
Shape = dict[str, int | str]
_HEADS: list[Shape] = [
    {"B": 2, "L": length, "H": 1, "E": dim} for length in (50, 197, 257) for dim in (16, 32, 72, 80, 88, 96, 128, 256)
]
_OPTIONS: list[Shape] = [
    {"B": 2, "L": length, "H": 2, "E": dim, "with": name}
    for length in (17, 50, 197, 201, 257, 577)
    for dim in (64, 72, 128)
    for name in ("rope", "qk_norm", "padding", "all")
]
_SEQUENCES: list[Shape] = [{"B": 1, "L": length, "H": 2, "E": 64} for length in _LENGTHS]
_SHAPES: dict[ModuleType, list[Shape]] = {
    bench_attention: _HEADS + _SEQUENCES + _OPTIONS,
    bench_layer_norm: [
        {"B": 2, "L": length, "D": width}
        for length, width in ((1, 64), (7, 192), (197, 384), (197, 768), (50, 1000), (33, 1280), (5, 4096), (3, 8192))
    ],
    bench_mlp: [
        {"B": 2, "L": length, "D": width, "F": 4 * width}
        for length, width in ((1, 64), (17, 192), (197, 384), (50, 768))
    ],
    bench_patch_embed: [
        {"B": 2, "S": size, "P": patch, "D": width}
        for size, patch, width in ((32, 4, 64), (56, 8, 192), (224, 16, 768), (224, 14, 1280), (224, 32, 768))
    ],
}


def _shapes(module: ModuleType, dry: bool) -> list[Shape]:
    return [module.DEFAULTS | shape for shape in (module.SHAPES["dry"] if dry else _SHAPES[module])]


def cases(device: str, dtypes: tuple[str, ...], dry: bool) -> Iterator[tuple[str, Case]]:
    """(name, case) of the whole sweep; ``dry`` takes each module's tiny shapes only."""
    for module in _SHAPES:
        for op in module.OPS:
            for shape in _shapes(module, dry):
                for dtype in dtypes:
                    yield f"{op} {shape_text(shape)} {dtype}", module.case(op, shape, dtype, device)
    for length in (17,) if dry else (64, 192, 197, 320):
        for dtype in dtypes:
            shape = bench_attention.DEFAULTS | {"B": 1, "L": length, "H": 2, "E": 64}
            case = bench_attention.case("attention", shape, dtype, device)
            yield (
                f"attention, large negative logits, L={length} {dtype}",
                dataclasses.replace(case, inputs=_negative_logits(case)),
            )
    yield from more_cases(dtypes, device, dry)


def _negative_logits(case: Case) -> Callable[[], Inputs]:
    """q and k point opposite ways, so that every logit is far below zero: the recipe of pytorch #196678 for NaN gradients."""

    def inputs() -> Inputs:
        made = case.inputs()
        qkv = made["qkv"]
        assert qkv is not None
        qkv[:, :, 0] = qkv[:, :, 0].abs() * 8 + 8
        qkv[:, :, 1] = -qkv[:, :, 1].abs() * 0.1 - 8
        return made

    return inputs


def sweep(
    device: str, dtypes: tuple[str, ...], dry: bool, skip: frozenset[str], share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, str]]:
    """(name of the check, "" or what is wrong) for every case and backend.

    ``skip``: "op backend" pairs; ``share`` (i, n): only every n-th case, from the i-th on. Raises DeviceLost, its message
    starting with the pair that broke the device.
    """
    first, step = share
    for name, case in itertools.islice(cases(device, dtypes, dry), first, None, step):
        inputs = case.inputs()
        gate = None
        for provider in case.providers():
            pair = f"{case.op} {provider.name.removeprefix('vitfast ')}"
            if not provider.ours or pair in skip:
                continue
            if gate is None:
                gate = Gate.of(case.reference, inputs, case.grads, case.batched, None, FLOOR[TORCH_DTYPE[case.dtype]])
            yield f"{name}, {provider.name}", _check(case, gate, inputs, provider, pair)


def _check(case: Case, gate: Gate, inputs: Inputs, provider: Provider, pair: str) -> str:
    try:
        return gate.check(provider.run, inputs, case.grads, case.batched)[1]
    except Exception as error:  # any kernel's: the sweep goes on and the line says what it was
        raise_if_lost(case.device, pair, error)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(argv: list[str] | None = None) -> int:
    """Prints each failure and the counts; 0 if all passed, 1 if not, 3 if a backend broke the device."""
    parser = argparse.ArgumentParser(prog="vitfast.benchmarks.parity", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"], choices=list(TORCH_DTYPE)[:3])
    parser.add_argument("--dry", action="store_true", help="one tiny shape of each op")
    parser.add_argument("--skip", nargs="+", default=[], metavar="OP BACKEND", help="'attention triton', ...")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th case, from the I-th on")
    parser.add_argument("--out", type=Path, help="write the lines there too")
    args = parser.parse_args(argv)
    passed, lines, code = 0, [], 0
    try:
        first, step = (int(number) for number in args.share.split("/"))
        for name, wrong in sweep(args.device, tuple(args.dtype), args.dry, frozenset(args.skip), (first, step)):
            passed += not wrong
            if wrong:
                lines.append(f"FAILED {name}: {wrong}")
                print(lines[-1], flush=True)
    except DeviceLost as lost:
        lines.append(f"DEVICE LOST {lost}")
        print(lines[-1], flush=True)
        code = 3
    failed = len(lines) - (code == 3)
    lines.append(f"parity on {args.device}: {passed} passed, {failed} failed ({len(TABLE)} ops have backends here)")
    print(lines[-1])
    if args.out is not None:
        write_text(args.out, "\n".join(lines) + "\n")
    return code or int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
