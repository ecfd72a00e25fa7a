"""timm's VisionTransformer and Eva (ViT, DeiT, AugReg, SigLIP, DINOv2, DINOv3, EVA-02, CLIP towers).

B images, L tokens, D width, H heads, E head dim, N patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import timm.layers
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from vitfast.dropin import fast
from vitfast.dropin.adapter import Adapter
from vitfast.dropin.parts import (
    Mode,
    assemble,
    is_training,
    layer_norm,
    linear,
    may_run,
    why_dropout,
    why_hooked,
    why_not_activation,
    why_not_call,
    why_not_identity,
)
from vitfast.dropin.together import FirstTokenModel
from vitfast.layers.halves import AttentionHalf, Draw, Linear, MlpHalf, Norm
from vitfast.ops import HeadNorm, Rope

_LAYERS = timm.layers


def _classes(*names: str) -> tuple[type, ...]:
    """The classes of ``timm.layers`` with these names that this timm has."""
    return tuple(getattr(_LAYERS, name) for name in names if hasattr(_LAYERS, name))


NORMS = (nn.LayerNorm, *_classes("LayerNorm", "LayerNormFp32"))
RMS_NORMS = _classes("RmsNorm")
ATTENTIONS = (vision_transformer.Attention, *_classes("AttentionRope"), eva.EvaAttention)
ACTIVATIONS = {
    _LAYERS.GELU: "gelu",
    _LAYERS.GELUTanh: "gelu_tanh",
    _LAYERS.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    **dict.fromkeys(_classes("Swish"), "silu"),
}


def attention_half(block: Any, gamma: Tensor | str | None, mode: Mode) -> AttentionHalf | str:
    """norm1, attn and drop_path1 of a block, LayerScale given; or why not."""
    attn = block.attn
    reason = (
        why_not_call("attn", attn, *ATTENTIONS)
        or why_dropout("attn.attn_drop", attn.attn_drop, mode)
        or why_dropout("attn.proj_drop", attn.proj_drop, mode)
        or ("attn.gate scales the heads" if getattr(attn, "gate", None) is not None else None)
        or ("attn has fewer key than query heads" if getattr(attn, "num_kv_groups", 1) != 1 else None)
    )
    if reason is not None:
        return reason
    return assemble(
        AttentionHalf,
        norm=layer_norm("norm1", block.norm1, *NORMS),
        qkv=_qkv(attn),
        heads=attn.num_heads,
        scale=attn.head_dim**-0.5 if attn.fused_attn else attn.scale,  # SDPA takes its own
        proj=linear("attn.proj", attn.proj),
        q_norm=_head_norm("attn.q_norm", attn.q_norm),
        k_norm=_head_norm("attn.k_norm", attn.k_norm),
        out_norm=_optional_norm("attn.norm", getattr(attn, "norm", None)),
        gamma=gamma,
        draw=_drop_path("drop_path1", block.drop_path1, mode),
    )


def mlp_half(block: Any, gamma: Tensor | str | None, mode: Mode) -> MlpHalf | str:
    """norm2, mlp and drop_path2 of a block, LayerScale given; or why not."""
    mlp = block.mlp
    reason = why_not_call("mlp", mlp, _LAYERS.Mlp, _LAYERS.GluMlp, _LAYERS.SwiGLU)
    if reason is not None:
        return reason
    reason = why_dropout("mlp.drop1", mlp.drop1, mode) or why_dropout("mlp.drop2", mlp.drop2, mode)
    if reason is not None:
        return reason
    activation = _activation("mlp.act", mlp.act)
    if activation.startswith("mlp.act"):
        return activation
    names = ("fc1_g", "fc1_x") if type(mlp) is _LAYERS.SwiGLU else ("fc1",)
    if type(mlp) is not _LAYERS.Mlp:
        if activation != "silu" or getattr(mlp, "gate_last", False):
            return f"mlp gates by {activation}, {'last' if getattr(mlp, 'gate_last', False) else 'first'} half"
        activation = "swiglu"
    reason = why_not_activation(activation)
    if reason is not None:
        return reason
    return assemble(
        MlpHalf,
        norm=layer_norm("norm2", block.norm2, *NORMS),
        fc1=tuple(linear(f"mlp.{name}", getattr(mlp, name)) for name in names),
        activation=activation,
        fc2=linear("mlp.fc2", mlp.fc2),
        inner_norm=_optional_norm("mlp.norm", getattr(mlp, "norm", None)),
        gamma=gamma,
        draw=_drop_path("drop_path2", block.drop_path2, mode),
    )


def _qkv(attn: Any) -> tuple[Linear | str, ...]:
    """The packed projection, or q's, k's and v's."""
    if attn.qkv is None:
        return tuple(linear(f"attn.{name}", getattr(attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
    packed = linear("attn.qkv", attn.qkv)
    if not isinstance(packed, str) and getattr(attn, "q_bias", None) is not None:
        # EVA keeps biases beside the projection, and zeros for k
        biases = (attn.q_bias, attn.k_bias, attn.v_bias)
        packed = Linear(packed.weight, torch.cat(biases), biases)
    return (packed,)


def _optional_norm(name: str, module: nn.Module | None) -> Norm | str | None:
    if module is None or type(module) is nn.Identity:
        return why_not_identity(name, module)
    return layer_norm(name, module, *NORMS)


def _head_norm(name: str, module: nn.Module) -> HeadNorm | str | None:
    """A norm of q or k over the head dimension."""
    if type(module) is nn.Identity:
        return why_not_identity(name, module)
    if type(module) in RMS_NORMS:
        if getattr(module, "_fast_norm", False) or module.weight is None:
            return f"{name} uses timm's fast norm, or has no weight"
        return why_hooked(name, module) or HeadNorm(module.weight, None, module.eps, "rms_norm")  # type: ignore[arg-type]
    norm = layer_norm(name, module, *NORMS)
    return norm if isinstance(norm, str) else HeadNorm(norm.weight, norm.bias, norm.eps)


def _activation(name: str, module: nn.Module) -> str:
    """The kind, or a text that starts with ``name``."""
    if type(module) is nn.GELU:
        kind = "gelu_tanh" if module.approximate == "tanh" else "gelu"
    elif type(module) in ACTIVATIONS:
        kind = ACTIVATIONS[type(module)]
    else:
        return f"{name} is {type(module).__name__}"
    return why_hooked(name, module) or kind


def _drop_path(name: str, module: Any, mode: Mode) -> Draw | str | None:
    if type(module) is nn.Identity:
        return why_not_identity(name, module)
    reason = why_not_call(name, module, _LAYERS.DropPath)
    if reason is not None:
        return reason
    if module.drop_prob == 0.0 or not is_training(module, mode):
        return None
    return partial(_draw, keep_prob=1 - module.drop_prob, scale=module.scale_by_keep)


def _draw(x: Tensor, dtype: torch.dtype, keep_prob: float, scale: bool) -> Tensor:
    """timm's DropPath draws in the branch's dtype; the same call gives the same numbers from the same generator."""
    mask = torch.empty((x.shape[0],), dtype=dtype, device=x.device).bernoulli_(keep_prob)
    return mask.div_(keep_prob) if scale and keep_prob > 0.0 else mask


def _layer_scale(name: str, module: nn.Module) -> Tensor | str | None:
    if type(module) is nn.Identity:
        return why_not_identity(name, module)
    return why_not_call(name, module, vision_transformer.LayerScale) or module.gamma  # type: ignore[return-value]


class Block(fast.FastBlock, vision_transformer.Block):
    """``timm.models.vision_transformer.Block``."""

    attn: Any

    @staticmethod
    def parts(module: Any, mode: Mode) -> dict[str, Any]:
        return {
            "attention": attention_half(module, _layer_scale("ls1", module.ls1), mode),
            "mlp": mlp_half(module, _layer_scale("ls2", module.ls2), mode),
        }

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        given: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        if is_causal:
            given["is_causal"] = True
        if not is_causal and may_run(x):
            context = fast.masked(attn_mask, x, self.attn.num_heads)
            if context is not None:
                out = self.run_fused(x, context, partial(self._attention, given=given))
                if out is not None:
                    return out
        return super().forward(x, **given)

    def _attention(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **given)))

    def original_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EvaBlock(fast.FastBlock, eva.EvaBlock):
    """``timm.models.eva.EvaBlock``: rotary positions, SwiGLU, biases beside the projection."""

    attn: Any

    @staticmethod
    def parts(module: Any, mode: Mode) -> dict[str, Any]:
        return {
            "attention": attention_half(module, module.gamma_1, mode),
            "mlp": mlp_half(module, module.gamma_2, mode),
        }

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        given: dict[str, Any] = {"rope": rope} | ({} if attn_mask is None else {"attn_mask": attn_mask})
        if is_causal:
            given["is_causal"] = True
        if not is_causal and may_run(x):
            context = fast.masked(attn_mask, x, self.attn.num_heads)
            if context is not None:
                turned = _rope(rope, self.attn, x)
                stays = turned if isinstance(turned, str) else None
                context = context if isinstance(turned, str) else context._replace(rope=turned)
                out = self.run_fused(x, context, partial(self._attention, given=given), stays)
                if out is not None:
                    return out
        return super().forward(x, **given)

    def _attention(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        branch = self.attn(self.norm1(x), **given)
        return x + self.drop_path1(branch if self.gamma_1 is None else self.gamma_1 * branch)

    def original_mlp(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path2(branch if self.gamma_2 is None else self.gamma_2 * branch)


def _rope(rope: Tensor | None, attn: Any, x: Tensor) -> Rope | str | None:
    """timm's [N, 2 * E] of sines beside cosines, or why not: one constant table for all heads and samples only."""
    if rope is None:
        return None
    if rope.dim() != 2 or rope.requires_grad:
        return "rope differs by head or sample, or is learned"
    if rope.shape[0] + attn.num_prefix_tokens != x.shape[1]:
        return "rope's length is not the number of patches"
    sin, cos = rope.chunk(2, -1)
    return Rope(cos, sin, interleaved=not getattr(attn, "rotate_half", False))


def _notes(module: nn.Module) -> Iterable[tuple[nn.Module, str, str]]:
    """(block, part, why not) for what only the model around a block knows."""
    if isinstance(module, eva.Eva) and getattr(module, "rope_mixed", False):
        return [(block, "attention", "its rotations are learned for each head") for block in module.blocks]
    return []


class VisionTransformer(FirstTokenModel, vision_transformer.VisionTransformer):
    """``timm.models.vision_transformer.VisionTransformer``."""

    forward = wraps(vision_transformer.VisionTransformer.forward)(FirstTokenModel.forward)  # type: ignore[assignment]

    def sequence_and_norm(self) -> tuple[nn.Module, nn.Module] | None:
        own = {"forward_features", "forward_head", "pool"} & self.__dict__.keys()
        if own or self.global_pool != "token" or self.attn_pool is not None:
            return None
        return self.blocks, self.norm


class LayerNorm(fast.Fast, _LAYERS.LayerNorm):
    """``timm.layers.LayerNorm`` where it stands alone."""

    @staticmethod
    def parts(module: Any, mode: Mode) -> dict[str, Any]:
        return {"norm": fast.norm_parts(module, _LAYERS.LayerNorm)}

    def forward(self, x: Tensor) -> Tensor:
        return fast.fused_norm(self, x) if fast.norm_fits(self, x) else super().forward(x)


_SINGLE = ("patch_embed.proj", "norm_pre", "norm", "fc_norm")


def _named(module: Any, *names: str) -> dict[type, str]:
    return {getattr(module, name): name for name in names if hasattr(module, name)}


def adapter() -> Adapter:
    """What of this library is replaced."""
    return Adapter(
        library="timm",
        blocks={vision_transformer.Block: Block, eva.EvaBlock: EvaBlock},
        models={vision_transformer.VisionTransformer: VisionTransformer},
        single={_LAYERS.LayerNorm: LayerNorm},
        notes=_notes,
        children={
            vision_transformer.VisionTransformer: _SINGLE,
            eva.Eva: _SINGLE,
        },
        left={
            **dict.fromkeys(
                _named(vision_transformer, "ResPostBlock"), "a post-norm block: its norms stand behind the branches"
            ),
            **dict.fromkeys(_named(eva, "EvaBlockPostNorm"), "a post-norm block: its norms stand behind the branches"),
            **dict.fromkeys(
                _named(vision_transformer, "ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"),
                "a block with parallel branches",
            ),
            **dict.fromkeys(_classes("AttentionPoolLatent", "AttentionPoolPrr"), "pooling: one query for each image"),
        },
    )
