"""Accuracy, top-5, loss and per-class figures of a model on a split.

Shapes: B images, K classes.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """torch.autocast in bf16 or fp16; nothing in fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


@dataclass(frozen=True)
class Evaluation:
    """Shares in 0..1; loss is the mean cross-entropy in nats. confusion: int64 [K true, K predicted]."""

    loss: float
    accuracy: float
    top5: float
    images: int
    confusion: Tensor

    def per_class(self, class_names: tuple[str, ...]) -> list[dict]:
        """One {"class", "images", "recall", "precision"} per class; None where a share has no images."""
        rows = []
        for k, name in enumerate(class_names):
            right, true, predicted = (
                int(v) for v in (self.confusion[k, k], self.confusion[k].sum(), self.confusion[:, k].sum())
            )
            rows.append(
                {
                    "class": name,
                    "images": true,
                    "recall": right / true if true else None,
                    "precision": right / predicted if predicted else None,
                }
            )
        return rows


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    precision: str = "fp32",
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the model in eval mode over batches of (images, labels). `check` is called between batches and may raise."""
    was_training = model.training
    model.eval()
    loss, top5, seen = 0.0, 0, 0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    try:
        for images, labels in batches:
            check()
            with autocast(images.device, precision):
                logits_BK = model(images)
            logits_BK = logits_BK.float()
            loss += F.cross_entropy(logits_BK, labels, reduction="sum").item()
            ranked = logits_BK.topk(min(5, classes), dim=1).indices
            top5 += (ranked == labels[:, None]).any(dim=1).sum().item()
            pairs = (labels * classes + ranked[:, 0]).cpu()
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
            seen += len(labels)
    finally:
        model.train(was_training)
    if seen == 0:
        raise ValueError("nothing to evaluate: the split has no images")
    accuracy = confusion.diagonal().sum().item() / seen
    return Evaluation(loss / seen, accuracy, top5 / seen, seen, confusion)
