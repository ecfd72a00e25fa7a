"""The places and search spaces of attention: forward, backward and the gradient of a bias.

Heads of 64 (ViT-Ti to ViT-L, DINOv2 and DINOv3), and of 72 and 80 (SigLIP's So400m, ViT-H), which have the same pieces and
so one row; lengths of ViTs at 224 to 448 pixels. With a bias or rotation heads of 64 only; with both at once the rules
decide. A candidate is bounded by its fp32 numbers per thread, as what needs more than the 255 registers can only spill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import attention_backward, attention_bias, attention_forward
from .attention_heads import HeadOptions
from .configs import (
    AttentionBackwardConfig,
    AttentionConfig,
    BiasGradientConfig,
    attention_backward_config,
    attention_forward_config,
    bias_gradient_config,
    cover,
    split_head_dim,
)
from .tile_rows import heaviest_length
from .tune_tiles import Place, candidates
from .tune_trial import Run, Setting

TOKENS = 64 * 197  # of a batch: as many at every length
# Ranges of lengths, and the length that each is timed at. Up to 272 one per 16 tokens, as chunks of keys come; beyond, loops
# only, which differ in their last step.
LENGTHS: dict[tuple[int, int | None], int] = {
    (193, 208): 197, (241, 256): 256, (257, 272): 257, (289, 640): 577, (641, None): 1025,
}  # fmt: skip
# biased, prepared: the options that are timed, and those that have to fit.
KINDS = {
    (False, False): ("", ("", "packed")),
    (True, False): ("bias", ("bias32 padding", "padding")),
    (False, True): ("rope", ("rope", "rope norm packed")),
}
DRY_LENGTHS: dict[tuple[bool, bool], dict[tuple[int, int | None], int]] = {
    (False, False): {(17, 32): 20},
    (True, False): {(17, 32): 20},
    (False, True): {(33, 48): 40},
}
HEADS = {(64,): tuple(KINDS), (72, 80): ((False, False),)}
DRY_HEADS = {(16,): tuple(KINDS)}
MOST = 128  # fp32 numbers per thread in one tile of logits, or in a tile's sums


def inputs(B: int, L: int, H: int, E: int, options: str, dtype: torch.dtype, on: str) -> dict[str, Any]:
    """Arguments of the launchers by name; options: words of bias, bias32, padding, packed, rope and norm."""
    generator, wanted, T = torch.Generator(on).manual_seed(0), set(options.split()), B * L

    def random(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=on).to(kind)

    bias = padding = cu_seqlens = None
    if wanted & {"bias", "bias32"}:
        bias = random(1, H, L, L, kind=torch.float32 if "bias32" in wanted else dtype)
    if "padding" in wanted:
        padding = torch.arange(L, device=on).expand(B, L) >= L - L // 4
    if "packed" in wanted:  # one sequence of length L, then two that share L
        ends = [end for b in range(1, B + 1) for end in ([b * L - L // 3, b * L] if b % 2 == 0 else [b * L])]
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=on)
    heads = HeadOptions()
    if "rope" in wanted:
        angle = random(T if "packed" in wanted else L - 5, E if "norm" in wanted else E // 2)
        heads = heads._replace(cos=angle.cos(), sin=angle.sin())
    if "norm" in wanted:
        heads = heads._replace(q_norm="layer_norm", q_weight=random(E), q_bias=random(E), q_eps=1e-6)
        heads = heads._replace(k_norm="layer_norm", k_weight=random(E), k_bias=random(E), k_eps=1e-6)
    return {
        "qkv": random(T, 3, H, E, kind=dtype),
        "given": (E**-0.5, bias, padding, heads, cu_seqlens, L, 0 if "packed" in wanted else L),
        "out": torch.empty(T, H, E, device=on, dtype=dtype),
        "lse": torch.empty(H, T, device=on),
    }


def forward_run(*shape: Any) -> Run:
    made = inputs(*shape)
    outputs = [made["out"], made["lse"]]
    return Run(partial(attention_forward.attention_forward, made["qkv"], *made["given"], *outputs), outputs)


def backward_run(*shape: Any, with_bias: bool = False) -> Run:
    made = inputs(*shape)
    qkv, given, out, lse = made.values()
    attention_forward.attention_forward(qkv, *given, out, lse)
    _scale, bias, _padding, heads, *_lengths = given
    d_qkv, d_bias = torch.empty_like(qkv), None
    if bias is not None and with_bias:
        d_bias = torch.empty(bias.shape, device=bias.device)
    d_norms = [torch.empty(2, qkv.shape[3], device=qkv.device) if heads.q_norm else None for _ in "qk"]
    launch = partial(
        attention_backward.attention_backward, torch.flip(out, [0]), qkv, out, lse, *given, d_qkv, d_bias, *d_norms
    )
    return Run(launch, [t for t in (d_qkv, d_bias, *d_norms) if t is not None])


backward_with_bias = partial(backward_run, with_bias=True)  # stores delta for the bias's gradient, too


def bias_run(*shape: Any) -> Run:
    qkv, given, out, lse = inputs(*shape).values()
    attention_forward.attention_forward(qkv, *given, out, lse)
    scale, bias, padding, heads, cu_seqlens, _longest, seqlen = given
    d_bias, hidden = torch.empty(bias.shape, device=bias.device), attention_forward.as_bytes(padding)
    rest = (scale, bias, hidden, heads, cu_seqlens, seqlen, d_bias)
    # `out` as its own gradient; delta is what backward would have summed
    delta = out.float().square().sum(2).T.contiguous()
    return Run(partial(attention_bias.attention_bias_gradient, out, qkv, lse, delta, *rest), [d_bias])


def coverings(lengths: tuple[int, int | None]) -> Iterator[tuple[int, ...]]:
    """All keys at once, in one to three chunks, of which only the last may be cut off at any of the lengths."""
    first, last = lengths
    for pieces in (3, 2, 1):
        if last is not None:
            present = cover(last, pieces)
            chunks = (*present, *(0,) * (3 - len(present)))
            if sum(chunks[: sum(n > 0 for n in chunks) - 1]) <= first:
                yield chunks


def forward_space(
    rule: AttentionConfig, lengths: tuple[int, int | None], dtype: torch.dtype, precision: str
) -> Iterator[AttentionConfig]:
    if dtype == torch.float32:
        tiles = [(q, k, w) for q in (16, 32, 64) for k in (16, 32, 64) for w in (4, 8)]
        most = 8 if precision == "ieee" else 16  # without tensor cores a tile's operands sit in registers too
    else:
        for chunks in coverings(lengths):
            for queries, warps in ((32, 4), (64, 4), (64, 8), (128, 8)):
                if queries * sum(chunks) <= MOST * 32 * warps:
                    yield replace(rule, queries=queries, keys=0, chunks=chunks, warps=warps, stages=1)
        tiles = [(64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 64, 8), (128, 32, 4), (128, 64, 8), (128, 128, 8)]
        most = 64
    for queries, keys, warps in tiles:
        if queries * keys <= most * 32 * warps:
            for stages in (1, 2) if dtype == torch.float32 else (2, 3):
                yield replace(rule, queries=queries, keys=keys, chunks=(), warps=warps, stages=stages)


def backward_space(
    rule: AttentionBackwardConfig, lengths: tuple[int, int | None], E: int, dtype: torch.dtype, precision: str
) -> Iterator[AttentionBackwardConfig]:
    columns = sum(split_head_dim(E))
    if dtype == torch.float32:
        tiles = [(own, step, w) for own in (16, 32, 64) for step in (16, 32) for w in (4, 8)]
        most = 16 if precision == "ieee" else 32
    else:
        for chunks in coverings(lengths):
            for step in (16, 32, 64):
                for warps in (4, 8):
                    if 2 * sum(chunks) * columns <= MOST * 32 * warps:  # dK and dV
                        yield replace(rule, own=0, step=step, chunks=chunks, warps=warps, stages=1)
        tiles = [(32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 32, 8), (64, 64, 8), (128, 32, 8), (128, 64, 8)]
        most = MOST
    for own, step, warps in tiles:
        if 2 * own * columns <= most * 32 * warps:
            for stages in (1, 2):
                yield replace(rule, own=own, step=step, chunks=(), warps=warps, stages=stages)


def bias_space(rule: BiasGradientConfig, dtype: torch.dtype) -> Iterator[BiasGradientConfig]:
    for tile, warps in ((16, 4), (32, 4), (32, 8)) if dtype == torch.float32 else ((32, 4), (64, 4), (64, 8), (128, 8)):
        for programs in (2, 4, 8):
            yield replace(rule, tile=tile, warps=warps, programs=programs)


def head_dims(E: int) -> tuple[int, int]:
    """First and last head dim in the pieces of E."""
    same = [e for e in range(1, 257) if split_head_dim(e) == split_head_dim(E)]
    return same[0], same[-1]


def timed(
    run: Callable[..., Run], L: int, heads: tuple[int, ...], options: str, dtype: torch.dtype, setting: Setting
) -> dict[str, Callable[[], Run]]:
    B, H = (1, 1) if setting.dry else (max(1, TOKENS // L), 12)
    names = {E: f"{B} x {L} x {H} x {E} {options}".strip() for E in heads}  # images, tokens, heads, head dim
    return {names[E]: partial(run, B, L, H, E, options, dtype, setting.on) for E in heads}


def ranges(kind: tuple[bool, bool], setting: Setting) -> dict[tuple[int, int | None], int]:
    return DRY_LENGTHS[kind] if setting.dry else LENGTHS


def heavy(
    run: Callable[..., Run],
    L: int,
    heads: tuple[int, ...],
    options: Iterable[str],
    dtype: torch.dtype,
    setting: Setting,
) -> tuple[Callable[[], Run], ...]:
    """Small batches: options, not sizes, decide what a program needs."""
    options = tuple(options)[-1:] if setting.dry else options
    return tuple(partial(run, 2, L, 1, E, words, dtype, setting.on) for words in options for E in heads)


def sequence_place(
    kernel: str, between: tuple[int, int | None], heads: tuple[int, ...], kind: tuple[bool, bool],
    dtype: torch.dtype, precision: str, setting: Setting,
) -> Place:  # fmt: skip
    """Forward's or backward's row for a range of lengths."""
    (options, most), L, (biased, prepared) = KINDS[kind], ranges(kind, setting)[between], kind
    arguments = (L, heads[-1], dtype, precision, setting.arch, biased, prepared)
    rule: Any
    space: Iterator[Any]
    if kernel == "attention_forward":
        rule, run, full = attention_forward_config.rule(*arguments), forward_run, forward_run
        space = forward_space(rule, between, dtype, precision)
    else:
        rule, run, full = attention_backward_config.rule(*arguments), backward_run, backward_with_bias
        space = backward_space(rule, between, heads[-1], dtype, precision)
    where = place_of(heads, dtype, precision, setting) | {"length": between, "biased": biased, "prepared": prepared}
    return Place(
        kernel, where,
        timed(run, L, heads, options, dtype, setting),
        heavy(full, heaviest_length(*between), heads, most, dtype, setting),
        candidates(space, rule, setting),
        compile_seconds=2.0 if kernel == "attention_forward" else 4.0,
    )  # fmt: skip


def bias_place(heads: tuple[int, ...], prepared: bool, dtype: torch.dtype, precision: str, setting: Setting) -> Place:
    rule = bias_gradient_config.rule(heads[-1], dtype, precision, setting.arch, prepared)
    lengths, options = (20,) if setting.dry else (197, 577), "bias rope" if prepared else "bias"
    runs = {name: run for L in lengths for name, run in timed(bias_run, L, heads, options, dtype, setting).items()}
    most = ("bias32 padding rope norm",) if prepared else ("bias32 padding",)
    return Place(
        "bias_gradient", place_of(heads, dtype, precision, setting) | {"prepared": prepared},
        runs, heavy(bias_run, lengths[0], heads, most, dtype, setting),
        candidates(bias_space(rule, dtype), rule, setting), compile_seconds=2.0,
    )  # fmt: skip


def place_of(heads: tuple[int, ...], dtype: torch.dtype, precision: str, setting: Setting) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {"arch": setting.arch, "dtype": name, "precision": precision, "head_dim": head_dims(heads[0])}


def places(kernel: str, dtype: torch.dtype, precision: str, setting: Setting) -> Iterator[Place]:
    """Of attention_forward, attention_backward or bias_gradient."""
    for heads, kinds in (DRY_HEADS if setting.dry else HEADS).items():
        if kernel != "bias_gradient":
            for kind in kinds:
                for between in ranges(kind, setting):
                    yield sequence_place(kernel, between, heads, kind, dtype, precision, setting)
        elif (True, False) in kinds:
            for prepared in (False, True):
                yield bias_place(heads, prepared, dtype, precision, setting)
