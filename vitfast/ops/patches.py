"""Patch embedding and its gradients out of a backend's primitives: cut the patches out, then the product of a linear layer.

A backend may replace them by kernels that read the images inside the product, as ``raw_triton.TritonKernels`` does.

Legend: B images, C channels, P patch, N patches of an image, R prefix tokens, D width, K = C * P * P.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PatchProducts:
    """Mixed into a backend's kernels, whose primitives it calls. scale, shift [C]: a pixel becomes scale * pixel + shift."""

    patchify: Any
    unpatchify: Any
    assemble_tokens: Any
    linear: Any
    input_grad: Any
    weight_grad: Any

    def embed_patches(
        self,
        images_BCHW: Tensor,
        weight_DCPP: Tensor,
        bias_D: Tensor | None,
        pos_embed: Tensor | None,
        prefix_RD: Tensor | None,
        scale_C: Tensor,
        shift_C: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Tokens [B, R + N, D] in ``dtype``, by a product in the weight's; pos_embed [N or R + N, D]."""
        B, _, height, width = images_BCHW.shape
        P = weight_DCPP.shape[-1]
        patches = self.patchify(images_BCHW, P, scale_C, shift_C, weight_DCPP.dtype)
        projected = self.project_patches(patches, weight_DCPP.flatten(1))
        return self.assemble_tokens(projected, B, (height // P) * (width // P), bias_D, pos_embed, prefix_RD, dtype)

    def project_patches(self, patches_TK: Tensor, weight_DK: Tensor) -> Tensor:
        """[T, D]"""
        return self.linear(patches_TK, weight_DK, None)

    def patches_weight_grad(
        self, d_projected: Tensor, images_BCHW: Tensor, P: int, scale_C: Tensor, shift_C: Tensor, d_tokens: Tensor
    ) -> Tensor:
        """The weight's gradient [D, K] from d_projected [B * N, D], the patches' rows of d_tokens [B, R + N, D] in the
        product's dtype."""
        return self.weight_grad(d_projected, self.patchify(images_BCHW, P, scale_C, shift_C, d_projected.dtype))

    def patches_image_grad(
        self,
        d_projected: Tensor,
        weight_DCPP: Tensor,
        scale_C: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        d_tokens: Tensor,
    ) -> Tensor:
        """The images' gradient, of this shape and dtype, from the same two."""
        d_patches = self.input_grad(d_projected, weight_DCPP.flatten(1))
        return self.unpatchify(d_patches, weight_DCPP.shape[-1], scale_C, shape, dtype)
