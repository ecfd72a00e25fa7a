"""What `make aot` compiles: every launcher on meta tensors, at shapes that reach every row of the tables of configurations.

Attention's rows (configs.py) depend on the dtype, the head dim (classes up to 32, 64, 80, 96, 128, 160, 192 and 256), the length
(one pass over 64, 112, 128 or 208 keys, or a loop), and on whether something is added to the logits (biased) or done to q and
k (prepared). What else could differ is compiled at its heaviest:
- 72 columns have the pieces of 80 and masks besides, 88 those of 96.
- Nothing of a length reaches a kernel but its row and, in loops, the size of the last step: 632 leaves the largest. So a
  length is compiled only where it is the first of its row.
- The four option sets of KINDS are the heaviest of plain, biased, prepared and both: an fp32 bias, as under autocast, takes
  more registers than a 16-bit one; LayerNorm does what RMSNorm does and more; tables of E columns are read twice where those
  of E / 2 are read once. bf16 has all four of each row, the other dtypes the heaviest and the plainest,
  and only such chunks of keys as none larger stand for.
- Where ptxas chooses the number of registers itself (16-bit heads up to 128, not prepared), a lighter kernel can spill where
  a heavier one does not: there, at the usual widths 64 and 128, options are compiled one by one too.
The other rules depend on widths and dtypes, all of which are here, with widths that leave masked columns.

All this is compiled by the rules alone, as if tile_table.py were empty; its rows come after (aot_tuned.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import (
    activation,
    attention_backward,
    attention_bias,
    attention_forward,
    attention_heads,
    configs,
    device,
    layer_norm,
    mlp,
    patch_embed,
    patchify,
)
from .tile_rows import TileRow

BATCH = 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
ALL, NO_PRODUCT, HALF, BF16 = tuple(DTYPES), ("bf16", "fp16", "fp32"), ("bf16", "fp16"), ("bf16",)
WIDE = ("fp32", "tf32")


class Case(NamedTuple):
    name: str
    launch: Callable[[torch.dtype], None]
    dtypes: tuple[str, ...]
    shape: dict[str, int]  # what floors are computed for


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def norm_case(D: int, stream: torch.dtype | None = None) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        T = BATCH * 197
        x, y = meta(T, D, dtype=stream or dtype), meta(T, D, dtype=dtype)
        row, column, factor = meta(T), meta(D), meta(BATCH)
        layer_norm.layer_norm_forward(x, None, None, None, column, column, 1e-6, None, y, row, row)
        layer_norm.layer_norm_forward(x, y, column, factor, column, column, 1e-6, x, y, row, row)
        layer_norm.layer_norm_apply(x, row, row, column, column, y)
        layer_norm.scale_add_forward(x, y, column, factor, x)
        layer_norm.layer_norm_backward(y, None, x, row, row, column, None, None, None, x, None, None, column, column)
        layer_norm.layer_norm_backward(y, x, x, row, row, column, y, column, factor, x, y, column, column, column)

    return launch


def activation_case(F: int) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        h = meta(BATCH * 197, F, dtype=dtype)
        for kind in ("gelu", "gelu_tanh", "quick_gelu"):
            activation.activation_forward(h, kind, h)
            activation.activation_backward(h, h, kind, h, None, None)
            activation.activation_backward(h, h, kind, h, h, meta(F))
        gated = meta(BATCH * 197, 2 * F, dtype=dtype)
        activation.activation_forward(gated, "swiglu", h)
        activation.activation_backward(gated, h, "swiglu", gated, None, None)
        activation.activation_backward(gated, h, "swiglu", gated, h, meta(2 * F))

    return launch


LENGTHS = (632, 197, 128, 104, 56)
# Plain, biased, prepared, both; and whether each is biased, prepared.
KINDS = {"": (False, False), "rope norm packed": (False, True), "bias32 padding": (True, False), "all": (True, True)}


def stands_for(other: Any, row: Any) -> bool:
    """Whether ``other`` is ``row``, or has in one pass as many keys in each chunk and more in one."""
    more = all(a >= b for a, b in zip(other.chunks, row.chunks, strict=False))
    return more and bool(other.chunks) == bool(row.chunks) and replace(other, chunks=()) == replace(row, chunks=())


def wanted_here(choose: Callable[..., Any], L: int, options: str, biased: bool, prepared: bool, *rest: object) -> bool:
    """Whether this length and these options are compiled for their row; rest: head dim, dtype, precision, architecture."""

    def row(length: int, kind: tuple[bool, bool]) -> Any:
        return choose(length, *rest, *kind)

    this, everything = row(L, (biased, prepared)), rest[1] == torch.bfloat16
    for other in LENGTHS[: LENGTHS.index(L)]:
        earlier = row(other, (biased, prepared))
        if this == earlier or (not everything and stands_for(earlier, this)):
            return False
    if options not in KINDS or everything:
        return True
    alike = [kind for kind, flags in KINDS.items() if this in [row(length, flags) for length in LENGTHS]]
    return options in (alike[0], alike[-1])


def attention_case(L: int, E: int, options: str, tuned: TileRow | None = None) -> Callable[[torch.dtype], None]:
    """options: words of "bias", "bias32", "padding", "packed", "rope", "norm", or "all" that goes together. tuned: only
    what this row of tile_table.py decides.

    "rope" turns halves by one angle for each pair, as DINOv3, with norms or in "all" by one for each element, there
    interleaved, as EVA. Four registers and a class token do not turn.
    """
    words = {"rope", "interleaved", "norm", "bias32", "padding"} if options == "all" else set(options.split())

    def launch(dtype: torch.dtype) -> None:
        biased, prepared = words & {"bias", "bias32"}, bool(words & {"rope", "norm"})
        if biased and prepared and configs.attention_why_not(E, dtype, True, True):
            biased = set()  # padding alone then
        if configs.attention_why_not(E, dtype, bool(biased), prepared):
            return
        H, T = 12, BATCH * L
        qkv, out, lse = meta(T, 3, H, E, dtype=dtype), meta(T, H, E, dtype=dtype), meta(H, T)
        bias = meta(1, H, L, L, dtype=torch.float32 if "bias32" in words else dtype) if biased else None
        d_bias = meta(1, H, L, L) if biased else None
        padding = meta(BATCH, L, dtype=torch.bool) if "padding" in words else None
        cu_seqlens = meta(BATCH + 1, dtype=torch.int32) if "packed" in words else None
        heads = attention_heads.HeadOptions()
        if "rope" in words:
            table = meta(T if "packed" in words else L - 5, E if "norm" in words else E // 2)
            heads = heads._replace(cos=table, sin=table, interleaved="interleaved" in words)
        d_norm = meta(2, E) if "norm" in words else None
        if "norm" in words:
            vector, kind = meta(E), "layer_norm"
            heads = heads._replace(q_norm=kind, q_weight=vector, q_bias=vector, q_eps=1e-6)
            heads = heads._replace(k_norm=kind, k_weight=vector, k_bias=vector, k_eps=1e-6)
        lengths = (cu_seqlens, L, 0 if "packed" in words else L)
        given = (E**-0.5, bias, padding, heads, *lengths)
        flags = (bias is not None or padding is not None, heads.active)
        rest = (E, dtype, device.dot_precision(dtype), device.device_properties(qkv.device).arch)
        names = ("length", "head_dim", "dtype", "precision", "arch", "biased", "prepared")
        arguments = dict(zip(names, (L, *rest, *flags), strict=True))

        def wanted(kernel: str) -> bool:
            if tuned is not None:
                return tuned.kernel == kernel and tuned.fits(arguments)
            if kernel == "bias_gradient":  # its own rule has a row for each kind
                return LENGTHS[0] == L
            return wanted_here(getattr(configs, f"{kernel}_config"), L, options, *flags, *rest)

        if wanted("attention_forward"):
            attention_forward.attention_forward(qkv, *given, out, lse)
        if wanted("attention_backward"):
            attention_backward.attention_backward(out, qkv, out, lse, *given, qkv, d_bias, d_norm, d_norm)
        elif d_bias is not None and wanted("bias_gradient"):
            masks = (bias, attention_forward.as_bytes(padding), heads, cu_seqlens, L)
            attention_bias.attention_bias_gradient(out, qkv, lse, lse, E**-0.5, *masks, d_bias)

    return launch


def patch_case(P: int, D: int, pixels: torch.dtype, channels_last: bool) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        size, R = 16 * P, 1
        images = meta(BATCH, 3, size, size, dtype=pixels)
        images = images.to(memory_format=torch.channels_last) if channels_last else images
        K, N = 3 * P * P, 256
        weight, tokens = meta(D, 3, P, P, dtype=dtype), meta(BATCH, R + N, D, dtype=dtype)
        rows, d_images = meta(BATCH * N, K, dtype=dtype), meta(BATCH, 3, size, size)
        channel, column, position, prefix = meta(3), meta(D), meta(R + N, D), meta(R, D)
        patch_embed.patch_embed_forward(images, weight, column, position, prefix, channel, channel, tokens)
        patch_embed.patch_embed_weight_gradient(images, tokens, channel, channel, dtype, meta(D, 3, P, P))
        patch_embed.patch_embed_image_gradient(tokens, weight, channel, d_images)
        patchify.patchify(images, P, channel, channel, rows)
        patchify.unpatchify(rows, P, channel, d_images)
        patchify.assemble_tokens(meta(BATCH * N, D, dtype=dtype), column, position, prefix, tokens)

    return launch


def mlp_case(D: int, F: int, T: int, kinds: tuple[str, ...]) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        x, h, column, hidden = meta(T, D, dtype=dtype), meta(T, F, dtype=dtype), meta(D), meta(F)
        w1, w2, stream = meta(F, D, dtype=dtype), meta(D, F, dtype=dtype), meta(T, D)
        mlp.linear_forward(x, w1, hidden, h)
        for kind in kinds:
            mlp.linear_activation_forward(x, w1, hidden, kind, None, h)
            mlp.linear_activation_forward(x, w1, hidden, kind, h, h)
            mlp.hidden_backward(x, w2, h, kind, h, h, hidden)
        gated, gated_w1 = meta(T, 2 * F, dtype=dtype), meta(2 * F, D, dtype=dtype)
        mlp.linear_activation_forward(x, gated_w1, meta(2 * F), "swiglu", gated, h)
        mlp.hidden_backward(x, w2, gated, "swiglu", gated, h, meta(2 * F))
        mlp.linear_residual_forward(h, w2, column, x, None, None, x)
        mlp.linear_residual_forward(h, w2, column, stream, column, meta(1), stream)

    return launch


HEAD_DIMS = (32, 64, 72, 88, 128, 160, 192, 256)
ALONE = ("packed", "bias", "bias32", "padding", "rope", "norm")


def attention_cases() -> Iterator[Case]:
    for E in HEAD_DIMS:
        alone = ALONE if E == 64 else ALONE[:2] if E == 128 else ()
        for L, options, dtypes in (
            *(
                (L, options, ALL if L == 632 else HALF) for L in LENGTHS for options in KINDS
            ),  # fp32 loops at every length
            *((L, options, BF16) for L in (632, 197) for options in alone),
        ):
            yield Case(f"attention E={E} L={L} {options}".strip(), attention_case(L, E, options), dtypes, heads(L, E))
    # the smallest, and those that fill their pieces, where only the classes' other members stand for them
    for E in (16, 48):
        yield Case(f"attention E={E} L=632", attention_case(632, E, ""), HALF, heads(632, E))


def heads(L: int, E: int) -> dict[str, int]:
    return {"B": BATCH, "L": L, "H": 12, "E": E}


def all_cases() -> Iterator[Case]:
    yield from attention_cases()
    for D, F in ((1152, 4304), (768, 3072), (192, 768)):
        shape, kinds = {"D": D, "F": F}, ("gelu",) if D == 192 else ("gelu", "gelu_tanh", "quick_gelu")
        yield Case(
            f"mlp D={D}", mlp_case(D, F, BATCH * 197, kinds), ALL if F == 4304 else BF16, {"T": BATCH * 197, **shape}
        )
        yield Case(f"mlp D={D} one image", mlp_case(D, F, 197, kinds), HALF if F == 4304 else BF16, {"T": 197, **shape})
    for P, D in ((4, 96), (8, 384), (14, 1280), (16, 768), (32, 1024)):
        shape = {"B": BATCH, "N": 256, "K": 3 * P * P, "D": D}
        dtypes = ALL if P in (4, 14) else BF16
        yield Case(f"patch_embed P={P} D={D} uint8", patch_case(P, D, torch.uint8, False), dtypes, shape)
        yield Case(f"patch_embed P={P} D={D} fp32 NHWC", patch_case(P, D, torch.float32, True), BF16, shape)
    for D in (33, 192, 768, 1280, 4096, 6144, 8192):
        shape = {"T": BATCH * 197, "D": D}
        yield Case(f"layer_norm D={D}", norm_case(D), ("bf16", "fp32"), shape)
        yield Case(f"layer_norm D={D} fp32 stream", norm_case(D, torch.float32), HALF, shape)
    yield Case("activation F=3072", activation_case(3072), NO_PRODUCT, {"T": BATCH * 197, "F": 3072})


def quick_cases() -> Iterator[Case]:
    """ViT-B's shapes and SigLIP's heads in bf16, for CI."""
    shape = {"T": BATCH * 197, "D": 768}
    yield Case("layer_norm D=768", norm_case(768), BF16, shape)
    yield Case("layer_norm D=768 fp32 stream", norm_case(768, torch.float32), BF16, shape)
    yield Case("activation F=3072", activation_case(3072), BF16, {"T": BATCH * 197, "F": 3072})
    for E, L, options in (
        *((64, 632, options) for options in ("", "packed", "bias", "all")),
        *((64, 197, options) for options in ("", "rope", "norm")),
        *((72, L, "") for L in (632, 197)),
    ):
        yield Case(f"attention E={E} L={L} {options}".strip(), attention_case(L, E, options), BF16, heads(L, E))
    shape = {"B": BATCH, "N": 256, "K": 768, "D": 768}
    yield Case("patch_embed P=16 D=768 uint8", patch_case(16, 768, torch.uint8, False), BF16, shape)
    yield Case("mlp D=768", mlp_case(768, 3072, BATCH * 197, ("gelu",)), BF16, {"T": BATCH * 197, "D": 768, "F": 3072})
