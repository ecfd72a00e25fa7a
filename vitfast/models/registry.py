"""Models by name."""

import contextlib
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vitfast.models.alexnet import alexnet
from vitfast.models.config import HALF, RECOMPUTES, ViTConfig, check_choice
from vitfast.models.resnet import SmallResNet, resnet18
from vitfast.models.table import CONFIGS
from vitfast.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A convolutional model: what makes it, the overrides it takes, and how images are fed to it."""

    name: str
    make: Callable[..., nn.Module]
    img_size: int | tuple[int, int]
    options: tuple[str, ...] = ()
    num_classes: int = 1000
    in_chans: int = 3
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("alexnet", alexnet, 224, ("weights",)),
        Baseline("resnet18", resnet18, 224, ("weights",)),
        Baseline("resnet20", partial(SmallResNet, 3), 32),
        Baseline("resnet32", partial(SmallResNet, 5), 32),
        Baseline("resnet56", partial(SmallResNet, 9), 32),
    )
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` takes and that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter([*CONFIGS, *BASELINES], pattern))


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    backend: str = "auto",
    recompute: str = "fused",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> nn.Module:
    """A new model with random weights, in training mode; its settings are in ``model.config``.

    name: one of ``list_models()``; Vision Transformers carry timm's names and parameter names.
    num_classes: outputs of the head; 0 gives the pooled features (Vision Transformers only).
    img_size: pixels, one number or (height, width), a multiple of the patch size; None: the size in the name.
    in_chans: channels of the images.
    backend: who runs the ops: "auto", "torch", "cpu", "triton" or "cuda"; the convolutional baselines take "auto"
        and "torch".
    recompute: what backward recomputes instead of keeping: "none", "fused", "mlp" or "block" (see ViTConfig);
        the baselines have only the default.
    device, dtype: where and in what the parameters are made; None: PyTorch's defaults.
    overrides: any other field of ViTConfig (depth=2, drop_path_rate=0.1, normalize=True, ...), or weights= for
        alexnet and resnet18.

    Raises ValueError for an unknown name (with the nearest ones) and for a bad value, TypeError for an unknown override.
    """
    if name in CONFIGS:
        fields = {field.name for field in dataclasses.fields(ViTConfig)} - {"name"}
        _check_overrides(name, overrides, fields)
        settings = dict(overrides, num_classes=num_classes, in_chans=in_chans, backend=backend, recompute=recompute)
        if img_size is not None:
            settings["img_size"] = img_size
        config = dataclasses.replace(CONFIGS[name], **settings)
        make: Callable[[], nn.Module] = partial(VisionTransformer, config)
    elif name in BASELINES:
        make = _baseline(name, num_classes, img_size, in_chans, backend, recompute, overrides)
    else:
        nearest = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"unknown model name {name!r}{hint} (vitfast.list_models() has all {len(list_models())})")
    # Ordinary parameters also under torch.inference_mode: they can be trained later, and only they count their versions, by
    # which packed weights are kept.
    with torch.inference_mode(False), contextlib.nullcontext() if device is None else torch.device(device):
        model = make()
        return model if dtype is None else model.to(dtype)


def _baseline(
    name: str,
    num_classes: int,
    img_size: int | tuple[int, int] | None,
    in_chans: int,
    backend: str,
    recompute: str,
    overrides: dict[str, Any],
) -> Callable[[], nn.Module]:
    baseline = BASELINES[name]
    _check_overrides(name, overrides, set(baseline.options))
    check_choice(f"{name}'s backend", backend, ("auto", "torch"))
    check_choice("recompute", recompute, RECOMPUTES)
    if recompute != "fused":
        raise ValueError(f"{name} has no recompute settings; leave recompute at its default, got {recompute!r}")
    if num_classes < 1 or in_chans < 1:
        raise ValueError(f"{name} needs at least one class and one channel, got {num_classes=} and {in_chans=}")
    config = dataclasses.replace(baseline, num_classes=num_classes, in_chans=in_chans)
    if img_size is not None:
        config = dataclasses.replace(config, img_size=img_size)

    def make() -> nn.Module:
        model: Any = baseline.make(num_classes, in_chans, **overrides)
        model.config = config
        return model

    return make


def _check_overrides(name: str, overrides: dict[str, Any], allowed: set[str]) -> None:
    unknown = sorted(set(overrides) - allowed)
    if unknown:
        choices = ", ".join(sorted(allowed)) or "no overrides"
        raise TypeError(f"{name} takes no override named {', '.join(unknown)}; allowed: {choices}")
