"""Datasets: one frozen description each, and where their images come from.

Small datasets are one uint8 tensor per split; an image folder is a list of files.
Shapes: N images, C channels, H x W pixels.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitfast.train import sources
from vitfast.train.config import DATASETS

TEST_FRACTION = 0.2  # of a dataset that has no test split of its own
SPLIT_SEED = 0


@dataclass(frozen=True)
class DatasetInfo:
    """What a model needs to know about its images; saved in every checkpoint.

    mean, std: per channel, of pixels scaled to [0, 1]. resize_ratio: an image of another size is scaled so that its
    shorter side is image_size / resize_ratio, then its centre is cut out (0.875 is ImageNet's 224 of 256).
    """

    name: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_ratio: float = 1.0

    def __post_init__(self) -> None:
        for field in ("mean", "std"):
            if len(getattr(self, field)) != self.channels:
                raise ValueError(
                    f"{field} must have {self.channels} values, one per channel of {self.name}; got {getattr(self, field)}"
                )

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DatasetInfo":
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


@dataclass(frozen=True)
class TensorSplit:
    """images: uint8 [N, C, H, W]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "TensorSplit":
        return TensorSplit(self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FileSplit:
    """paths: N image files; labels: int64 [N]."""

    paths: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    info: DatasetInfo
    train: TensorSplit | FileSplit
    test: TensorSplit | FileSplit


# Means and standard deviations are of the training images' pixels.
INFOS = {
    "digits": DatasetInfo("digits", tuple("0123456789"), 8, 1, (0.3058,), (0.3764,)),
    "fashion-mnist": DatasetInfo(
        "fashion-mnist",
        ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        28,
        1,
        (0.2860,),
        (0.3530,),
    ),
    "cifar10": DatasetInfo(
        "cifar10",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        32,
        3,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    # cifar100's class names are read from its own meta file.
    "cifar100": DatasetInfo("cifar100", (), 32, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    # An image folder: its class names are its subfolders; ImageNet's mean and standard deviation.
    "folder": DatasetInfo("folder", (), 224, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize_ratio=0.875),
    "fake": DatasetInfo("fake", tuple(f"pattern {i}" for i in range(10)), 32, 3, (0.5,) * 3, (0.2,) * 3),
}


def load_dataset(name: str, root: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Load a dataset by name.

    root: its folder (default: ./data; fashion-mnist also looks where Debian's package installs it).
    download: let torchvision fetch cifar10, cifar100 or fashion-mnist into root when missing.
    Raises ValueError for an unknown name or damaged files, FileNotFoundError for missing ones; both name the path.

    `digits` is scikit-learn's copy of the UCI test set (1,797 images), split 80/20 per class with seed 0.
    """
    if name not in INFOS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {name!r}")
    if name in ("digits", "fake") and root is not None:
        raise ValueError(f"dataset {name} is built in and takes no data folder; got {root}")
    if download and name in ("digits", "fake", "folder"):
        raise ValueError(f"dataset {name} cannot be downloaded (cifar10, cifar100 and fashion-mnist can)")
    folder = Path(root) if root is not None else Path("data")
    info = INFOS[name]
    if name == "digits":
        return Dataset(info, *_split_tensors(*sources.digits()))
    if name == "fake":
        return Dataset(info, *(_tensors(*pair) for pair in sources.fake(info.image_size, len(info.class_names))))
    if name == "fashion-mnist":
        candidates = [folder] if root is not None else [folder, sources.DEBIAN_FASHION_MNIST]
        return Dataset(info, *(_tensors(*pair) for pair in sources.fashion_mnist(candidates, download)))
    if name in ("cifar10", "cifar100"):
        train, test, class_names = sources.cifar(name, folder, download)
        return Dataset(replace(info, class_names=class_names), _tensors(*train), _tensors(*test))
    if root is None:
        raise ValueError("dataset folder needs the folder of the images (--data FOLDER)")
    return _folder(info, folder)


def checkpoint_dataset(info: DatasetInfo, config: dict[str, Any], name: str | None, root: str | None) -> Dataset:
    """The dataset to try a checkpoint on: its own (info, config), or another by name with the same channels and classes."""
    name = name or info.name
    root = root or (config["data"] if name == info.name else None)
    dataset = load_dataset(name, root)
    if dataset.info.class_names != info.class_names or dataset.info.channels != info.channels:
        raise ValueError(
            f"dataset {name} has {len(dataset.info.class_names)} classes ({', '.join(dataset.info.class_names[:3])}, ...) and "
            f"{dataset.info.channels} channels; the checkpoint was trained on {len(info.class_names)} "
            f"({', '.join(info.class_names[:3])}, ...) and {info.channels}"
        )
    return dataset


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test), both sorted; of every class with two images or more `fraction`, at least one, is test.

    Uses numpy's legacy generator, whose stream numpy promises never to change.
    """
    random = np.random.RandomState(seed)
    test = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = max(1, round(len(members) * fraction)) if len(members) > 1 else 0
        test.append(members[:count])
    test_indices = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test_indices), test_indices


def _tensors(images_NCHW: np.ndarray, labels: np.ndarray) -> TensorSplit:
    return TensorSplit(torch.from_numpy(np.ascontiguousarray(images_NCHW)), torch.from_numpy(labels.astype(np.int64)))


def _split_tensors(images_NCHW: np.ndarray, labels: np.ndarray) -> tuple[TensorSplit, TensorSplit]:
    train, test = stratified_split(labels, TEST_FRACTION, SPLIT_SEED)
    return _tensors(images_NCHW[train], labels[train]), _tensors(images_NCHW[test], labels[test])


def _files(samples: list[tuple[str, int]]) -> FileSplit:
    return FileSplit(tuple(Path(path) for path, _ in samples), torch.tensor([label for _, label in samples]))


def _folder(info: DatasetInfo, root: Path) -> Dataset:
    """root/train and root/val (or root/test), or one tree of class folders split 80/20 per class with seed 0."""
    train_root = root / "train"
    if not train_root.is_dir():
        class_names, samples = sources.image_folder(root)
        train, test = stratified_split(np.array([label for _, label in samples]), TEST_FRACTION, SPLIT_SEED)
        if len(test) == 0:
            raise ValueError(f"{root}: no class has two images or more, so none can be kept for testing")
        splits = _files([samples[i] for i in train]), _files([samples[i] for i in test])
        return Dataset(replace(info, class_names=class_names), *splits)
    class_names, train_samples = sources.image_folder(train_root)
    test_root = next((root / sub for sub in ("val", "test") if (root / sub).is_dir()), None)
    if test_root is None:
        raise FileNotFoundError(f"{root} has train/ but neither val/ nor test/ beside it")
    test_names, test_samples = sources.image_folder(test_root)
    unknown = sorted(set(test_names) - set(class_names))
    if unknown:
        raise ValueError(f"{test_root} has classes that {train_root} lacks: {', '.join(unknown[:10])}")
    renumber = [class_names.index(name) for name in test_names]
    test_samples = [(path, renumber[label]) for path, label in test_samples]
    return Dataset(replace(info, class_names=class_names), _files(train_samples), _files(test_samples))
