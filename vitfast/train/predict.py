"""Classifying single images as the model saw them in training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.train.augment import normalize, resize_center_crop
from vitfast.train.data import DatasetInfo, FileSplit, checkpoint_dataset
from vitfast.train.sources import read_image


@torch.no_grad()
def classify(
    model: nn.Module, images: Sequence[Tensor], info: DatasetInfo, top: int = 5
) -> list[list[tuple[str, float]]]:
    """The `top` most likely classes of each image (uint8 [C, H, W], any size) with their probabilities, best first."""
    device = next(model.parameters()).device
    results = []
    for image in images:  # one by one: sizes differ, and a model in eval mode gives each the same answer as in a batch
        pixels = resize_center_crop(image, info.image_size, info.resize_ratio)[None].to(device)
        probabilities = model(normalize(pixels, info.mean, info.std)).float().softmax(dim=1)[0].cpu()
        values, indices = probabilities.topk(min(top, len(info.class_names)))
        results.append([(info.class_names[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)])
    return results


def sample_images(
    info: DatasetInfo, config: dict[str, Any], data: str | None, count: int
) -> tuple[list[str], list[Tensor], list[str | None]]:
    """(names, images, true classes) of `count` test images of a checkpoint's dataset, spread evenly over the split."""
    split = checkpoint_dataset(info, config, None, data).test
    if count > len(split):
        raise ValueError(f"--samples must be at most the {len(split)} test images of {info.name}; got {count}")
    chosen = [i * len(split) // count for i in range(count)]
    truths: list[str | None] = [info.class_names[split.labels[i]] for i in chosen]
    if isinstance(split, FileSplit):
        return (
            [str(split.paths[i]) for i in chosen],
            [read_image(split.paths[i], info.channels) for i in chosen],
            truths,
        )
    return [f"{info.name} test image {i}" for i in chosen], [split.images[i] for i in chosen], truths
