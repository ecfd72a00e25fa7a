"""The two halves of a pre-norm block at inference, out of a backend's primitives.

A backend may replace them by something faster, as ``raw.CpuKernels`` does: one call of C++ each.

Legend: T = B * L rows, D width, C = 3 * H * E, H heads, E head dim, F hidden width; ``X`` dtype of the residual stream,
``Y`` of the products' weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .heads import Heads

_PLAIN_HEADS = Heads()


class BlockHalves:
    """Mixed into a backend's kernels, whose primitives it calls."""

    layer_norm_forward: Any
    linear: Any
    linear_activation: Any
    linear_residual: Any
    attention_forward: Any

    def norm_attention(
        self,
        x_BLD: Tensor,
        norm_weight_D: Tensor,
        norm_bias_D: Tensor,
        eps: float,
        qkv_weight_CD: Tensor,
        qkv_bias_C: Tensor | None,
        heads: int,
        scale: float,
        proj_weight: Tensor,
        proj_bias_D: Tensor | None,
        proj_scale_D: Tensor | None,
    ) -> Tensor:
        """x + proj_scale * (attention(norm(x) qkv_weight^T + qkv_bias) proj_weight^T + proj_bias) -> [B, L, D] X."""
        B, L, D = x_BLD.shape
        E = qkv_weight_CD.shape[0] // (3 * heads)
        x_TD = x_BLD.view(B * L, D)
        _, normed, _, _ = self.layer_norm_forward(
            x_TD, None, None, None, norm_weight_D, norm_bias_D, eps, qkv_weight_CD.dtype
        )
        qkv = self.linear(normed, qkv_weight_CD, qkv_bias_C).view(B, L, 3, heads, E)
        out, _ = self.attention_forward(qkv, scale, None, None, L, None, _PLAIN_HEADS)
        total = self.linear_residual(x_TD, out.reshape(B * L, heads * E), proj_weight, proj_bias_D, proj_scale_D, None)
        return total.view(x_BLD.shape)

    def norm_mlp(
        self,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        norm_bias_D: Tensor,
        eps: float,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        activation: str,
        fc2_weight_DF: Tensor,
        fc2_bias_D: Tensor | None,
        scale_D: Tensor | None,
    ) -> Tensor:
        """x + scale * (act(norm(x) fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias) -> [T, D] X."""
        _, normed, _, _ = self.layer_norm_forward(
            x_TD, None, None, None, norm_weight_D, norm_bias_D, eps, fc1_weight.dtype
        )
        act, _ = self.linear_activation(normed, fc1_weight, fc1_bias, activation, False)
        return self.linear_residual(x_TD, act, fc2_weight_DF, fc2_bias_D, scale_D, None)
