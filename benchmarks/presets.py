"""Which sizes a preset sweeps, and what else it sets: data and small functions, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .harness import Settings

Shape = dict[str, "int | str"]
LONGEST_SECONDS = {"growth": 10.0, "threads": 10.0, "smoke": 3.0}  # a provider whose call takes longer is left out
_SECONDS = {"overview": 1.0, "growth": 0.3, "threads": 1.0, "smoke": 0.2}  # of timing, where the default is 2
SMOKE_PROVIDERS = ("vitfast", "vitfast cpu", "vitfast fused", "vitfast block", "pytorch eager", "sdpa", "timm")


def along(axis: str, sizes: Iterable[int], base: Mapping[str, int | str], **multiples: int) -> list[Shape]:
    """One axis growing from ``base``; ``multiples``: axes that grow with it, as F=4 for a hidden width of four widths."""
    return [{**base, axis: size, **{name: times * size for name, times in multiples.items()}} for size in sizes]


def distinct(*sweeps: Iterable[Shape]) -> list[Shape]:
    """The shapes of several sweeps, each once: their common base is measured once."""
    return list({tuple(sorted(shape.items())): shape for sweep in sweeps for shape in sweep}.values())


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most == 1 else [*counts, most]


def adjusted(settings: Settings, preset: str) -> Settings:
    """The settings as the preset wants them where the command line said nothing else."""
    seconds = min(settings.seconds, _SECONDS.get(preset, settings.seconds))
    longest = LONGEST_SECONDS.get(preset) if settings.longest is None else settings.longest
    providers = settings.providers
    if not providers:
        providers = {"overview": ("!*torch.compile*",), "smoke": SMOKE_PROVIDERS}.get(preset, ())
    return dataclasses.replace(settings, seconds=seconds, longest=longest, providers=providers)
