"""Attention from packed qkv: ours beside every backend of PyTorch's own, flash-attn and xFormers.

B images, L tokens, H heads, E head dim. All start from the packed qkv of the projection and end with what the output
projection reads; the gradient is that of the packed qkv. So a peer that wants q, k and v apart pays for taking them apart,
as it does in a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitfast.ops.attention import attention, attention_ref

from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import compiled, installed, own_providers
from .presets import along, distinct

OPS = ("attention",)
PEERS = ("flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers")
_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
_HEAD_DIMS = (16, 32, 64, 80, 128, 256)
DEFAULTS: dict[str, int | str] = {"B": 8, "L": 197, "H": 12, "E": 64}
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{"B": 4}],
    "overview cuda": [{"B": 64}],
    "cpu": [{"B": 8}, {"L": 50}, {"B": 4, "L": 257, "H": 16, "E": 80}, {"B": 2, "L": 577}],
    "cuda": [
        {"B": 64},
        {"B": 64, "L": 257},
        {"B": 64, "L": 257, "H": 16, "E": 80},
        {"B": 16, "L": 577},
        {"B": 8, "L": 1025, "H": 16},
        {"B": 32, "L": 256, "H": 16, "E": 72},
    ],
    "growth": distinct(
        along("L", _LENGTHS, {"B": 1, "H": 3, "E": 64}),
        along("E", _HEAD_DIMS, {"B": 4, "L": 197, "H": 3}),
        along("B", (1, 2, 4, 8, 16, 32), {"L": 197, "H": 3, "E": 64}),
    ),
    "growth cuda": distinct(
        along("L", _LENGTHS, {"B": 16, "H": 12, "E": 64}),
        along("E", _HEAD_DIMS, {"B": 64, "L": 197, "H": 12}),
        along("B", (1, 4, 16, 64, 256, 512), {"L": 197, "H": 12, "E": 64}),
    ),
    "dry": [{"B": 1, "L": 17, "H": 1, "E": 16}],
}
_TRUTH_BYTES = 2**29  # fp64 logits of the reference; larger batches are held against the truth in part
_FORCED = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    B, L, H, E = (int(shape[axis]) for axis in "BLHE")
    kind = TORCH_DTYPE[dtype]
    element, flops = kind.itemsize, 4 * B * H * L * L * E
    token = B * L * H * E * element
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, B, L, H, E, kind, device),
        grads=("qkv",),
        reference=attention_ref,
        providers=functools.partial(_providers, kind, device, shape),
        # forward reads q, k, v and writes the result; backward reads those, d_out and the result and writes three
        # gradients, with five products of which one is a recomputation
        work={
            "forward": [Work(4 * token, flops)],
            "backward": [Work(8 * token, flops * 5 // 2)],
            "both": [Work(4 * token, flops), Work(8 * token, flops * 5 // 2)],
        },
        batched=("qkv",),
        gate_samples=max(1, min(B, _TRUTH_BYTES // (H * L * L * 8))),
    )


def _inputs(B: int, L: int, H: int, E: int, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    return {"qkv": torch.randn(B, L, 3, H, E, generator=generator).to(device, dtype)}


def sdpa(qkv: Tensor) -> Tensor:
    """PyTorch's own choice of kernel, from and to our layout."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def _forced(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(qkv)

    return run


def chosen_by_default(qkv: Tensor) -> str:
    """The name of the kernel that scaled_dot_product_attention takes for these tensors when nobody forces one."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    number = torch._fused_sdp_choice(q, k, v)
    return next(name for name, member in SDPBackend.__members__.items() if member.value == number).lower()


def _providers(dtype: torch.dtype, device: str, shape: dict[str, Any]) -> list[Provider]:
    B, L, H, E = (int(shape[axis]) for axis in "BLHE")
    qkv = torch.empty(B, L, 3, H, E, dtype=dtype, device=device)
    found = own_providers("attention", attention, device, dtype)
    found.append(Provider("pytorch eager", attention_ref))
    found.append(Provider("sdpa", sdpa, note=f"default kernel: {chosen_by_default(qkv)}"))
    forced = ("sdpa flash", "sdpa math") if device == "cpu" else tuple(_FORCED)
    found += [Provider(name, _forced(_FORCED[name])) for name in forced]
    found.append(Provider("torch.compile", compiled(attention_ref)))
    found.append(
        Provider("torch.compile max-autotune", compiled(attention_ref, mode="max-autotune-no-cudagraphs"), slow=True)
    )
    if device == "cuda" and dtype != torch.float32:
        found += _third_party()
    return found


def _third_party() -> list[Provider]:
    """flash-attn 2 and 3 take packed qkv as it is; xFormers takes [B, L, H, E] views of it."""
    found = []
    if installed("flash_attn"):
        from flash_attn import flash_attn_qkvpacked_func

        found.append(Provider("flash-attn 2", lambda qkv: flash_attn_qkvpacked_func(qkv)))
    if installed("flash_attn_interface"):
        from flash_attn_interface import flash_attn_qkvpacked_func as packed_3

        found.append(Provider("flash-attn 3", lambda qkv: _first(packed_3(qkv))))
    if installed("xformers"):
        from xformers.ops import memory_efficient_attention

        found.append(Provider("xFormers", lambda qkv: memory_efficient_attention(*qkv.unbind(2))))
    return found


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
