"""What the parity sweep checks beside the benchmarks' own cases: options and ops that no benchmark times.

Legend: B images, L tokens, H heads, E head dim, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vitfast import ops
from vitfast.ops.attention import attention_ref
from vitfast.ops.linear_residual import linear_residual_ref
from vitfast.ops.mlp import mlp_ref
from vitfast.ops.norm_attention import norm_attention_ref
from vitfast.ops.norm_linear import norm_linear_ref

from .gate import Inputs
from .harness import TORCH_DTYPE, Case
from .peers import own_providers

PACKED = (5, 0, 197, 1, 64)  # lengths of a packed batch's sequences: an empty one, one token, whole tiles and not


def random(*shape: int, seed: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std + mean


def case_of(
    op: str,
    run: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: dict[str, Tensor],
    dtype: str,
    device: str,
    wide: tuple[str, ...] = (),
    gradients: bool = True,
) -> Case:
    """Every tensor gets a gradient, or none does. ``wide``: those that stay fp32, as parameters under autocast."""
    kind = TORCH_DTYPE[dtype]

    def inputs() -> Inputs:
        return {name: t.to(device, torch.float32 if name in wide else kind) for name, t in tensors.items()}

    return Case(
        op=op,
        shape={},
        dtype=dtype,
        device=device,
        inputs=inputs,
        grads=tuple(tensors) if gradients else (),
        reference=reference,
        providers=partial(own_providers, op, run, device, kind),
        work={},
    )


def _packed(function: Callable[..., Tensor], qkv: Tensor, **more: Any) -> Tensor:
    bounds = torch.tensor([0, *PACKED]).cumsum(0).to(qkv.device, torch.int32)
    return function(qkv, cu_seqlens=bounds, max_seqlen=max(PACKED), **more)


def _apart(qkv: Tensor) -> Tensor:
    return torch.cat([attention_ref(part.unsqueeze(0))[0] for part in qkv.split(PACKED)])


def attention_cases(dtype: str, device: str, dry: bool) -> Iterator[tuple[str, Case]]:
    H = 2
    for L, E in ((9, 16),) if dry else ((17, 64), (50, 64), (197, 64), (197, 72), (257, 88), (321, 128), (201, 256)):
        for form in ((1, H, L, L),) if dry else ((1, H, L, L), (2, 1, L, L), (2, H, 1, L)):
            tensors = {"qkv": random(2, L, 3, H, E, seed=0), "bias": random(*form, seed=1)}
            for wide in ((), ("bias",)) if dtype != "float32" and form[1] == H else ((),):
                name = f"attention, bias {tuple(form)} {'fp32' if wide else ''} E={E} {dtype}"
                yield name, case_of("attention", ops.attention, attention_ref, tensors, dtype, device, wide)
    for E in (16,) if dry else (64, 80, 128):
        tensors = {"qkv": random(sum(PACKED), 3, H, E, seed=0)}
        run = partial(_packed, ops.attention)
        yield f"attention, packed E={E} {dtype}", case_of("attention", run, _apart, tensors, dtype, device)


def product_cases(dtype: str, device: str, dry: bool) -> Iterator[tuple[str, Case]]:
    for B, L, D, F in ((1, 3, 16, 40),) if dry else ((2, 17, 192, 768), (2, 197, 384, 1000)):
        x = random(B, L, D, seed=0)
        weight, bias = random(F, D, seed=1, std=D**-0.5), random(F, seed=2)
        narrow, small = random(D, D, seed=3, std=D**-0.5), random(D, seed=4)
        more = f"B={B} L={L} D={D} F={F} {dtype}"
        tensors = {"x": x, "weight": weight, "bias": bias}
        yield f"linear {more}", case_of("linear", ops.linear, functional.linear, tensors, dtype, device)
        norm = {"norm_weight": random(D, seed=5, std=0.1, mean=1.0), "norm_bias": random(D, seed=6)}
        given = {"x": x, **norm, "weight": weight, "bias": bias}
        yield f"norm_linear {more}", case_of("norm_linear", ops.norm_linear, norm_linear_ref, given, dtype, device)
        given = {
            "residual": random(B, L, D, seed=7),
            "x": x,
            "weight": narrow,
            "bias": small,
            "scale": random(D, seed=8),
        }
        for wide in ((), ("residual", "scale")) if dtype != "float32" else ((),):
            name = f"linear_residual {'fp32 stream ' if wide else ''}{more}"
            run, reference = ops.linear_residual, linear_residual_ref
            yield name, case_of("linear_residual", run, reference, given, dtype, device, wide)
        half = {
            "x": x,
            **norm,
            "qkv_weight": random(3 * D, D, seed=12, std=D**-0.5),
            "qkv_bias": random(3 * D, seed=13),
        }
        half |= {"proj_weight": narrow, "proj_bias": small, "scale": random(D, seed=8)}
        H = D // 16 if dry else D // 64
        run, reference = partial(ops.norm_attention, num_heads=H), partial(norm_attention_ref, num_heads=H)
        yield f"norm_attention {more}", case_of("norm_attention", run, reference, half, dtype, device, gradients=False)
        for activation in ("gelu_tanh", "quick_gelu", "swiglu"):
            hidden = 2 * F if activation == "swiglu" else F
            given = {
                "x": x,
                "fc1_weight": random(hidden, D, seed=9, std=D**-0.5),
                "fc1_bias": random(hidden, seed=10),
                "fc2_weight": random(D, F, seed=11, std=F**-0.5),
                "fc2_bias": small,
            }
            run, reference = partial(ops.mlp, activation=activation), partial(mlp_ref, activation=activation)
            yield f"mlp {activation} {more}", case_of("mlp", run, reference, given, dtype, device)


def more_cases(dtypes: tuple[str, ...], device: str, dry: bool) -> Iterator[tuple[str, Case]]:
    for dtype in dtypes:
        yield from attention_cases(dtype, device, dry)
        yield from product_cases(dtype, device, dry)
