"""Pictures of a run: its curves, and images with their predicted labels."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

from vitfast.train.metrics import read_metrics

matplotlib.use("Agg")  # draws to files, needs no display
import matplotlib.pyplot as plt

_TRAIN, _TEST, _WRONG, _RIGHT = "#4477aa", "#cc6633", "#b22222", "#22662a"


def curves(metrics: Path, out: Path, title: str) -> None:
    """Loss and accuracy against epochs, training and test, from metrics.jsonl to a PNG."""
    records = read_metrics(metrics)
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, what, scale in zip(axes, ("loss", "accuracy"), (1, 100), strict=True):
        x = [r["epoch_position"] for r in steps]
        axis.plot(x, [r[what] * scale for r in steps], color=_TRAIN, alpha=0.35, linewidth=1)
        x = [r["epoch_position"] for r in epochs]
        marker = "o" if len(epochs) <= 40 else None
        train, test = ([r[f"{split}_{what}"] * scale for r in epochs] for split in ("train", "test"))
        axis.plot(
            x, train, color=_TRAIN, marker=marker, markersize=3.5, label="training (augmented, mean of the epoch)"
        )
        axis.plot(x, test, color=_TEST, marker=marker, markersize=3.5, label="test")
        axis.set_xlabel("epoch")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss (cross-entropy, nats)")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("accuracy (%)")
    axes[1].set_ylim(top=100.5)
    axes[1].legend(loc="lower right")
    if epochs:
        best = max(epochs, key=lambda r: r["test_accuracy"])
        title += f": best test accuracy {best['test_accuracy']:.2%} after epoch {best['epoch']}"
    figure.suptitle(title)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def contact_sheet(
    images: Sequence[Tensor], labels: Sequence[str], out: Path, *, right: Sequence[bool | None] = (), columns: int = 6
) -> None:
    """A grid of images (each uint8 [C, H, W], C 1 or 3) with its label above it, to a PNG.

    right: per image whether the label is right (green), wrong (red) or not known (None, black).
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"images and labels must be as many, at least one; got {len(images)} and {len(labels)}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (1.9 * columns, 2.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (axis, image, label) in enumerate(zip(axes.flat, images, labels, strict=False)):
        color = {True: _RIGHT, False: _WRONG, None: "black"}[right[i] if right else None]
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(label, fontsize=11, color=color)
    figure.savefig(out, dpi=110)
    plt.close(figure)
