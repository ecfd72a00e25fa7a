"""What a run measures: running means on the device, and metrics.jsonl."""

import json
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


class Meter:
    """Mean loss and accuracy since the last reset; stays on the device, so that adding to it never waits for a GPU."""

    def __init__(self, device: torch.device, sums: list[float] | None = None) -> None:
        self._sums = torch.tensor(sums or [0.0, 0.0, 0.0], dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits_BK: Tensor, labels_B: Tensor) -> None:
        count = len(labels_B)
        correct = (logits_BK.argmax(dim=1) == labels_B).sum()
        self._sums += torch.stack(
            [loss.detach().double() * count, correct.double(), correct.new_full((), count).double()]
        )

    def sums(self) -> list[float]:
        """[loss x images, correct images, images]; Meter(device, sums) goes on from there."""
        return self._sums.tolist()

    def means(self) -> tuple[float, float]:
        """(loss, accuracy)."""
        loss, correct, count = self.sums()
        return (loss / count, correct / count) if count else (0.0, 0.0)

    def reset(self) -> None:
        self._sums.zero_()


class MetricsLog:
    """metrics.jsonl: one JSON object per line, flushed. `kind` is "step" or "epoch"."""

    def __init__(self, path: Path, lines: int = 0) -> None:
        """Keep the file's first `lines` lines (as many as the resumed checkpoint had seen) and append after them."""
        kept = path.read_text().splitlines()[:lines] if lines and path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self.lines = len(kept)
        self._file: IO[str] = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.lines += 1

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
