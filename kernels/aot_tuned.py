"""What `make aot` compiles: the cases of aot_cases.py by the rules alone, which stand behind tile_table.py, and then each row
of that table for itself, on its own architecture and in its own dtype, under every set of options that chooses it. Of
product_table.py each measured tile, at the shape that it was measured at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from . import configs, device, tile_rows, tune_products
from .aot_cases import (
    BATCH,
    DTYPES,
    HEAD_DIMS,
    LENGTHS,
    NO_PRODUCT,
    Case,
    all_cases,
    attention_case,
    heads,
    norm_case,
    patch_case,
    quick_cases,
)
from .tile_rows import TileRow
from .tune_patch_embed import sides

# Of attention, by biased, prepared: a lighter set can spill where a heavier does not, so each is compiled.
OPTIONS = {
    (False, False): ("", "packed"),
    (True, False): ("bias32 padding", "bias", "bias32", "padding"),
    (False, True): ("rope norm packed", "rope", "norm"),
    (True, True): ("all",),
}
# Sizes in use; a row that holds for none of them is compiled at its end.
USUAL_HEAD_DIMS = (*HEAD_DIMS, 16, 48)
USUAL_WIDTHS = (192, 384, 768, 1024, 1280, 1536, 4096)


def between(limits: tuple[int, int | None], usual: tuple[int, ...]) -> tuple[int, ...]:
    first, last = limits
    inside = tuple(n for n in usual if n >= first and (last is None or n <= last))
    return inside or (first if last is None else last,)


def attention_cases(row: TileRow, dtypes: tuple[str, ...]) -> Iterator[Case]:
    L = tile_rows.heaviest_length(*row.where.get("length", (LENGTHS[0], LENGTHS[0])))
    biased, prepared = row.where.get("biased", True), row.where["prepared"]  # a bias's gradient has a bias
    for E in between(row.where["head_dim"], USUAL_HEAD_DIMS):
        for options in OPTIONS[biased, prepared]:
            launch = attention_case(L, E, options, row)
            yield Case(f"tuned attention E={E} L={L} {options}".strip(), launch, dtypes, heads(L, E))


def patch_cases(row: TileRow, dtypes: tuple[str, ...]) -> Iterator[Case]:
    names = sides(row.kernel, "width", "pixels")
    ranges = {names[name]: row.where[name] for name in names}
    D, P = between(ranges["width"], USUAL_WIDTHS)[-1], math.isqrt(ranges["pixels"][0] // 3)
    for pixels, last in ((torch.uint8, False), (torch.float32, True)):
        if row.where.get("wide_pixels", pixels == torch.float32) != (pixels == torch.float32):
            continue  # another row's
        launch = on_arch(row.where["arch"], patch_case(P, D, pixels, last))
        yield Case(f"tuned patch_embed P={P} D={D}", launch, dtypes, {"B": BATCH, "N": 256, "K": 3 * P * P, "D": D})


def norm_cases(row: TileRow, dtypes: tuple[str, ...]) -> Iterator[Case]:
    streams: dict[torch.dtype | None, tuple[str, ...]] = {None: dtypes}  # and the dtypes of what is normalised
    if row.kernel == "layer_norm_backward":
        streams[torch.float32] = dtypes
    elif row.where["dtype"] == "float32":
        streams[torch.float32] = NO_PRODUCT
    for D in between(row.where["columns"], USUAL_WIDTHS):
        for stream, kinds in streams.items():
            launch = on_arch(row.where["arch"], norm_case(D, stream))
            yield Case(f"tuned layer_norm D={D}", launch, kinds, {"T": BATCH * 197, "D": D})


def product_cases() -> Iterator[Case]:
    for row in configs.product_rows():
        if row.config and row.arch and row.dtype and row.unit and row.rows and row.width:  # measured, not by hand
            T, D = tune_products.ROWS[row.rows], tune_products.WIDTHS[row.width]
            launch = on_arch(row.arch, partial(launch_product, row.unit, T, D, row.config))
            names = tuple(name for name in NO_PRODUCT if str(DTYPES[name]) == f"torch.{row.dtype}")
            yield Case(f"tuned {row.unit} T={T} D={D}", launch, names, {"T": T, "D": D})


def launch_product(unit: str, T: int, D: int, config: configs.ProductConfig, dtype: torch.dtype) -> None:
    tune_products.problem(unit, T, D, dtype, "meta").fused(config)


def on_arch(arch: int, launch: Callable[[torch.dtype], None]) -> Callable[[torch.dtype], None]:
    def run(dtype: torch.dtype) -> None:
        if device.device_properties(torch.device("meta")).arch == arch:
            launch(dtype)

    return run


def tuned_cases() -> Iterator[Case]:
    for row in tile_rows.rows():
        dtypes = tuple(name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{row.where['dtype']}")
        family = patch_cases if row.kernel.startswith("patch") else norm_cases
        yield from (attention_cases if "head_dim" in row.where else family)(row, dtypes)


def by_rules(case: Case) -> Case:
    """The case as if tile_table.py were empty."""

    def launch(dtype: torch.dtype) -> None:
        with tile_rows.trying():
            case.launch(dtype)

    return case._replace(launch=launch)


def cases(quick: bool) -> list[Case]:
    ruled = map(by_rules, quick_cases() if quick else all_cases())
    return [*ruled, *(() if quick else (*tuned_cases(), *product_cases()))]
