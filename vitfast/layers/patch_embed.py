"""Image to tokens: normalise, cut into patches, project, add positions, prepend prefix tokens.

B images, C channels, Hi x Wi pixels, P patch, N patches, R prefix tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import nn

from vitfast import ops


class PatchEmbed(nn.Module):
    """The linear projection of flattened patches (Dosovitskiy et al. 2021, equation 1), token-major.

    ``proj`` is a convolution only in name and shape ([D, C, P, P]), so that timm's weights load; the op is a product.
    With ``mean`` and ``std`` (C floats each, in units of 1) the images are raw pixels, uint8 in 0..255 or float in
    0..1, and are normalised here; without them the images are floats that already are.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.in_chans = in_chans
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.mean = mean
        self.std = std
        self.backend = backend
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(
        self,
        images_BCHW: torch.Tensor,
        pos_embed: torch.Tensor | None = None,
        prefix_1RD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens [B, R + N, D]; pos_embed [1, N, D] is added to the patches only, [1, R + N, D] to the prefix too."""
        self._check(images_BCHW)
        return ops.patch_embed(
            images_BCHW,
            self.proj.weight,
            self.proj.bias,
            pos_embed=pos_embed,
            prefix=prefix_1RD,
            mean=self.mean,
            std=self.std,
            backend=self.backend,
        )

    def _check(self, images: torch.Tensor) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must be [B, C, H, W], got shape {tuple(images.shape)}")
        if images.shape[1] != self.in_chans:
            raise ValueError(
                f"images must have {self.in_chans} channels, got {images.shape[1]} (shape {tuple(images.shape)});"
                f" create the model with in_chans={images.shape[1]} to take these"
            )
        if tuple(images.shape[2:]) != self.img_size:
            got = tuple(images.shape[2:])
            raise ValueError(f"images must be {self.img_size} pixels (height, width), got {got}; see img_size=")
        if images.dtype == torch.uint8 and self.mean is None:
            raise TypeError("uint8 images need a model that normalises them itself: create it with normalize=True")
