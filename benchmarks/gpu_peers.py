"""Kernels of libraries that need a GPU, as their public interfaces define them. B images, L tokens, H heads, E head dim, D width.

Each is imported when its provider is made; one that cannot be imported or made has the reason in its row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .harness import Provider
from .peers import attempt, installed

FORWARD = ("forward",)


def attention_peers(H: int, E: int) -> list[Provider]:
    """From packed qkv [B, L, 3, H, E] to [B, L, H, E], without options."""

    def flash_2() -> Provider:
        from flash_attn import flash_attn_qkvpacked_func

        return Provider("flash-attn 2", lambda qkv: flash_attn_qkvpacked_func(qkv))

    def flash_3() -> Provider:
        from flash_attn_interface import flash_attn_qkvpacked_func

        return Provider("flash-attn 3", lambda qkv: _first(flash_attn_qkvpacked_func(qkv)))

    def flash_4() -> Provider:
        from flash_attn.cute import flash_attn_func

        return Provider("flash-attn 4", lambda qkv: _first(flash_attn_func(*qkv.unbind(2))))

    def xformers() -> Provider:
        from xformers.ops import memory_efficient_attention

        return Provider("xFormers", lambda qkv: memory_efficient_attention(*qkv.unbind(2)))

    def transformer_engine() -> Provider:
        from transformer_engine.pytorch import DotProductAttention

        layer = DotProductAttention(H, E, attention_dropout=0.0, attn_mask_type="no_mask", qkv_format="bshd")
        # [B, L, H * E] out; it finds q, k and v in one tensor by their strides
        return Provider("TransformerEngine", lambda qkv: layer(*qkv.unbind(2)).unflatten(-1, (H, E)))

    return _of(
        {
            "flash_attn": ("flash-attn 2", flash_2),
            "flash_attn_interface": ("flash-attn 3", flash_3),
            "flash_attn.cute": ("flash-attn 4", flash_4),
            "xformers": ("xFormers", xformers),
            "transformer_engine": ("TransformerEngine", transformer_engine),
        }
    )


def layer_norm_peers(D: int, eps: float, dtype: torch.dtype) -> list[Provider]:
    """x [B, L, D], weight [D], bias [D] -> [B, L, D]."""

    def liger() -> Provider:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return Provider("Liger", lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, eps))

    def quack() -> Provider:
        from quack.rmsnorm import layernorm_fwd

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows = layernorm_fwd(x.flatten(0, -2), weight.float(), bias.float(), eps=eps)
            return _first(rows).view_as(x)

        return Provider("quack", run, directions=FORWARD)

    def transformer_engine() -> Provider:
        from transformer_engine.pytorch import LayerNorm

        layer = LayerNorm(D, eps=eps, device="cuda", dtype=dtype)
        return Provider("TransformerEngine", _with_parameters(layer))

    return _of(
        {
            "liger_kernel": ("Liger", liger),
            "quack": ("quack", quack),
            "transformer_engine": ("TransformerEngine", transformer_engine),
        },
        quack=FORWARD,
    )


def norm_mlp_peers(D: int, F: int, eps: float, dtype: torch.dtype) -> list[Provider]:
    """The unit x + mlp(layer_norm(x))."""

    def transformer_engine() -> Provider:
        from transformer_engine.pytorch import LayerNormMLP

        layer = LayerNormMLP(D, F, eps=eps, bias=True, activation="gelu", params_dtype=dtype, device="cuda")
        branch = _with_parameters(layer)
        names = {"norm_weight": "layer_norm_weight", "norm_bias": "layer_norm_bias"}

        def run(x: Tensor, **parameters: Tensor) -> Tensor:
            return x + branch(x, **{names.get(name, name): tensor for name, tensor in parameters.items()})

        return Provider("TransformerEngine", run, note="its GELU is the tanh approximation")

    return _of({"transformer_engine": ("TransformerEngine", transformer_engine)})


def _of(makers: dict[str, tuple[str, Callable[[], Provider]]], **directions: tuple[str, ...]) -> list[Provider]:
    """The providers of what is installed; ``directions``: of modules that cannot do all."""
    everything: Any = Provider.__dataclass_fields__["directions"].default
    return [
        attempt(name, make, directions=directions.get(module, everything))
        for module, (name, make) in makers.items()
        if installed(module)
    ]


def _with_parameters(layer: torch.nn.Module) -> Callable[..., Tensor]:
    """The layer as a function of its input and its parameters, so that it runs on the case's own tensors."""

    def run(x: Tensor, **parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return result

    return run


def _first(result: Any) -> Tensor:
    """Of a result, or of a tuple that starts with it."""
    return result[0] if isinstance(result, (tuple, list)) else result
