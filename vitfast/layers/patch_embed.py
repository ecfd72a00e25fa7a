"""Image to tokens: normalise, cut into patches, project, add positions, prepend prefix tokens.

B images, C channels, Hi x Wi pixels, P patch, N patches, R prefix tokens, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vitfast import ops
from vitfast.layers.resample import resample_patch_embed


class PatchEmbed(nn.Module):
    """The linear projection of flattened patches (Dosovitskiy et al. 2021, equation 1), token-major.

    ``proj`` is a convolution only in name and shape ([D, C, P, P]), so that timm's weights load; the op is a product.
    With ``mean`` and ``std`` (C floats each, in units of 1) the images are raw pixels, uint8 in 0..255 or float in
    0..1, and are normalised here; without them the images are floats that already are. ``dynamic`` takes images of any
    multiple of the patch size, with ``pad`` of any size, filled up with the mean colour on the right and at the bottom.
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
        dynamic: bool = False,
        pad: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.pad = pad
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
        *,
        any_size: bool = False,
    ) -> torch.Tensor:
        """Tokens [B, R + N, D]; pos_embed [1, N, D] is added to the patches only, [1, R + N, D] to the prefix too.

        any_size: as if ``dynamic``, for this call. Raises ValueError for images that do not fit.
        """
        self._check(images_BCHW, any_size or self.dynamic)
        images_BCHW, normalised = self._padded(images_BCHW)
        return ops.patch_embed(
            images_BCHW,
            self.proj.weight,
            self.proj.bias,
            pos_embed=pos_embed,
            prefix=prefix_1RD,
            mean=None if normalised else self.mean,
            std=None if normalised else self.std,
            backend=self.backend,
        )

    def grid_of(self, images_BCHW: torch.Tensor, *, any_size: bool = False) -> tuple[int, int]:
        """Rows and columns of patches that these images become; raises as ``forward`` does."""
        self._check(images_BCHW, any_size or self.dynamic)
        height, width = images_BCHW.shape[2:]
        patch = self.patch_size[0]
        return (height + patch - 1) // patch, (width + patch - 1) // patch

    def set_input_size(self, img_size: tuple[int, int], patch_size: int) -> None:
        """Take images of another size, or cut into other patches, whose filters are then resampled."""
        if patch_size != self.patch_size[0]:
            weight = resample_patch_embed(self.proj.weight.detach(), (patch_size, patch_size))
            self.proj.weight = nn.Parameter(weight, requires_grad=self.proj.weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = (patch_size, patch_size)
            self.patch_size = (patch_size, patch_size)
        self.img_size = img_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _padded(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Images filled up to whole patches, and whether they had to be normalised for that."""
        patch = self.patch_size[0]
        bottom, right = (-side % patch for side in images_BCHW.shape[2:])
        if not (bottom or right):
            return images_BCHW, False
        if self.mean is not None and self.std is not None:
            colours = torch.tensor([self.mean, self.std], dtype=torch.float32, device=images_BCHW.device)
            mean, std = colours.view(2, -1, 1, 1)
            unit = 255.0 if images_BCHW.dtype == torch.uint8 else 1.0
            images_BCHW = (images_BCHW / unit - mean) / std
        return F.pad(images_BCHW, (0, right, 0, bottom)), self.mean is not None

    def _check(self, images: torch.Tensor, dynamic: bool) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must be [B, C, H, W], got shape {tuple(images.shape)}")
        if images.shape[1] != self.in_chans:
            raise ValueError(
                f"images must have {self.in_chans} channels, got {images.shape[1]} (shape {tuple(images.shape)});"
                f" create the model with in_chans={images.shape[1]} to take these"
            )
        got, patch = tuple(images.shape[2:]), self.patch_size[0]
        if not dynamic and got != self.img_size:
            raise ValueError(
                f"images must be {self.img_size} pixels (height, width), got {got}; see img_size= and dynamic_img_size="
            )
        if dynamic and not self.pad and (got[0] % patch or got[1] % patch):
            raise ValueError(
                f"images must be multiples of the patch size {patch} (height, width), got {got}; see dynamic_img_pad="
            )
        if images.dtype == torch.uint8 and self.mean is None:
            raise TypeError("uint8 images need a model that normalises them itself: create it with normalize=True")
