"""Attention from packed qkv: ours beside every backend of PyTorch's own, flash-attn, xFormers and TransformerEngine.

B images, L tokens, H heads, E head dim; `with`: what else happens, one of "rope" (DINOv3's, five tokens stay), "qk_norm"
(LayerNorm of q and k), "padding" (a fifth of the keys) or "all". All start from the packed qkv of the projection and end with what the output
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
from vitfast.ops.heads import HeadNorm, Rope

from .gpu_peers import attention_peers
from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import compiled, own_providers
from .presets import along, distinct

OPS = ("attention",)
PEERS = ("flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers", "transformer_engine")
_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
_HEAD_DIMS = (16, 64, 80, 128, 256)
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
        {"B": 64, "L": 201, "with": "rope"},
        {"B": 64, "with": "qk_norm"},
        {"B": 64, "L": 256, "with": "padding"},
    ],
    "growth": distinct(
        along("L", _LENGTHS, {"B": 1, "H": 3, "E": 64}),
        along("E", _HEAD_DIMS, {"B": 4, "L": 197, "H": 3}),
        along("B", (1, 4, 32), {"L": 197, "H": 3, "E": 64}),
    ),
    "growth cuda": distinct(
        along("L", _LENGTHS, {"B": 16, "H": 12, "E": 64}),
        along("E", _HEAD_DIMS, {"B": 64, "L": 197, "H": 12}),
        along("B", (1, 4, 16, 64, 256, 512), {"L": 197, "H": 12, "E": 64}),
    ),
    "dry": [
        {"B": 1, "L": 17, "H": 1, "E": 16},
        *({"B": 1, "L": 9, "H": 1, "E": 16, "with": name} for name in ("rope", "qk_norm", "padding", "all")),
    ],
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
    options = str(shape.get("with", ""))
    kind = TORCH_DTYPE[dtype]
    element, flops = kind.itemsize, 4 * B * H * L * L * E
    token = B * L * H * E * element
    samples = max(1, min(B, _TRUTH_BYTES // (H * L * L * 8)))
    # a parameter's gradient is a sum over the whole batch, so it is held against the truth where that fits
    parameters = _NORM_PARAMETERS if options in ("qk_norm", "all") and samples == B else ()
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, B, L, H, E, options, kind, device),
        grads=("qkv", *parameters),
        reference=_with_options(attention_ref),
        providers=functools.partial(_providers, kind, device, shape),
        # forward reads q, k, v and writes the result; backward reads those, d_out and the result and writes three
        # gradients, with five products of which one is a recomputation
        work={
            "forward": [Work(4 * token, flops)],
            "backward": [Work(8 * token, flops * 5 // 2)],
            "both": [Work(4 * token, flops), Work(8 * token, flops * 5 // 2)],
        },
        batched=("qkv", "key_padding_mask"),
        gate_samples=None if parameters else samples,
    )


_NORM_PARAMETERS = ("q_weight", "q_bias", "k_weight", "k_bias")


def _inputs(B: int, L: int, H: int, E: int, options: str, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor | None] = {"qkv": torch.randn(B, L, 3, H, E, generator=generator).to(device, dtype)}
    if options in ("rope", "all"):
        angles = torch.randn(max(L - 5, 1), E // 2, generator=generator).to(device)
        made |= {"cos": angles.cos(), "sin": angles.sin()}
    if options in ("qk_norm", "all"):
        for name in _NORM_PARAMETERS:
            made[name] = (torch.randn(E, generator=generator) * 0.1 + name.endswith("weight")).to(device, dtype)
    if options in ("padding", "all"):
        mask = torch.rand(B, L, generator=generator) < 0.2
        mask[:, 0] = False  # the truth has no answer for a sequence of padding alone
        made["key_padding_mask"] = mask.to(device)
    return made


def _with_options(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run`` taking its options as flat tensors."""

    def call(
        qkv: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        q_weight: Tensor | None = None,
        q_bias: Tensor | None = None,
        k_weight: Tensor | None = None,
        k_bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        rope = None if cos is None or sin is None else Rope(cos, sin)
        q_norm = None if q_weight is None else HeadNorm(q_weight, q_bias)
        k_norm = None if k_weight is None else HeadNorm(k_weight, k_bias)
        return run(qkv, rope=rope, q_norm=q_norm, k_norm=k_norm, key_padding_mask=key_padding_mask, **more)

    return call


def sdpa(
    qkv: Tensor,
    *,
    rope: Rope | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """PyTorch's own choice of kernel, from and to our layout."""
    q, k, v = qkv.unbind(2)
    q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
    if rope is not None:
        q, k = rope(q), rope(k)
    mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).contiguous()


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
    found = own_providers("attention", _with_options(attention), device, dtype)
    reference = _with_options(attention_ref)
    found.append(Provider("pytorch eager", reference))
    options = str(shape.get("with", ""))
    note = "" if options else f"default kernel: {chosen_by_default(qkv)}"
    found.append(Provider("sdpa", _with_options(sdpa), note=note))
    found.append(Provider("torch.compile", compiled(reference)))
    if options:  # no other kernel does these itself: sdpa after them in plain PyTorch stands for all
        found.append(Provider("torch.compile sdpa", compiled(_with_options(sdpa))))
        return found
    forced = ("sdpa flash", "sdpa math") if device == "cpu" else tuple(_FORCED)
    found += [Provider(name, _forced(_FORCED[name])) for name in forced]
    found.append(
        Provider("torch.compile max-autotune", compiled(reference, mode="max-autotune-no-cudagraphs"), slow=True)
    )
    if device == "cuda" and dtype != torch.float32:
        found += attention_peers(H, E)
    return found
