"""Tile sizes, as data: a deterministic choice by shape, dtype and architecture, each with its reason.

Nothing here was timed on a GPU yet: choices follow from registers, shared memory and useful share of the tile, as
`python -m vitfast.kernels.aot` prints them. Where `make tune` found something faster on a chip, the row it wrote comes
first: tile_table.py for what is `tuned` here, product_table.py for the products of mlp.py. Nothing is measured at a
user's first call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from .product_table import ROWS
from .tile_rows import tuned


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RowConfig:
    """A tile of whole rows [rows, width], width the next power of two; `programs` per multiprocessor where it loops.

    scale_apart: LayerScale's gradient is summed by a second kernel.
    """

    rows: int
    width: int
    warps: int
    programs: int = 0
    scale_apart: bool = False

    @property
    def registers(self) -> int | None:
        """The most per thread with which `programs` are resident at once; left to itself the compiler may stop at 64
        and spill, and at 40 in wide rows of a kernel that does not loop. None leaves it to the compiler."""
        if self.programs == 0 and self.warps < 8:
            return None
        return min(65536 // (32 * self.warps * max(self.programs, 1)) // 8 * 8, 255)


@tuned("layer_norm", RowConfig)
def row_config(columns: int, dtype: torch.dtype, arch: int) -> RowConfig:
    """LayerNorm forward: about 16 elements per thread in each operand, so that branch, scale and weight stay in
    registers. dtype: of the residual stream."""
    width = next_power_of_two(columns)
    if width <= 2048:
        return RowConfig(rows=min(2048 // width, 32), width=width, warps=4)
    return RowConfig(rows=1, width=width, warps=min(width // 512, 16))


@tuned("layer_norm_backward", RowConfig)
def backward_rows(columns: int, dtype: torch.dtype, arch: int) -> RowConfig:
    """LayerNorm backward: three column sums live in registers too, so 8 elements per thread; 16 only at the widest.

    At about 96 registers per thread 20 warps are resident on a multiprocessor; more programs than that would wait for a
    second turn. dtype: of the normalised output.
    """
    width = next_power_of_two(columns)
    if width <= 1024:
        return RowConfig(rows=min(1024 // width, 8), width=width, warps=4, programs=5)
    if width > 4096:
        # All registers of a multiprocessor hold one row and two sums, so a third would spill. Beside an fp32 stream 16 warps
        # lack 8 bytes (Triton 3.6): eight have as many registers for each column, and what does not grow with columns once
        # instead of twice. With fp32 throughout it is eight that lack 8 bytes (Triton 3.9).
        warps = 16 if dtype == torch.float32 else 8
        return RowConfig(rows=1, width=width, warps=warps, programs=1, scale_apart=True)
    warps = min(width // 256, 16)
    return RowConfig(rows=1, width=width, warps=warps, programs=20 // warps)


@dataclass(frozen=True)
class ActivationConfig:
    block: int  # elements per program, forward
    rows: int  # tile of the backward kernel
    columns: int
    warps: int
    programs: int  # per multiprocessor, backward


# 256 columns are one 16-byte load per lane of 16-bit numbers; 8 rows give 16 elements per thread.
ACTIVATION = ActivationConfig(block=2048, rows=8, columns=256, warps=4, programs=8)


@functools.cache
def cover(length: int, pieces: int) -> tuple[int, ...]:
    """At most `pieces` powers of two, none below 16, falling, of the least sum that reaches length; absent ones are 0.

    16 is the least side of a tensor-core product. 197 -> (128, 64, 16), 257 -> (256, 16, 0), 72 -> (64, 16).
    """
    sixteenths = -(-length // 16)
    if pieces == 1:
        return (16 * next_power_of_two(sixteenths),)
    largest = 1 << (sixteenths.bit_length() - 1)
    rest = sixteenths - largest
    split = (16 * largest, *(cover(16 * rest, pieces - 1) if rest else (0,) * (pieces - 1)))
    whole = 16 * next_power_of_two(sixteenths)
    return split if sum(split) < whole else (whole, *(0,) * (pieces - 1))


def split_head_dim(head_dim: int) -> tuple[int, int]:
    first, second = cover(head_dim, 2)
    return first, second


def tail_size(step: int, seqlen: int, dtype: torch.dtype) -> int:
    """Size of the masked steps that take what whole steps leave; packed sequences (seqlen 0) can leave anything."""
    most = min(step, 16) if dtype == torch.float32 else step  # a masked step of 32 fp32 rows spills
    rest = seqlen % step
    if seqlen == 0:
        return most
    return min(cover(rest, 1)[0], most) if rest else 0


@dataclass(frozen=True)
class AttentionConfig:
    queries: int  # queries of one program, or of one step where the loop runs over queries
    keys: int  # keys of one step, or of one program
    chunks: tuple[int, ...]  # one pass: all keys, in up to three power-of-two chunks; empty: looped
    warps: int
    stages: int = 1
    registers: int | None = None  # the most per thread; None leaves it to ptxas


# Left alone, ptxas gives up a few registers for one more block per multiprocessor, and spills 4 to 16 bytes for it. With a
# limit of its own it takes what it needs: 255 is the most there are, and what eight warps of one block can have.
ALL_REGISTERS = 255

# biased: with a bias or key padding, whose values pass through registers in the shape of the logits. prepared: q and k are
# normalised or rotated on their way in.


def attention_why_not(head_dim: int, dtype: torch.dtype, bias: bool = False, prepared: bool = False) -> str | None:
    """Why the attention kernels should not run, or None. bias: with one added to the logits."""
    limit = 96 if dtype == torch.float32 else 256
    if head_dim > limit:
        return f"head dim {head_dim} with {dtype}: above {limit} a tile's operands spill out of registers"
    # Even tiles of 16 rows took all 255 registers, and with Triton 3.9 8 bytes more.
    together = 64 if dtype == torch.float32 else 128
    if head_dim > together and bias and prepared:
        what = f"head dim {head_dim} with {dtype} and a bias beside norm or rotation"
        return f"{what}: above {together} these spill out of registers together"
    return None


@tuned("attention_forward", AttentionConfig)
def attention_forward_config(
    length: int, head_dim: int, dtype: torch.dtype, precision: str, arch: int, biased: bool, prepared: bool
) -> AttentionConfig:
    if dtype == torch.float32:
        # Without tensor cores a product's operands sit in registers, 16 queries by 32 keys at the most.
        if precision == "ieee":
            return AttentionConfig(queries=16, keys=32, chunks=(), warps=4, registers=ALL_REGISTERS)
        return AttentionConfig(queries=64, keys=32, chunks=(), warps=8, registers=ALL_REGISTERS)
    if prepared and head_dim > 64:
        # Keys are normalised and turned in fp32 in the loop, and rotation pads each half of the head: eight warps share it.
        queries = 64 if arch >= 90 and head_dim <= 128 else 32
        keys = 16 if 128 < head_dim <= 160 else 32  # 128 + 32 columns spilled 8 to 40 bytes with 32 keys (Triton 3.9)
        return AttentionConfig(queries=queries, keys=keys, chunks=(), warps=8, registers=ALL_REGISTERS)
    chunks = cover(length, 3)
    # One pass: a 64-row tile of 208 logits is 104 fp32 per thread in four warps, and with 96 columns of output and a
    # bias all 255 registers are taken. Wider heads leave room for fewer logits, and so does Ampere, whose products take
    # their operands from registers where Hopper's and Blackwell's read shared memory.
    if arch >= 90:
        limit = 208 if head_dim <= 96 else 128 if head_dim <= 128 else 0
    else:
        limit = 128 if head_dim <= 64 else 0
    if biased:
        # Each bias element in flight takes its value and a 64-bit address: 128 keys at once spilled 72 to 88 bytes beside an
        # fp32 bias, so they go in two chunks. Hopper's 208 leave no register over, and spilled 8 bytes with Triton 3.9.
        # Beside norm and rotation of 64 columns 128 spilled 24, and beside 128 columns 64 spilled 32 (Triton 3.9).
        limit = min(limit, 0 if head_dim > 96 else 64 if prepared and head_dim > 32 else 128)
        chunks = (64, 64, 0) if chunks == (128, 0, 0) else chunks
    # Heads of 72 and 88 on Blackwell and prepared ones on Ampere are where ptxas, left alone, spilled 8 bytes; beside a bias
    # it spilled 8 when it was not.
    unlimited = head_dim > 64 if arch >= 100 else arch < 90 and prepared and not biased
    registers = ALL_REGISTERS if unlimited else None
    if sum(chunks) <= limit:
        return AttentionConfig(queries=64, keys=0, chunks=chunks, warps=4, registers=registers)
    if arch >= 90:
        if head_dim <= 96:
            # 64 keys that are normalised, rotated and biased spilled 16 bytes (Triton 3.6)
            keys = 32 if head_dim <= 32 or (biased and prepared) else 64
            return AttentionConfig(queries=64, keys=keys, chunks=(), warps=4, stages=2, registers=registers)
        return AttentionConfig(queries=64, keys=32, chunks=(), warps=8, stages=2)
    if head_dim <= 96:
        return AttentionConfig(queries=64, keys=32, chunks=(), warps=4 if head_dim <= 64 else 8, stages=2)
    # a bias beside 160 or 256 columns spilled 8 to 16 bytes with 32 keys
    keys = 16 if biased and head_dim > 128 else 32
    return AttentionConfig(queries=32, keys=keys, chunks=(), warps=4, registers=ALL_REGISTERS)


@dataclass(frozen=True)
class AttentionBackwardConfig:
    own: int  # looped: rows of one program, keys in the pass for dK and dV, queries in the pass for dQ
    step: int  # rows of one step of the loop, the other way round; one pass: queries
    chunks: tuple[int, ...]  # one pass: all keys; empty: looped
    warps: int
    stages: int
    registers: int | None = None


@functools.cache
def delta_rows(head_dim: int) -> int:
    return 32 if head_dim <= 128 else 16


@tuned("attention_backward", AttentionBackwardConfig)
def attention_backward_config(
    length: int, head_dim: int, dtype: torch.dtype, precision: str, arch: int, biased: bool, prepared: bool
) -> AttentionBackwardConfig:
    free = dtype != torch.float32 and not prepared and head_dim <= 128
    # Blackwell: pieces (72, 88), biases and loops over heads of 16 are where ptxas spilled 8 to 16 bytes to keep below 80,
    # 128 or 168.
    free = free and not (arch >= 100 and (biased or head_dim > 64))

    def looped(own: int, step: int, warps: int, stages: int = 1) -> AttentionBackwardConfig:
        registers = None if free and (arch < 100 or head_dim > 16) else ALL_REGISTERS
        return AttentionBackwardConfig(own=own, step=step, chunks=(), warps=warps, stages=stages, registers=registers)

    if dtype == torch.float32:
        if precision == "ieee":
            # 32 rows of their own spill already at head dim 64
            return looped(16, 16, 4 if arch >= 90 or biased or prepared else 2)
        if head_dim <= 64 and not prepared:
            # a bias beside 64 columns spilled 24 bytes on Ampere in steps of 32 rows (Triton 3.9)
            return looped(64, 16 if arch < 90 and biased and head_dim > 32 else 32, 8 if head_dim > 32 else 4)
        return looped(16, 16, 8)  # with norm, rotation and bias 64 rows of 64 columns spilled 128 bytes
    # One pass keeps dK and dV of all keys in registers: 256 keys of 64 columns are 128 fp32 per thread in eight warps.
    # Chunks of unequal size cost layout conversions, so the keys are padded to one power of two here.
    padded = max(next_power_of_two(length), 64)
    if prepared:
        # The raw tile, its tables and its norm come on top of both gradients of a tile: 256 keys in one pass spill, and so
        # do four warps. Rotation pads each half of the head (72 to 64 + 64), so heads over 64 take half the rows.
        # With both norms, rotation and packing one pass over 128 or 64 keys of 64 columns spilled 184 or 8 bytes.
        if arch >= 90 and head_dim <= 32 and padded <= 128:
            # left to itself, ptxas stopped at 128 registers and spilled 8 bytes on Blackwell (Triton 3.9)
            keys = (padded, 0, 0)
            return AttentionBackwardConfig(own=0, step=32, chunks=keys, warps=8, stages=1, registers=ALL_REGISTERS)
        if head_dim <= 64:
            return looped(64, 32, 8) if arch >= 90 else looped(16, 32, 4)
        # 32 rows of 72 or 88 columns spill 8 to 24 bytes on Hopper and Blackwell.
        return looped(16, 16, 8)
    if arch >= 90:
        limit = 256 if head_dim <= 64 else 128 if head_dim <= 80 else 0
    else:
        limit = 64 if head_dim <= 64 else 0
    if padded <= limit:
        step = 16 if padded == 256 else 32
        # beside a bias 64 keys of 64 columns take all registers of four warps on Ampere, and with Triton 3.9 8 bytes more
        warps = 8 if padded > 64 or (arch < 90 and biased and head_dim > 32) else 4
        registers = None if free else ALL_REGISTERS
        keys = (padded, 0, 0)
        return AttentionBackwardConfig(own=0, step=step, chunks=keys, warps=warps, stages=1, registers=registers)
    if arch >= 90:
        if head_dim <= 64:
            return looped(64, 32 if biased else 64, 4, stages=2)
        if head_dim <= 128:
            # a step of 32 rows beside an fp32 bias of 128 columns spilled 48 bytes (Triton 3.9)
            return looped(64, 16 if biased and head_dim > 96 else 32, 8, stages=2)
        # 64 rows of two gradients are 128 fp32 per thread at head dim 256; Blackwell keeps them in tensor memory.
        if head_dim <= 160:
            return looped(16, 16, 8)  # 128 + 32 columns spilled 592 bytes where 128 + 64 spill none
        if arch >= 100 and head_dim > 192:
            return looped(64, 16, 8)
        # steps of 32 rows beside an fp32 bias of 256 columns spilled 16 to 24 bytes
        return looped(32, 16 if biased and head_dim > 192 else 32, 8)
    if head_dim <= 64:
        return looped(64, 32, 8)
    # Ampere holds K and V of the whole loop as register operands; in two pieces (64 + 16, 64 + 32) only small tiles
    # leave room.
    if head_dim <= 96:
        return looped(16, 16 if biased else 32, 4)
    if 128 < head_dim <= 160:
        return looped(16, 16, 8)  # 128 + 32 columns spilled 100 to 900 bytes
    return looped(32, 16 if biased and head_dim > 192 else 32, 8)


@dataclass(frozen=True)
class BiasGradientConfig:
    tile: int  # side of the square tile of the bias
    warps: int
    programs: int  # wanted per multiprocessor; the walk over heads is split to reach them
    registers: int | None = None


@tuned("bias_gradient", BiasGradientConfig)
def bias_gradient_config(
    head_dim: int, dtype: torch.dtype, precision: str, arch: int, prepared: bool
) -> BiasGradientConfig:
    if dtype == torch.float32:
        narrow = head_dim <= 64 and not prepared and not (precision == "tf32" and arch >= 100)
        return BiasGradientConfig(tile=32 if narrow else 16, warps=4, programs=4, registers=ALL_REGISTERS)
    if prepared:
        return BiasGradientConfig(tile=32 if head_dim <= 64 else 16, warps=8, programs=4, registers=ALL_REGISTERS)
    if head_dim > 128:
        # 32 rows of 192 columns spilled 160 bytes beside an fp32 bias (Triton 3.9)
        return BiasGradientConfig(tile=16, warps=8, programs=4, registers=ALL_REGISTERS)
    # Four operands of a tile take eight warps at 64 rows, and Ampere, which holds them in registers, 32 rows; so does
    # Blackwell over 96 columns, where 64 rows spilled 8 to 24 bytes.
    if arch >= 90:
        return BiasGradientConfig(tile=32 if arch >= 100 and head_dim > 96 else 64, warps=8, programs=4)
    return BiasGradientConfig(tile=32, warps=4 if head_dim <= 96 else 8, programs=4, registers=ALL_REGISTERS)


@dataclass(frozen=True)
class ProductConfig:
    """A tile [rows, columns] of the result, summed in steps of `depth`; the switches are explained in mlp.py."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0
    descriptors: bool = False
    halved: bool = False
    registers: int | None = None  # the most per thread; None leaves it to ptxas


def blackwell_limit(arch: int) -> int | None:
    """For products in small tiles: there ptxas stops at 64, 72, 96 or 128 registers and spills 8 to 24 bytes."""
    return ALL_REGISTERS if arch >= 100 else None


# 64 pixels in a row of a tile are at least 64 bytes, two sectors; 32 rows give 16 elements per thread.
PATCHIFY = ProductConfig(rows=32, columns=64, depth=0, warps=4, stages=1)


def _small(columns: int, limit: int) -> int:
    """A side of a tile no larger than the matrix itself needs, at least 16."""
    return max(16, min(limit, next_power_of_two(columns)))


@tuned("patch_embed", ProductConfig)
def patch_embed_config(columns: int, depth: int, dtype: torch.dtype, precision: str, arch: int) -> ProductConfig:
    if dtype == torch.float32:
        return ProductConfig(rows=64, columns=_small(columns, 32), depth=_small(depth, 16), warps=4, stages=2)
    # Pixels pass through registers to be converted, so one tile of them should serve many columns; depth 64 is one
    # wgmma swizzle row of 128 bytes.
    return ProductConfig(rows=128, columns=_small(columns, 128), depth=_small(depth, 64), warps=8, stages=3)


@tuned("patch_image", ProductConfig)
def patch_image_config(columns: int, depth: int, dtype: torch.dtype, precision: str, arch: int) -> ProductConfig:
    """The images' gradient: the forward's rule, with a patch's pixels as columns. Tuned apart, as here neither operand
    passes through registers and what fits in shared memory is another matter."""
    return patch_embed_config.rule(columns, depth, dtype, precision, arch)


@tuned("patch_weight", ProductConfig)
def patch_weight_config(
    rows: int, columns: int, wide_pixels: bool, dtype: torch.dtype, precision: str, arch: int
) -> ProductConfig:
    """wide_pixels: of fp32."""
    if dtype == torch.float32:
        limit = blackwell_limit(arch)
        return ProductConfig(_small(rows, 64), _small(columns, 64), depth=16, warps=4, stages=2, registers=limit)
    # 128 columns of fp32 pixels spilled 192 bytes on Ampere and 32 on Blackwell
    side = 64 if wide_pixels and not 90 <= arch < 100 else 128
    return ProductConfig(rows=_small(rows, 128), columns=_small(columns, side), depth=64, warps=8, stages=3)


ROW_GROUP = 8  # row blocks of a product that share the weights in L2
FEW_ROWS = 2048  # 16 tiles of 128 rows: with fewer, a wide product has less than one tile for each multiprocessor
WIDE_RESIDUAL = "wide residual"  # the epilogue that adds a 16-bit product to an fp32 stream


@functools.cache
def linear_config(
    rows: int, columns: int, depth: int, epilogue: str | None, dtype: torch.dtype, arch: int
) -> ProductConfig:
    """Tile of x W^T; `columns` of the result, each of which "swiglu" takes two sums for. epilogue: an activation,
    WIDE_RESIDUAL, or None for anything lighter."""
    if dtype == torch.float32:
        # Without tensor cores a product's operands sit in registers too: a second sum leaves room for half a tile.
        side = _small(columns, 32 if epilogue == "swiglu" else 64)
        limit = blackwell_limit(arch)
        return ProductConfig(64, side, _small(depth, 16), warps=4, stages=2, halved=True, registers=limit)
    heavy = epilogue in ("swiglu", WIDE_RESIDUAL)
    if rows <= FEW_ROWS:  # half a tile, which doubles the programs
        side = _small(columns, 64 if heavy else 128)
        config = ProductConfig(rows=64, columns=side, depth=_small(depth, 64), warps=4, stages=3, halved=True)
        limit = blackwell_limit(arch)
        return replace(config, programs=2, descriptors=True, registers=limit) if arch >= 90 else config
    if arch < 90:
        # 128 x 128 sums are 64 fp32 per thread in eight warps: room for the epilogue's second operand.
        side = _small(columns, 64 if epilogue == "swiglu" else 128)
        return ProductConfig(rows=128, columns=side, depth=_small(depth, 64), warps=8, stages=3, halved=True)
    # 128 x 256 is the widest tile whose sums fit (128 per thread), and reads the fewest bytes for each product; its two
    # halves are finished one after the other. An fp32 stream or a second sum takes the room of the other half.
    side = _small(columns, 128 if heavy else 256)
    return ProductConfig(
        rows=128, columns=side, depth=_small(depth, 64), warps=8, stages=3, programs=1, descriptors=True, halved=True
    )


@functools.cache
def hidden_backward_config(
    rows: int, columns: int, depth: int, kind: str, dtype: torch.dtype, arch: int
) -> ProductConfig:
    """An activation's derivative needs several registers for each sum, so half as many sums per thread as
    linear_config's."""
    if dtype == torch.float32:
        return ProductConfig(rows=64, columns=_small(columns, 32), depth=_small(depth, 16), warps=4, stages=2)
    config = ProductConfig(
        rows=128, columns=_small(columns, 64), depth=_small(depth, 64), warps=8, stages=3, halved=True
    )
    if arch < 90:
        return config
    if rows <= FEW_ROWS:
        return replace(config, programs=1, descriptors=True, registers=blackwell_limit(arch))
    return replace(config, columns=_small(columns, 128), programs=1, descriptors=True)


@dataclass(frozen=True)
class ProductRow:
    """A row of product_table.py."""

    arch: int | None
    dtype: str | None
    unit: str | None
    rows: str | None
    width: str | None
    path: str
    config: ProductConfig | None
    reason: str


PATHS = ("library", "fused")
UNITS = ("linear", "linear_activation", "swiglu", "linear_residual", "hidden_backward")
PATCH_UNITS = ("patch_embed", "patch_weight", "patch_image")  # of patch_embed.py: the product with the pixels inside it
CHIPS = (80, 90, 100)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_class(rows: int) -> str:
    return "few" if rows <= FEW_ROWS else "many"


def width_class(columns: int, depth: int) -> str:
    """By the narrower side, the model's width in all of a block's products: 384 is narrow, 768 medium, 1280 wide."""
    side = min(columns, depth)
    return "narrow" if side <= 512 else "medium" if side <= 1024 else "wide"


def product_row(entry: dict) -> ProductRow:
    """A checked row; ValueError names what does not fit."""
    config = entry["config"]
    row = ProductRow(**(entry | {"config": None if config is None else ProductConfig(**config)}))
    allowed = {
        "arch": (None, *CHIPS),
        "unit": (None, *UNITS, *PATCH_UNITS),
        "rows": (None, "few", "many"),
        "width": (None, "narrow", "medium", "wide"),
        "path": PATHS,
    }
    for name, values in allowed.items():
        if getattr(row, name) not in values:
            raise ValueError(f"product_table.py: {name} is {getattr(row, name)!r}; allowed are {values}")
    return row


@functools.cache
def product_rows() -> tuple[ProductRow, ...]:
    return tuple(product_row(entry) for entry in ROWS)


@functools.lru_cache(maxsize=4096)
def product_choice(unit: str, rows: int, columns: int, depth: int, dtype: torch.dtype, arch: int) -> ProductRow:
    """The table's row for a product of [rows, depth] with `columns` outputs."""
    wanted = {
        "arch": max(chip for chip in CHIPS if chip <= max(arch, CHIPS[0])),
        "dtype": dtype_name(dtype),
        "unit": unit,
        "rows": row_class(rows),
        "width": width_class(columns, depth),
    }
    for row in product_rows():
        if all(getattr(row, name) in (None, value) for name, value in wanted.items()):
            return row
    raise ValueError(f"product_table.py has no row for {wanted}; its last one should fit everything")
