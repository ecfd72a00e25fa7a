"""A block's two halves through our ops, on the parameters that another library's modules hold.

B images, L tokens, D width, H heads, E head dim, F mlp hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast import ops
from vitfast.dropin.parts import AttentionHalf, Draw, MlpHalf, branch_dtype, product_dtype
from vitfast.ops.compose import activation_ref


class Options(NamedTuple):
    """How a replaced module runs: the ops' ``backend``, and ``recompute`` ("none", "fused", "mlp" or "block")."""

    backend: str = "auto"
    recompute: str = "fused"

    @property
    def op_recompute(self) -> str:
        """What one op recomputes; "block" is a checkpoint around them all."""
        return "fused" if self.recompute == "block" else self.recompute


class Context(NamedTuple):
    """What a block is called with beside its input: a ``bias`` on the logits, padding keys (bool [B, L]), rotations."""

    bias: Tensor | None = None
    padding: Tensor | None = None
    rope: ops.Rope | None = None


def attend(x_BLD: Tensor, half: AttentionHalf, options: Options, context: Context) -> Tensor:
    """The attention half of a block, residual included, [B, L, D]."""
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
        half.proj_weight,
        half.proj_bias,
        scale=half.gamma,
        drop_path=_factor(half.draw, x_BLD, half.proj_weight, half.gamma),
        backend=options.backend,
    )


def feed_forward(x_BLD: Tensor, half: MlpHalf, options: Options) -> Tensor:
    """The MLP half of a block, residual included, [B, L, D]."""
    drop_path_B = _factor(half.draw, x_BLD, half.fc2_weight, half.gamma)
    weight, bias = _joined(half.fc1_weights), _joined_bias(half.fc1_weights, half.fc1_biases)
    if half.inner_norm is None:
        return ops.norm_mlp(
            x_BLD,
            half.norm.weight,
            half.norm.bias,
            weight,
            bias,
            half.fc2_weight,
            half.fc2_bias,
            half.norm.eps,
            activation=half.activation,
            scale=half.gamma,
            drop_path=drop_path_B,
            recompute=options.op_recompute,
            backend=options.backend,
        )
    # A norm between activation and fc2 (Xu et al. 2021, NormFormer): two units instead of one.
    hidden_BLF = _norm_linear(x_BLD, half.norm, weight, bias, options)
    act_BLF = activation_ref(hidden_BLF, half.activation)
    branch = _norm_linear(act_BLF, half.inner_norm, half.fc2_weight, half.fc2_bias, options)
    if half.gamma is not None:
        branch = branch * half.gamma
    return x_BLD + (branch if drop_path_B is None else branch * drop_path_B.to(branch.dtype).view(-1, 1, 1))


def _qkv(x_BLD: Tensor, half: AttentionHalf, options: Options) -> Tensor:
    """[B, L, 3, H, E] from one packed projection or from three."""
    heads = (half.heads, -1)
    # Three weights are joined for one product, except where copying 3 D^2 weights costs more than 3 B L D results. A
    # graph is traced one way only, or it would hold for these batch sizes alone.
    few = not torch.compiler.is_compiling() and x_BLD.shape[0] * x_BLD.shape[1] < x_BLD.shape[2]
    if len(half.weights) == 3 and few:
        normed = ops.layer_norm(x_BLD, *half.norm, backend=options.backend)
        parts = [ops.linear(normed, w, b) for w, b in zip(half.weights, half.biases, strict=True)]
        return torch.stack([part.unflatten(-1, heads) for part in parts], 2)
    weight, bias = _joined(half.weights), _joined_bias(half.weights, half.biases)
    return _norm_linear(x_BLD, half.norm, weight, bias, options).unflatten(-1, (3, *heads))


def _norm_linear(x: Tensor, norm: Any, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    return ops.norm_linear(
        x,
        norm.weight,
        norm.bias,
        weight,
        bias,
        norm.eps,
        recompute=options.op_recompute,
        backend=options.backend,
    )


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _joined_bias(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(b is None for b in biases):
        return None
    if len(biases) == 1:
        return biases[0]
    return torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])


def _factor(draw: Draw | None, x: Tensor, weight: Tensor, gamma: Tensor | None) -> Tensor | None:
    """One DropPath factor for each sample, drawn in the branch's dtype as the original draws it."""
    return None if draw is None else draw(x, branch_dtype(product_dtype(x, weight), gamma))
