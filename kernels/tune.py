"""Measure both paths of every product on the GPU at hand and rewrite product_table.py.

    python -m vitfast.kernels.tune [--dtype bfloat16 float16 float32] [--unit NAME ...] [--out FILE] [--dry]

For each unit, class of rows and class of widths (configs.py) a ViT's shape is run through the library with one
elementwise kernel, and through the fused product with every tile of the search space; a tile whose result is wrong or
that does not fit the chip is left out. The faster path becomes the table's row, with the best tile, the times and the
machine as its reason; rows of other chips, dtypes and units stay. --dry walks the same way through Triton's interpreter
at tiny sizes, for tests: its times mean nothing, so it writes only where --out says.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch.nn import functional

from . import activation, configs, device, layer_norm, mlp, product_table
from .configs import ProductConfig

TABLE = Path(product_table.__file__)
MARGIN = 0.98  # below it the fused path wins; two measurements of one kernel differ by about 2 %
ROWS = {"few": 4 * 197, "many": 64 * 197}  # images of 224 pixels in patches of 16
WIDTHS = {"narrow": 384, "medium": 768, "wide": 1280}
DRY_ROWS = {"few": 5, "many": 19}
DRY_WIDTHS = {"narrow": 8, "medium": 16, "wide": 24}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Both ways through one product; each run returns what it made, the same tensors in the same order."""

    library: Callable[[], list[torch.Tensor]]
    fused: Callable[[ProductConfig], list[torch.Tensor]]


def problem(unit: str, T: int, D: int, dtype: torch.dtype, on: str) -> Problem:
    """`unit` at T rows and model width D: hidden width 4 D, or for SwiGLU two thirds of it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, spread: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(on, kind)

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, device=on, dtype=kind)

    gated = unit == "swiglu"
    kind = "swiglu" if gated else "gelu"
    F = max(8 * D // 3 // 64 * 64, 16) if gated else 4 * D
    H = 2 * F if gated else F
    x, stream, scale = random(T, D), random(T, D), random(D, kind=torch.float32)
    w1, b1, w2, b2 = random(H, D, spread=D**-0.5), random(H), random(D, F, spread=F**-0.5), random(D)
    if unit == "linear":
        qkv, bias, out = random(3 * D, D, spread=D**-0.5), random(3 * D), empty(T, 3 * D)
        return Problem(
            lambda: [functional.linear(x, qkv, bias)],
            lambda config: (mlp.linear_forward(x, qkv, bias, out, config), [out])[1],
        )
    if unit in ("linear_activation", "swiglu"):
        act, kept, act_too = empty(T, F), empty(T, H), empty(T, F)

        def activated() -> list[torch.Tensor]:
            h = functional.linear(x, w1, b1)
            activation.activation_forward(h, kind, act)
            return [h, act]

        return Problem(
            activated,
            lambda config: (
                mlp.linear_activation_forward(x, w1, b1, kind, kept, act_too, config),
                [kept, act_too],
            )[1],
        )
    hidden = random(T, F)
    if unit == "linear_residual":
        total, total_too = empty(T, D), empty(T, D)

        def added() -> list[torch.Tensor]:
            layer_norm.scale_add_forward(stream, functional.linear(hidden, w2, b2), scale, None, total)
            return [total]

        return Problem(
            added,
            lambda config: (
                mlp.linear_residual_forward(hidden, w2, b2, stream, scale, None, total_too, config),
                [total_too],
            )[1],
        )
    results = [[empty(T, F), empty(T, F), empty(F, kind=torch.float32)] for _ in range(2)]  # d_h, act, d_bias

    def backward() -> list[torch.Tensor]:
        d_h, act, d_bias = results[0]
        activation.activation_backward(hidden, x @ w2, kind, d_h, act, d_bias)
        return results[0]

    def fused_backward(config: ProductConfig) -> list[torch.Tensor]:
        d_h, act, d_bias = results[1]
        mlp.hidden_backward(x, w2, hidden, kind, d_h, act, d_bias, config)
        return results[1]

    return Problem(backward, fused_backward)


def candidates(arch: int, dtype: torch.dtype, dry: bool) -> Iterator[ProductConfig]:
    """The search space: tiles that can feed the tensor cores, each resident or not, with and without descriptors."""
    if dry:
        for programs, described in ((0, False), (1, True)):
            yield ProductConfig(32, 64, 32, 4, 2, programs=programs, descriptors=described, halved=described)
        return
    if dtype == torch.float32:
        for rows, columns, warps in ((64, 32, 4), (64, 64, 4), (128, 64, 8), (128, 128, 8)):
            yield ProductConfig(rows, columns, 32, warps, 2, halved=True)
        return
    tiles = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8), (128, 256, 8))
    modern = ((0, True), (1, True), (2, True))
    for rows, columns, warps in tiles:
        for stages in (3, 4):
            for programs, described in modern if arch >= 90 else ((0, False), (1, False)):
                yield ProductConfig(rows, columns, 64, warps, stages, programs, described, halved=True)


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Alike up to the rounding of one step between; a wrong tile is off by far more."""
    pairs = zip(found, expected, strict=True)
    return all(bool((f.float() - e.float()).norm() <= 0.02 * e.float().norm()) for f, e in pairs)


def microseconds(run: Callable[[], object], dry: bool) -> float:
    """Median of one run, with the L2 cache cleared before each."""
    if dry:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    return 1000 * float(triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median"))


def measure(unit: str, T: int, D: int, dtype: torch.dtype, on: str, arch: int, dry: bool) -> dict:
    """path, config and the two times of one shape."""
    made = problem(unit, T, D, dtype, on)
    expected = [t.clone() for t in made.library()]
    library = microseconds(made.library, dry)
    best, fastest = None, float("inf")
    for config in candidates(arch, dtype, dry):
        try:
            if not close(made.fused(config), expected):
                print(f"  wrong result, left out: {config}", flush=True)
                continue
            taken = microseconds(functools.partial(made.fused, config), dry)
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue  # the tile does not fit the chip
        if taken < fastest:
            best, fastest = config, taken
    path = "fused" if best is not None and fastest < MARGIN * library else "library"
    return {
        "path": path,
        "config": None if best is None else dataclasses.asdict(best),
        "library_us": library,
        "fused_us": fastest,
    }


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """The new rows before those of the old that they do not replace."""
    keys = ("arch", "dtype", "unit", "rows", "width")
    taken = {tuple(row[k] for k in keys) for row in new}
    return [*new, *(row for row in old if tuple(row[k] for k in keys) not in taken)]


def source(rows: list[dict]) -> str:
    """product_table.py with these rows, as the formatter leaves it."""

    def literal(value: object, indent: int) -> str:
        if isinstance(value, dict):
            pad = " " * indent
            inside = "".join(f"{pad}    {json.dumps(k)}: {literal(v, indent + 4)},\n" for k, v in value.items())
            return f"{{\n{inside}{pad}}}"
        return json.dumps(value) if isinstance(value, str) else repr(value)

    lines = "".join(f"    {literal(row, 4)},\n" for row in rows)
    return f'"""{product_table.__doc__}"""\n\nROWS: list[dict] = [\n{lines}]\n'


def write(path: Path, text: str) -> None:
    """All of it or nothing: a table that was cut off would stop every later import."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".py", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def main(argv: list[str] | None = None) -> int:
    """0 when the table is written, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make tune", description=__doc__.splitlines()[0])
    names = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", nargs="+", choices=names, default=list(names[:2]))
    parser.add_argument("--unit", nargs="+", choices=configs.UNITS, default=list(configs.UNITS))
    parser.add_argument("--out", type=Path, help=f"instead of {TABLE.name}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes in the interpreter; needs --out")
    options = parser.parse_args(argv)
    if options.dry and options.out is None:
        parser.error("--dry measures nothing: name a file with --out, the table itself stays as it is")
    if not options.dry and not torch.cuda.is_available():
        print("make tune: PyTorch finds no CUDA GPU here, and there is nothing else to measure on", file=sys.stderr)
        return 2
    on = "cpu" if options.dry else f"cuda:{torch.cuda.current_device()}"
    arch = device.device_properties(torch.device(on)).arch
    arch = max(chip for chip in configs.CHIPS if chip <= max(arch, configs.CHIPS[0]))
    machine = "nothing: a dry run in the interpreter" if options.dry else torch.cuda.get_device_name()
    about = f"measured on {machine}, {datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}"
    row_classes, width_classes = (DRY_ROWS, DRY_WIDTHS) if options.dry else (ROWS, WIDTHS)
    rows = []
    for dtype in options.dtype:
        for unit in options.unit:
            for row_class, T in row_classes.items():
                for width_class, D in width_classes.items():
                    found = measure(unit, T, D, getattr(torch, dtype), on, arch, options.dry)
                    times = f"{found.pop('fused_us'):.1f} us against the library's {found.pop('library_us'):.1f}"
                    place = {"arch": arch, "dtype": dtype, "unit": unit, "rows": row_class, "width": width_class}
                    rows.append(place | found | {"reason": f"{about}: {times} at {T} rows, width {D}"})
                    configs.product_row(rows[-1])
                    print(f"{dtype} {unit} {row_class} {width_class}: {found['path']}, {times}", flush=True)
    out = options.out or TABLE
    write(out, source(merged(product_table.ROWS, rows)))
    print(f"{len(rows)} rows written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
