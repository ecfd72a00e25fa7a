"""Augmentation of whole batches on their device; the random numbers come from an explicit CPU generator.

So one seed gives the same images on every device, for any number of workers, and after a resume.
Shapes: B images, C channels, H x W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from vitfast.train.config import TrainConfig


def augment_batch(images_BCHW: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Shift, crop, mirror and rotate each image by its own random amount; returns float32 in 0..255, the same shape."""
    if config.rotate > 0 or config.crop_scale < 1:
        return _affine(images_BCHW, config, generator)
    if config.crop_padding > 0:
        images_BCHW = _shift(images_BCHW, config.crop_padding, generator)
    if config.flip:
        mirrored = torch.rand(len(images_BCHW), generator=generator) < 0.5
        images_BCHW = torch.where(
            mirrored.to(images_BCHW.device)[:, None, None, None], images_BCHW.flip(3), images_BCHW
        )
    return images_BCHW.float()


def _shift(images_BCHW: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """RandomCrop(size, padding) for a batch: whole pixels, so it is one gather and exact."""
    B, _, H, W = images_BCHW.shape
    corner = torch.randint(0, 2 * padding + 1, (2, B), generator=generator).to(images_BCHW.device)
    padded = F.pad(images_BCHW, (padding,) * 4)
    rows = corner[0, :, None, None] + torch.arange(H, device=corner.device)[None, :, None]
    columns = corner[1, :, None, None] + torch.arange(W, device=corner.device)[None, None, :]
    sample = torch.arange(B, device=corner.device)[:, None, None]
    return padded[sample, :, rows, columns].permute(0, 3, 1, 2)


def _affine(images_BCHW: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Random resized crop, shift, mirror and rotation as one bilinear resampling, black outside the image."""
    B, _, H, W = images_BCHW.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=generator)

    # Side lengths of the crop as shares of the image; aspect ratio 3/4 to 4/3 as in RandomResizedCrop.
    area, aspect = uniform(config.crop_scale, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    if config.crop_scale == 1:
        aspect = torch.ones(B)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # Its centre, and the shift in pixels, in affine_grid's coordinates: the image spans -1..1.
    x = uniform(-1, 1) * (1 - width) + uniform(-1, 1) * config.crop_padding * 2 / W
    y = uniform(-1, 1) * (1 - height) + uniform(-1, 1) * config.crop_padding * 2 / H
    if config.flip:
        width = torch.where(torch.rand(B, generator=generator) < 0.5, -width, width)
    angle = uniform(-config.rotate, config.rotate) * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([width * cos, -height * sin * H / W, x, width * sin * W / H, height * cos, y], dim=1)
    grid = F.affine_grid(theta.view(B, 2, 3).to(images_BCHW.device), list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def augment_file(image_CHW: Tensor, size: int, resize_ratio: float, config: TrainConfig) -> Tensor:
    """One image of any size to uint8 [C, size, size], through torchvision's transforms; draws from torch's generator."""
    steps: list[v2.Transform] = []
    if config.crop_scale < 1:
        steps.append(v2.RandomResizedCrop(size, scale=(config.crop_scale, 1.0), antialias=True))
    else:
        image_CHW = resize_center_crop(image_CHW, size, resize_ratio)
    if config.crop_padding > 0:
        steps.append(v2.RandomCrop(size, padding=config.crop_padding))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.rotate > 0:
        steps.append(v2.RandomRotation(config.rotate, interpolation=v2.InterpolationMode.BILINEAR))
    for step in steps:
        image_CHW = step(image_CHW)
    return image_CHW


def resize_center_crop(images: Tensor, size: int, resize_ratio: float) -> Tensor:
    """[..., H, W] to [..., size, size]: shorter side to size / resize_ratio (bilinear, antialiased), then the centre."""
    shorter = round(size / resize_ratio)
    if min(images.shape[-2:]) != shorter:
        images = v2.functional.resize(images, [shorter], antialias=True)
    if images.shape[-2:] != (size, size):
        images = v2.functional.center_crop(images, [size, size])
    return images


def normalize(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels 0..255 (uint8 or float) to (pixel / 255 - mean) / std, float32."""
    mean_C11 = torch.tensor(mean, device=images_BCHW.device)[:, None, None]
    std_C11 = torch.tensor(std, device=images_BCHW.device)[:, None, None]
    return (images_BCHW.float() / 255 - mean_C11) / std_C11
