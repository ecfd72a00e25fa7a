"""Batches of a split: shuffled and augmented to train on, in order to evaluate on.

Nothing here has a state to save: the order comes from (seed, epoch), the augmentation from (seed, epoch, batch or
image), so any batch of any epoch can be had again. Batches are (float32 [B, C, S, S] normalised, int64 [B]).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitfast.train.augment import augment_batch, augment_file, normalize, resize_center_crop
from vitfast.train.config import TrainConfig
from vitfast.train.data import DatasetInfo, FileSplit, TensorSplit
from vitfast.train.sources import read_image

Batch = tuple[Tensor, Tensor]


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator seeded by a tuple of integers, e.g. (seed, epoch, batch)."""
    seed = 0
    for part in key:  # an odd 64-bit multiplier spreads neighbouring keys (Knuth's linear congruential constant)
        seed = ((seed ^ part) * 6364136223846793005 + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def train_batches(
    split: TensorSplit | FileSplit,
    info: DatasetInfo,
    config: TrainConfig,
    *,
    epoch: int,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Batches `first`, `first` + 1, ... of an epoch; an incomplete last one is left out.

    info.image_size is the size delivered. Tensors (already on the device) are augmented at their own size, then resized.
    """
    order = torch.randperm(len(split), generator=generator_for(config.seed, epoch))
    size = config.batch_size
    chunks = [order[i * size : (i + 1) * size] for i in range(first, len(split) // size)]
    if isinstance(split, FileSplit):
        reader = _FileReader(split, info, config, epoch)
        yield from _read_files(reader, chunks, config.workers, device)
        return
    for number, chunk in enumerate(chunks, start=first):
        chunk = chunk.to(split.images.device)
        images = augment_batch(split.images[chunk], config, generator_for(config.seed, epoch, number))
        images = resize_center_crop(images, info.image_size, info.resize_ratio)
        yield normalize(images, info.mean, info.std), split.labels[chunk]


def eval_batches(
    split: TensorSplit | FileSplit,
    info: DatasetInfo,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Every image once, in order, without augmentation; the last batch may be smaller."""
    chunks = list(torch.arange(len(split)).split(batch_size))
    if isinstance(split, FileSplit):
        yield from _read_files(_FileReader(split, info, None, 0), chunks, workers, device)
        return
    for chunk in chunks:
        images = resize_center_crop(split.images[chunk[0] : chunk[-1] + 1], info.image_size, info.resize_ratio)
        yield normalize(images, info.mean, info.std), split.labels[chunk[0] : chunk[-1] + 1]


@dataclass(frozen=True)
class _FileReader(torch.utils.data.Dataset):
    """Runs in the workers. An unreadable file comes back as its error: raised in a worker, it would be a traceback."""

    split: FileSplit
    info: DatasetInfo
    config: TrainConfig | None
    epoch: int

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Exception:
        try:
            image = read_image(self.split.paths[index], self.info.channels)
        except (ValueError, FileNotFoundError) as error:
            return error
        label = int(self.split.labels[index])
        if self.config is None:
            return resize_center_crop(image, self.info.image_size, self.info.resize_ratio), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(self.config.seed, self.epoch, index).initial_seed())
            return augment_file(image, self.info.image_size, self.info.resize_ratio, self.config), label


def _collate(items: list[tuple[Tensor, int] | Exception]) -> Batch | Exception:
    images, labels = [], []
    for item in items:
        if isinstance(item, Exception):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def _read_files(reader: _FileReader, chunks: list[Tensor], workers: int, device: torch.device | str) -> Iterator[Batch]:
    batches = DataLoader(
        reader,
        batch_sampler=[chunk.tolist() for chunk in chunks],
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # its own, or it would draw from the global one that a resume restores
        pin_memory=torch.device(device).type == "cuda",
    )
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        images = batch[0].to(device, non_blocking=True)
        yield normalize(images, reader.info.mean, reader.info.std), batch[1].to(device, non_blocking=True)
