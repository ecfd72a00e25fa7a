"""Datasets, their damaged and missing files, and augmentation."""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitfast.train import sources
from vitfast.train.augment import augment_batch, normalize, resize_center_crop
from vitfast.train.config import TrainConfig
from vitfast.train.data import FileSplit, TensorSplit, load_dataset, stratified_split
from vitfast.train.loader import eval_batches, generator_for, train_batches


def test_digits_split_is_fixed_and_stratified():
    dataset = load_dataset("digits")
    assert (len(dataset.train), len(dataset.test)) == (1438, 359)
    assert dataset.train.images.shape == (1438, 1, 8, 8)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.images.max() == 255
    counts = dataset.test.labels.bincount()
    assert counts.min() >= 35
    assert counts.max() <= 37
    # The split is part of every published figure: were it to change, this sum would.
    checksum = hashlib.sha256(dataset.test.images.numpy().tobytes()).hexdigest()[:12]
    assert checksum == "2f5eb12f1dfe"


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_described_mean_and_std_are_the_pixels(name):
    dataset = load_dataset(name)
    pixels = dataset.train.images.float() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(dataset.info.mean), atol=0.03, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(dataset.info.std), atol=0.03, rtol=0)


def test_fake_is_the_same_every_time_and_all_classes_occur():
    first, second = load_dataset("fake"), load_dataset("fake")
    assert torch.equal(first.train.images, second.train.images)
    assert first.test.labels.unique().tolist() == list(range(10))


def test_stratified_split_keeps_single_images_for_training():
    train, test = stratified_split(np.array([0] * 10 + [1] * 2 + [2]), 0.2, seed=0)
    assert len(train) + len(test) == 13
    assert set(train).isdisjoint(test)
    assert 12 in train
    assert (np.array(test) < 10).sum() == 2


def test_unknown_dataset_and_pointless_arguments():
    with pytest.raises(ValueError, match=r"dataset must be one of digits, .*; got 'mnits'"):
        load_dataset("mnits")
    with pytest.raises(ValueError, match="takes no data folder"):
        load_dataset("digits", "somewhere")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_dataset("fake", download=True)
    with pytest.raises(ValueError, match="needs the folder"):
        load_dataset("folder")


# idx files (Fashion-MNIST)


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_fashion(folder: Path, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 20), ("t10k", 10)):
        images = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "FashionMNIST/raw"])
def test_fashion_mnist_files(tmp_path, suffix, inside):
    images, labels = write_fashion(tmp_path / inside, suffix)
    dataset = load_dataset("fashion-mnist", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (20, 10)
    assert np.array_equal(dataset.test.images[:, 0].numpy(), images)
    assert np.array_equal(dataset.test.labels.numpy(), labels)


def test_fashion_mnist_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no Fashion-MNIST in {tmp_path}.*train-images-idx3-ubyte"):
        load_dataset("fashion-mnist", tmp_path)
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="lacks t10k-labels-idx1-ubyte"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:1000], "damaged: 1000 bytes do not fit"),
        (lambda raw: b"PK\x03\x04" + raw, "not an idx file of bytes: it begins with 504b0304"),
        (lambda raw: b"", "begins with nothing"),
        (lambda raw: raw[:6], "do not fit its header"),
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("fashion-mnist", tmp_path)
    assert str(path) in str(caught.value)


def test_damaged_gzip(tmp_path):
    write_fashion(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20] + b"\xff" * 50 + whole[70:], b"not gzip at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path} is damaged"):
            load_dataset("fashion-mnist", tmp_path)


def test_fashion_mnist_labels_out_of_range_and_count_mismatch(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.full(20, 77, np.uint8))
    with pytest.raises(ValueError, match="expected labels 0 to 9"):
        load_dataset("fashion-mnist", tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(19, np.uint8))
    with pytest.raises(ValueError, match="expected N images of 28 x 28 and N labels"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset("fashion-mnist")
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert dataset.train.labels.bincount().tolist() == [6000] * 10


# CIFAR: a tiny set in the same format, with torchvision told its checksums


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    cls = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    classes = 10 if name == "cifar10" else 100
    random = np.random.RandomState(0)

    def write(file: str, content: dict) -> list[str]:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return [file, hashlib.md5(raw).hexdigest()]

    def batch(count: int) -> dict:
        key = "labels" if name == "cifar10" else "fine_labels"
        labels = [i % classes for i in range(count)]
        return {"data": random.randint(0, 256, (count, 3072)).astype(np.uint8), key: labels}

    names = [f"class {i}" for i in range(classes)]
    monkeypatch.setattr(cls, "train_list", [write("batch_1", batch(8)), write("batch_2", batch(8))])
    monkeypatch.setattr(cls, "test_list", [write("test", batch(4))])
    meta_key = "label_names" if name == "cifar10" else "fine_label_names"
    file, md5 = write("meta", {meta_key: names})
    monkeypatch.setattr(cls, "meta", {"filename": file, "key": meta_key, "md5": md5})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    write_cifar(tmp_path, name, monkeypatch)
    dataset = load_dataset(name, tmp_path)
    assert dataset.train.images.shape == (16, 3, 32, 32)
    assert len(dataset.test) == 4
    assert len(dataset.info.class_names) == (10 if name == "cifar10" else 100)
    inner = next(tmp_path.iterdir())
    assert torch.equal(load_dataset(name, inner).test.images, dataset.test.images)
    (inner / "batch_2").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load_dataset(name, tmp_path)


def test_cifar_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CIFAR10 in .*cifar-10-batches-py; --download fetches it"):
        load_dataset("cifar10", tmp_path)


# Image folders


def write_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 30)) -> None:
    random = np.random.RandomState(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.randint(0, 256, (*size, 3)).astype(np.uint8)).save(root / name / f"{i:02d}.png")


def test_folder_with_train_and_val(tmp_path):
    write_folder(tmp_path / "train", {"ant": 4, "bee": 4, "cat": 4})
    write_folder(tmp_path / "val", {"bee": 2, "cat": 1})
    dataset = load_dataset("folder", tmp_path)
    assert dataset.info.class_names == ("ant", "bee", "cat")
    assert dataset.test.labels.tolist() == [1, 1, 2]


def test_folder_of_one_tree_is_split_the_same_every_time(tmp_path):
    write_folder(tmp_path, {"ant": 10, "bee": 5})
    first, second = load_dataset("folder", tmp_path), load_dataset("folder", tmp_path)
    assert first.test.paths == second.test.paths
    assert first.test.labels.tolist() == [0, 0, 1]
    assert len(first.train) == 12


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: expected one subfolder of images per class"):
        load_dataset("folder", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no image dataset"):
        load_dataset("folder", tmp_path)
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no valid file for the classes ant"):
        load_dataset("folder", tmp_path)
    (tmp_path / "train" / "ant").rmdir()
    write_folder(tmp_path / "train", {"ant": 2})
    with pytest.raises(ValueError, match="the one class 'ant'"):
        load_dataset("folder", tmp_path)
    write_folder(tmp_path / "train", {"bee": 2})
    with pytest.raises(FileNotFoundError, match="neither val/ nor test/"):
        load_dataset("folder", tmp_path)
    write_folder(tmp_path / "test", {"ant": 1, "wasp": 1})
    with pytest.raises(ValueError, match=r"has classes that .*train lacks: wasp"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(tmp_path, workers):
    write_folder(tmp_path, {"ant": 5, "bee": 5})
    dataset = load_dataset("folder", tmp_path)
    assert isinstance(dataset.test, FileSplit)
    dataset.test.paths[0].write_bytes(b"this is no picture")
    with pytest.raises(ValueError, match=rf"cannot read image {dataset.test.paths[0]}") as caught:
        list(eval_batches(dataset.test, dataset.info, batch_size=2, workers=workers))
    assert "Traceback" not in str(caught.value)


def test_grey_and_transparent_images_become_three_channels(tmp_path):
    Image.new("L", (6, 4), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (6, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert sources.read_image(tmp_path / "grey.png", 3).shape == (3, 4, 6)
    assert sources.read_image(tmp_path / "clear.png", 3)[:, 0, 0].tolist() == [10, 20, 30]
    assert sources.read_image(tmp_path / "clear.png", 1).shape == (1, 4, 6)


# Augmentation and batches


def ramp(batch: int = 64, size: int = 9) -> torch.Tensor:
    return torch.arange(batch * size * size).remainder(251).reshape(batch, 1, size, size).to(torch.uint8)


def test_shift_moves_whole_pixels_and_fills_with_black():
    images = ramp()
    shifted = augment_batch(images, TrainConfig(crop_padding=2), generator_for(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2)).float()
    windows = padded.unfold(2, 9, 1).unfold(3, 9, 1)  # every 9 x 9 window, [B, 1, 5, 5, 9, 9]
    matches = (windows == shifted[:, :, None, None]).all(dim=(-1, -2))
    assert matches.any(dim=(1, 2, 3)).all()
    assert len({tuple(m.nonzero()[0].tolist()) for m in matches[:, 0]}) > 10


def test_flip_mirrors_about_half():
    images = ramp()
    flipped = augment_batch(images, TrainConfig(flip=True), generator_for(0))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (mirrored | (flipped == images).flatten(1).all(1)).all()
    assert 20 < mirrored.sum() < 44


def test_affine_without_amounts_is_the_identity_and_right_angles_are_exact():
    images = ramp()
    tiny = augment_batch(images, TrainConfig(rotate=1e-9), generator_for(0))
    torch.testing.assert_close(tiny, images.float(), atol=1e-2, rtol=0)
    # A crop window inside the image stays within the image's values and changes the picture.
    cropped = augment_batch(images, TrainConfig(crop_scale=0.3), generator_for(0))
    assert cropped.shape == images.shape
    assert (cropped != images).any()
    constant = torch.full((8, 3, 16, 16), 200, dtype=torch.uint8)
    inside = augment_batch(constant, TrainConfig(crop_scale=0.3), generator_for(1))
    torch.testing.assert_close(inside[:, :, 2:-2, 2:-2], torch.full((8, 3, 12, 12), 200.0))


def test_rotation_turns_about_the_centre_by_at_most_the_angle():
    images = torch.zeros(200, 1, 21, 21, dtype=torch.uint8)
    images[:, :, 10, 18] = 255  # a dot eight pixels to the right of the centre
    turned = augment_batch(images, TrainConfig(rotate=30.0), generator_for(0))[:, 0]
    grid = torch.arange(21.0) - 10
    weight = turned.sum(dim=(1, 2))
    y, x = ((turned * g).sum(dim=(1, 2)) / weight for g in (grid[:, None], grid[None, :]))
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.abs().max() < 33  # bilinear weights blur the dot's centre by up to half a pixel
    assert angles.min() < -20
    assert angles.max() > 20
    torch.testing.assert_close(torch.hypot(x, y), torch.full((200,), 8.0), atol=0.6, rtol=0)


def test_normalize_and_resize():
    images = torch.tensor([[[[0, 255]], [[255, 0]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-0.5, 0.5]], [[3.0, -1.0]]]])
    torch.testing.assert_close(normalize(images, (0.5, 0.25), (1.0, 0.25)), expected)
    assert resize_center_crop(torch.zeros(3, 50, 80, dtype=torch.uint8), 28, 0.875).shape == (3, 28, 28)
    same = ramp(2)
    assert resize_center_crop(same, 9, 1.0) is same


def small_split() -> TensorSplit:
    return TensorSplit(ramp(50), torch.arange(50) % 10)


def test_every_epoch_has_each_image_at_most_once_in_another_order():
    info, config = load_dataset("digits").info, TrainConfig(batch_size=8)
    split = TensorSplit(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 8, 8), torch.arange(50))
    orders = [torch.cat([y for _, y in train_batches(split, info, config, epoch=e)]) for e in (0, 1)]
    assert [len(order) for order in orders] == [48, 48]
    assert len(orders[0].unique()) == 48
    assert not torch.equal(orders[0], orders[1])
    test_labels = torch.cat([y for _, y in eval_batches(split, info, batch_size=8)])
    assert test_labels.tolist() == list(range(50))


def test_batches_from_the_middle_are_the_same_batches():
    info, config = load_dataset("digits").info, TrainConfig(batch_size=8, crop_padding=1, rotate=10.0, seed=3)
    straight = list(train_batches(small_split(), info, config, epoch=2))
    later = list(train_batches(small_split(), info, config, epoch=2, first=4))
    assert len(later) == len(straight) - 4
    for (a, la), (b, lb) in zip(straight[4:], later, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


def test_file_batches_do_not_depend_on_workers_or_the_global_generator(tmp_path):
    write_folder(tmp_path, {"ant": 6, "bee": 6})
    dataset = load_dataset("folder", tmp_path)
    assert isinstance(dataset.train, FileSplit)
    settings = {"batch_size": 4, "crop_scale": 0.5, "flip": True, "rotate": 5.0, "crop_padding": 2}
    results = []
    for workers in (0, 1):
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        config = TrainConfig(workers=workers, **settings)
        results.append(list(train_batches(dataset.train, dataset.info, config, epoch=1)))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0][0][0].shape == (4, 3, 224, 224)
    for (a, la), (b, lb) in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
