"""A block's two halves through our ops, on the parameters that another library's modules hold.

B images, L tokens, D width, H heads, E head dim, F mlp hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitfast import ops
from vitfast.dropin.parts import branch_dtype
from vitfast.layers.halves import AttentionHalf, Draw, Linear, MlpHalf, Norm
from vitfast.ops.arguments import product_dtype
from vitfast.ops.compose import activation_ref


class Options(NamedTuple):
    """How a replaced module runs: the ops' ``backend``, ``recompute`` ("none", "fused", "mlp" or "block") and ``precision``."""

    backend: str = "auto"
    recompute: str = "fused"
    precision: str = "float"

    @property
    def op_recompute(self) -> str:
        """What one op recomputes; "block" is a checkpoint around them all."""
        return "fused" if self.recompute == "block" else self.recompute


class Context(NamedTuple):
    """What a block is called with beside its input: a ``bias`` on the logits, padding keys (bool [B, L]), rotations."""

    bias: Tensor | None = None
    padding: Tensor | None = None
    rope: ops.Rope | None = None

    @property
    def masks(self) -> bool:
        """Whether there is a bias or padding."""
        return self.bias is not None or self.padding is not None


def attend(x_BLD: Tensor, half: AttentionHalf, options: Options, context: Context) -> Tensor:
    """The attention half of a block, residual included, [B, L, D]."""
    if (
        not torch.is_grad_enabled()
        and half.plain
        and not context.masks
        and context.rope is None
        and not _keep_apart(x_BLD, half)
    ):
        qkv = _joined(half.qkv)
        return ops.norm_attention(
            x_BLD,
            half.norm.weight,
            half.norm.bias,
            qkv.weight,
            qkv.bias,
            half.proj.weight,
            half.proj.bias,
            half.heads,
            half.norm.eps,
            attention_scale=half.scale,
            scale=half.gamma,
            backend=options.backend,
        )
    qkv_BL3HE = _qkv(x_BLD, half, options)
    out_BLC = ops.attention(
        qkv_BL3HE,
        scale=half.scale,
        bias=context.bias,
        key_padding_mask=context.padding,
        rope=context.rope,
        q_norm=half.q_norm,
        k_norm=half.k_norm,
        backend=options.backend,
    ).flatten(2)
    if half.out_norm is not None:
        out_BLC = ops.layer_norm(out_BLC, *half.out_norm, backend=options.backend)
    return ops.linear_residual(
        x_BLD,
        out_BLC,
        half.proj.weight,
        half.proj.bias,
        scale=half.gamma,
        drop_path=_factor(half.draw, x_BLD, half.proj.weight, half.gamma),
        backend=options.backend,
    )


def feed_forward(x_BLD: Tensor, half: MlpHalf, options: Options) -> Tensor:
    """The MLP half of a block, residual included, [B, L, D]."""
    drop_path_B = _factor(half.draw, x_BLD, half.fc2.weight, half.gamma)
    fc1 = _joined(half.fc1)
    if half.inner_norm is None:
        return ops.norm_mlp(
            x_BLD,
            half.norm.weight,
            half.norm.bias,
            fc1.weight,
            fc1.bias,
            half.fc2.weight,
            half.fc2.bias,
            half.norm.eps,
            activation=half.activation,
            scale=half.gamma,
            drop_path=drop_path_B,
            recompute=options.op_recompute,
            backend=options.backend,
        )
    # A norm between activation and fc2 (Xu et al. 2021, NormFormer): two units instead of one.
    hidden_BLF = _norm_linear(x_BLD, half.norm, fc1, options)
    act_BLF = activation_ref(hidden_BLF, half.activation)
    branch = _norm_linear(act_BLF, half.inner_norm, half.fc2, options)
    if half.gamma is not None:
        branch = branch * half.gamma
    return x_BLD + (branch if drop_path_B is None else branch * drop_path_B.to(branch.dtype).view(-1, 1, 1))


def _keep_apart(x_BLD: Tensor, half: AttentionHalf) -> bool:
    """Whether q, k and v are projected one by one.

    Three weights are joined for one product, except where copying 3 D^2 weights costs more than 3 B L D results. A graph is
    traced one way only, or it would hold for these batch sizes alone.
    """
    if len(half.qkv) == 1 or torch.compiler.is_compiling():
        return False
    return x_BLD.shape[0] * x_BLD.shape[1] < x_BLD.shape[2]


def _qkv(x_BLD: Tensor, half: AttentionHalf, options: Options) -> Tensor:
    """[B, L, 3, H, E] from one packed projection or from three."""
    heads = (half.heads, -1)
    if _keep_apart(x_BLD, half):
        normed = ops.layer_norm(x_BLD, *half.norm, backend=options.backend)
        parts = [ops.linear(normed, layer.weight, layer.bias, backend=options.backend) for layer in half.qkv]
        return torch.stack([part.unflatten(-1, heads) for part in parts], 2)
    return _norm_linear(x_BLD, half.norm, _joined(half.qkv), options).unflatten(-1, (3, *heads))


def _norm_linear(x: Tensor, norm: Norm, layer: Linear, options: Options) -> Tensor:
    return ops.norm_linear(
        x,
        norm.weight,
        norm.bias,
        layer.weight,
        layer.bias,
        norm.eps,
        recompute=options.op_recompute,
        backend=options.backend,
    )


def _joined(layers: Sequence[Linear]) -> Linear:
    """One layer with all their outputs; a bias that only some have counts as zeros for the others."""
    if len(layers) == 1:
        return layers[0]
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return Linear(weight, None)
    biases = [layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias for layer in layers]
    return Linear(weight, torch.cat(biases))


def _factor(draw: Draw | None, x: Tensor, weight: Tensor, gamma: Tensor | None) -> Tensor | None:
    """One DropPath factor for each sample, drawn in the branch's dtype as the original draws it."""
    return None if draw is None else draw(x, branch_dtype(product_dtype(x, weight), gamma))
