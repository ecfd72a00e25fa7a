"""Readers: from files or packages to numpy arrays, with errors that name the path and what is expected there.

Arrays: images uint8 [N, C, H, W], labels integer [N].
"""

import gzip
import struct
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

Arrays = tuple[np.ndarray, np.ndarray]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
_IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def digits() -> Arrays:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; their 17 grey levels are spread over 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("dataset digits needs scikit-learn: pip install 'vitfast[train]'") from error
    bunch = load_digits()
    return np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8), bunch.target


def fake(size: int, classes: int, train: int = 1024, test: int = 256) -> tuple[Arrays, Arrays]:
    """Noisy copies of one coarse random pattern per class: made up, always the same, and learnable."""
    random = np.random.RandomState(0)
    coarse = random.randint(64, 192, size=(classes, 3, 4, 4))
    patterns = coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3)

    def make(count: int) -> Arrays:
        labels = np.arange(count) % classes
        noisy = patterns[labels] + random.normal(0, 40, size=(count, 3, size, size))
        return noisy.clip(0, 255).astype(np.uint8), labels

    return make(train), make(test)


def fashion_mnist(folders: list[Path], download: bool) -> list[Arrays]:
    """Train and test split of the first of `folders` that holds the four idx files (plain or .gz).

    torchvision keeps them in FashionMNIST/raw under its root, so that place in each folder is looked at too.
    """
    places = [place for folder in folders for place in (folder, folder / "FashionMNIST" / "raw")]
    found = next((place for place in places if _idx_path(place, _IDX_FILES[0][0])), None)
    if found is None and download:
        _download("FashionMNIST", folders[0])
        found = folders[0] / "FashionMNIST" / "raw"
    if found is None:
        raise FileNotFoundError(
            f"no Fashion-MNIST in {', '.join(map(str, folders))}: expected {_IDX_FILES[0][0]}[.gz] and the three files that "
            "belong to it; pass --data FOLDER or --download, or install Debian's package dataset-fashion-mnist"
        )
    splits = []
    for images_name, labels_name in _IDX_FILES:
        paths = [_idx_path(found, name) for name in (images_name, labels_name)]
        missing = [name for name, path in zip((images_name, labels_name), paths, strict=True) if path is None]
        if missing:
            raise FileNotFoundError(f"{found} lacks {' and '.join(missing)} (plain or .gz)")
        images, labels = (read_idx(path) for path in paths if path)
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{paths[0]}: expected N images of 28 x 28 and N labels; got {list(images.shape)} and {list(labels.shape)}"
            )
        if len(labels) == 0 or labels.max() > 9:
            raise ValueError(f"{paths[1]}: expected labels 0 to 9, at least one")
        splits.append((images[:, None], labels))
    return splits


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or gzip: two zero bytes, type 8, rank, big-endian sizes, then the data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or raw[3] not in (1, 3):
        raise ValueError(f"{path} is not an idx file of bytes: it begins with {raw[:4].hex() or 'nothing'}")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start]) if len(raw) >= start else ()
    if not shape or len(raw) - start != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} is damaged: {len(raw)} bytes do not fit its header {list(shape)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def cifar(name: str, folder: Path, download: bool) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """CIFAR-10 or -100 as torchvision reads it (it checks the files' MD5 before it unpickles them), with class names."""
    from torchvision import datasets

    cls = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root = folder.parent if folder.name == cls.base_folder else folder
    if not (root / cls.base_folder).is_dir():
        if not download:
            raise FileNotFoundError(
                f"no {cls.__name__} in {root}: expected {root / cls.base_folder}; --download fetches it"
            )
        _download(cls.__name__, root)
    splits = []
    for train in (True, False):
        try:
            split = cls(str(root), train=train)
        except RuntimeError as error:
            raise ValueError(
                f"{root / cls.base_folder} is incomplete or damaged; delete it and use --download"
            ) from error
        splits.append((split.data.transpose(0, 3, 1, 2), np.array(split.targets)))
    return splits[0], splits[1], tuple(split.classes)


def _download(torchvision_name: str, root: Path) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, torchvision_name)(str(root), download=True)
    except (URLError, OSError, RuntimeError) as error:
        raise RuntimeError(f"could not download {torchvision_name} into {root}: {error}") from error


def image_folder(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Class names and (path, label) of every image below root/CLASS/."""
    from torchvision.datasets import ImageFolder

    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected one subfolder of images per class")
    try:
        images = ImageFolder(str(root))
    except FileNotFoundError as error:
        detail = str(error).rstrip(".")
        raise FileNotFoundError(
            f"{root} is no image dataset (expected {root}/CLASS/IMAGE.jpg, ...): {detail}"
        ) from error
    if len(images.classes) < 2:
        raise ValueError(f"{root} has the one class {images.classes[0]!r}; at least two are needed")
    return tuple(images.classes), images.samples


def read_image(path: Path, channels: int) -> Tensor:
    """One image file as uint8 [C, H, W]; channels 1 (grey) or 3 (RGB). Raises ValueError naming a file it cannot read."""
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        with Image.open(path) as image:
            array = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from error
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()
