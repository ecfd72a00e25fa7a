"""torchvision's VisionTransformer (``vit_b_16`` and its kin)."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.models import vision_transformer

from vitfast.dropin import fast
from vitfast.dropin.adapter import Adapter
from vitfast.dropin.fused import Context
from vitfast.dropin.parts import (
    Mode,
    assemble,
    is_training,
    layer_norm,
    linear,
    may_run,
    why_dropout,
    why_hooked,
    why_not_call,
)
from vitfast.dropin.together import FirstTokenModel
from vitfast.layers.halves import AttentionHalf, Linear, MlpHalf


def attention_half(block: Any, mode: Mode) -> AttentionHalf | str:
    """ln_1, self_attention and dropout of a block; or why not."""
    attn = block.self_attention
    reason = why_not_call("self_attention", attn, nn.MultiheadAttention) or why_dropout("dropout", block.dropout, mode)
    if reason is not None:
        return reason
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
        return "self_attention has separate projections, extra keys, or takes the batch second"
    if attn.dropout > 0.0 and is_training(attn, mode):
        return f"self_attention drops with p={attn.dropout} in training"
    return assemble(
        AttentionHalf,
        norm=layer_norm("ln_1", block.ln_1, nn.LayerNorm),
        qkv=(Linear(attn.in_proj_weight, attn.in_proj_bias),),
        heads=attn.num_heads,
        scale=attn.head_dim**-0.5,
        proj=linear("self_attention.out_proj", attn.out_proj, NonDynamicallyQuantizableLinear),
    )


def mlp_half(block: Any, mode: Mode) -> MlpHalf | str:
    """ln_2 and mlp of a block, a Sequential of Linear, GELU, Dropout, Linear, Dropout; or why not."""
    mlp = block.mlp
    reason = why_not_call("mlp", mlp, vision_transformer.MLPBlock)
    if reason is not None:
        return reason
    if len(mlp) != 5:
        return f"mlp has {len(mlp)} layers, not 5"
    if type(mlp[1]) is not nn.GELU:
        return f"mlp.1 is {type(mlp[1]).__name__}"
    reason = why_hooked("mlp.1", mlp[1]) or why_dropout("mlp.2", mlp[2], mode) or why_dropout("mlp.4", mlp[4], mode)
    if reason is not None:
        return reason
    return assemble(
        MlpHalf,
        norm=layer_norm("ln_2", block.ln_2, nn.LayerNorm),
        fc1=(linear("mlp.0", mlp[0]),),
        activation="gelu_tanh" if mlp[1].approximate == "tanh" else "gelu",
        fc2=linear("mlp.3", mlp[3]),
    )


class EncoderBlock(fast.FastBlock, vision_transformer.EncoderBlock):
    """``torchvision.models.vision_transformer.EncoderBlock``."""

    @staticmethod
    def parts(module: Any, mode: Mode) -> dict[str, Any]:
        return {"attention": attention_half(module, mode), "mlp": mlp_half(module, mode)}

    def forward(self, input: Tensor) -> Tensor:
        if may_run(input):
            out = self.run_fused(input, Context(), self._attention)
            if out is not None:
                return out
        return super().forward(input)

    def _attention(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        return self.dropout(self.self_attention(normed, normed, normed, need_weights=False)[0]) + x

    def original_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(FirstTokenModel, vision_transformer.VisionTransformer):
    """``torchvision.models.VisionTransformer``."""

    forward = wraps(vision_transformer.VisionTransformer.forward)(FirstTokenModel.forward)

    def sequence_and_norm(self) -> tuple[nn.Module, nn.Module] | None:
        encoder = self.encoder
        if why_not_call("encoder", encoder, vision_transformer.Encoder):
            return None
        return encoder.layers, encoder.ln


def adapter() -> Adapter:
    """What of this library is replaced."""
    return Adapter(
        library="torchvision",
        blocks={vision_transformer.EncoderBlock: EncoderBlock},
        models={vision_transformer.VisionTransformer: VisionTransformer},
        children={vision_transformer.VisionTransformer: ("conv_proj",), vision_transformer.Encoder: ("ln",)},
    )
