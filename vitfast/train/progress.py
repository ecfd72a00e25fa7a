"""What a person sees while a run trains: a live bar in a terminal, plain lines elsewhere."""

import sys
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Status:
    """After one optimizer step. loss and accuracy are means since the last logged step, None while none is logged."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    lr: float
    loss: float | None = None
    accuracy: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None


class Reporter(Protocol):
    def __enter__(self) -> "Reporter": ...
    def __exit__(self, *exc: object) -> None: ...
    def step(self, status: Status) -> None: ...
    def message(self, text: str) -> None: ...


def clock(seconds: float) -> str:
    """125.0 -> "2:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def figures(status: Status) -> str:
    """The figures of a logged step in words."""
    if status.loss is None or status.accuracy is None:
        return ""
    text = f"loss {status.loss:.3f}  accuracy {status.accuracy:6.1%}"
    if status.images_per_second is not None:
        text += f"  {status.images_per_second:,.0f} images/s"
    return text


class Lines:
    """One line per logged step."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def step(self, status: Status) -> None:
        if status.loss is None:
            return
        left = f"  {clock(status.seconds_left)} left" if status.seconds_left is not None else ""
        where = f"epoch {status.epoch}/{status.epochs}  step {status.step}/{status.total_steps}"
        print(f"{where}  {figures(status)}{left}", flush=True)

    def message(self, text: str) -> None:
        print(text, flush=True)


class Bar:
    """A bar over all steps of the run, with the last logged figures and the time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[left]}"),
        )
        self._task: Any = None

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def step(self, status: Status) -> None:
        fields: dict[str, Any] = {"epoch": f"{status.epoch}/{status.epochs}"}
        if status.loss is not None:
            fields["figures"] = figures(status)
        if status.seconds_left is not None:
            fields["left"] = f"{clock(status.seconds_left)} left"
        if self._task is None:
            fields = {"figures": "", "left": ""} | fields
            self._task = self._progress.add_task("", total=status.total_steps, **fields)
        self._progress.update(self._task, completed=status.step, **fields)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


def default_reporter() -> Reporter:
    return Bar() if sys.stdout.isatty() else Lines()
