"""Measure the kernels' search spaces on the GPU at hand and rewrite product_table.py and tile_table.py.

    python -m vitfast.kernels.tune [--dtype NAME ...] [--unit NAME ...] [--kernel NAME ...] [--out FOLDER] [--dry]

--unit: products of mlp.py and patch_embed.py (tune_products.py). --kernel: what is tuned in configs.py (tune_tiles.py). With neither, all of
both. A product's row says which path is faster, with the best tile; a kernel's row is written only where a candidate beats
the rule by the margin, and removed where none does any more. Rows of other chips, dtypes, units, kernels and shapes stay.
Interrupted (Ctrl-C), it writes what was measured so far and returns 130; a table is replaced whole or not at all.
--dry walks the same way through Triton's interpreter at tiny sizes, for tests: its times mean nothing, so it writes only
where --out says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import triton

from . import (
    configs,
    device,
    product_table,
    tile_rows,
    tile_table,
    tune_attention,
    tune_layer_norm,
    tune_patch_embed,
    tune_products,
    tune_tiles,
)
from .tune_tiles import Place
from .tune_trial import Setting

PLACES = {
    "attention_forward": tune_attention.places,
    "attention_backward": tune_attention.places,
    "bias_gradient": tune_attention.places,
    "patch_embed": tune_patch_embed.places,
    "patch_weight": tune_patch_embed.places,
    "patch_image": tune_patch_embed.places,
    "layer_norm": tune_layer_norm.places,
    "layer_norm_backward": tune_layer_norm.places,
}
UNITS = (*configs.UNITS, *configs.PATCH_UNITS)
DTYPES = ("bfloat16", "float16", "float32", "tf32")
FOUND = ("path", "config", "reason")  # a row's result; the rest says what it stands for
Measured = Iterable[tuple[dict, dict | None]]


def place_of(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in FOUND}


def merged(old: list[dict], new: list[tuple[dict, dict | None]]) -> list[dict]:
    """The new rows, before those of the old whose place was not measured again."""
    again = [place for place, _ in new]
    return [*(row for _, row in new if row is not None), *(row for row in old if place_of(row) not in again)]


def source(table: ModuleType, rows: list[dict]) -> str:
    """The table's file with these rows, as the formatter leaves it."""

    def literal(value: object, indent: int) -> str:
        if isinstance(value, dict):
            pad = " " * indent
            inside = "".join(f"{pad}    {json.dumps(k)}: {literal(v, indent + 4)},\n" for k, v in value.items())
            return f"{{\n{inside}{pad}}}"
        return json.dumps(value) if isinstance(value, str) else repr(value)

    lines = "".join(f"    {literal(row, 4)},\n" for row in rows)
    inside = f"\n{lines}" if rows else ""
    return f'"""{table.__doc__}"""\n\nROWS: list[dict] = [{inside}]\n'


def write(path: Path, text: str) -> None:
    """All of it or nothing: a table that was cut off would stop every later import."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".py", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def table_path(table: ModuleType, folder: Path | None) -> Path:
    path = Path(str(table.__file__))
    return path if folder is None else folder / path.name


def fill(table: ModuleType, measured: Measured, folder: Path | None) -> bool:
    """Measures, and writes what there is in the end, also when that comes early; False if it was interrupted."""
    found: list[tuple[dict, dict | None]] = []
    whole = True
    try:
        found.extend(measured)
    except KeyboardInterrupt:
        whole = False
    finally:  # after a fault of the GPU, too
        if found:
            path = table_path(table, folder)
            write(path, source(table, merged(table.ROWS, found)))
            rows = sum(row is not None for _, row in found)
            print(f"{rows} rows of {len(found)} places written to {path}", flush=True)
    return whole


def all_places(kernels: Iterable[str], dtypes: Iterable[str], setting: Setting) -> Iterator[tuple[str, Place]]:
    """(dtype's name, place); LayerNorm has no products, so nothing is different under tf32."""
    for name in dtypes:
        precision, dtype = ("tf32", torch.float32) if name == "tf32" else ("ieee", getattr(torch, name))
        for kernel in kernels:
            if precision == "ieee" or "precision" in tile_rows.KERNELS[kernel].arguments:
                yield from ((name, place) for place in PLACES[kernel](kernel, dtype, precision, setting))


def measured_tiles(places: Iterable[tuple[str, Place]], setting: Setting) -> Iterator[tuple[dict, dict | None]]:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for name, place in places:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
            yield tune_tiles.measured(place, setting)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def main(argv: list[str] | None = None) -> int:
    """0 when the tables are written, 2 without a GPU, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="make tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES[:2]))
    parser.add_argument("--unit", nargs="+", choices=UNITS, help="these products")
    parser.add_argument("--kernel", nargs="+", choices=tuple(PLACES), help="these other kernels")
    parser.add_argument("--out", type=Path, help="folder for the tables, instead of the package's own")
    parser.add_argument("--dry", action="store_true", help="tiny sizes in the interpreter; needs --out")
    options = parser.parse_args(argv)
    if options.dry and options.out is None:
        parser.error("--dry measures nothing: name a folder with --out, the tables themselves stay as they are")
    if not options.dry and not torch.cuda.is_available():
        print("make tune: PyTorch finds no CUDA GPU here, and there is nothing else to measure on", file=sys.stderr)
        return 2
    on = "cpu" if options.dry else f"cuda:{torch.cuda.current_device()}"
    machine = "nothing: a dry run in the interpreter" if options.dry else torch.cuda.get_device_name()
    about = f"measured on {machine}, {datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}"
    setting = Setting(on, device.device_properties(torch.device(on)).arch, about, options.dry)
    everything = options.unit is None and options.kernel is None
    units = list(UNITS) if everything else options.unit or []
    kernels = list(PLACES) if everything else options.kernel or []
    plain = [name for name in options.dtype if name != "tf32"]  # the products' table does not know how fp32 is rounded
    places = list(all_places(kernels, options.dtype, setting))
    minutes = (tune_products.seconds(units, plain, setting) + tune_tiles.seconds(p for _, p in places)) / 60
    if not options.dry:
        print(f"about {minutes:.0f} minutes, nearly all of it compilation; Ctrl-C keeps what is measured by then")
    if not fill(product_table, tune_products.measured(units, plain, setting), options.out):
        return 130
    return 0 if fill(tile_table, measured_tiles(places, setting), options.out) else 130


if __name__ == "__main__":
    sys.exit(main())
