"""Pretrained weights into a model: from timm, torchvision, Hugging Face and Google's .npz files, and back to timm's.

Our parameter names are timm's, so a timm file needs no conversion, and what is saved here loads there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.layers.resample import resample_pos_embed
from vitfast.models.adapt import adapt
from vitfast.models.checkpoints import find_weights, read_npz, read_state_dict
from vitfast.models.layouts import from_google, to_our_names
from vitfast.models.registry import create_model
from vitfast.models.vit import VisionTransformer

_LOG = logging.getLogger(__name__)


def load_pretrained(
    model_or_name: nn.Module | str,
    source: str | Path,
    *,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> nn.Module:
    """Load pretrained weights and return the model.

    Args:
        model_or_name: a Vision Transformer of ``vitfast.create_model``; or a name, and the model is created with
            ``options`` (``num_classes`` by default the file's).
        source: a file: ``.safetensors``, PyTorch's (read with ``weights_only=True``), or Google's ``.npz``; a folder with
            ``model.safetensors``, ``pytorch_model.bin`` or their shards; or a repository of the Hugging Face hub, as
            "timm/vit_base_patch16_224.augreg_in21k" or "facebook/dinov2-base", optionally "...@revision".
        grid: rows and columns of the file's position embeddings; default: square.
        options: for ``vitfast.create_model``, with a name only.

    Known layouts: timm's, torchvision's ``vit_*``, transformers' (ViT, DeiT, ViTMAE, DINOv2, DINOv3, SigLIP and CLIP vision
    towers), Google's ViT, AugReg and big_vision, the releases of DINOv2, DINOv3 and EVA. Adapted to the model: position
    embeddings to its size (bicubic with antialiasing; bilinear for .npz, as timm reads both), patch filters to its patch
    size and channels, class and register tokens, LayerScale and q, k, v to its arrangement, a head of other classes to a
    zero-initialised one. Each such change is logged.

    Raises:
        FileNotFoundError, RuntimeError: there is no such file; the hub cannot be reached.
        ValueError: the file cannot be read safely, or its weights are another architecture's (the first names and shapes
            that do not fit are in the message). A given model is then unchanged.
        TypeError: the model is no Vision Transformer of this package, or options come with a model.
    """
    if isinstance(model_or_name, str):
        weights, resize = _read(source)
        if "num_classes" not in options:
            head = weights.get("head.weight")
            options["num_classes"] = 0 if head is None or head.ndim != 2 else head.shape[0]
        model: nn.Module = create_model(model_or_name, **options)
    else:
        model = model_or_name
        if options:
            raise TypeError(f"options ({', '.join(options)}) are for a name, and a model was given")
        if isinstance(model, VisionTransformer):
            weights, resize = _read(source)
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"load_pretrained takes a Vision Transformer of vitfast.create_model, got {type(model).__name__}"
        )
    adapted, notes = adapt(model, weights, grid=grid, **resize)
    _load(model, adapted)
    for note in notes:
        _LOG.info("%s: %s", source, note)
    return model


def save_weights(model: VisionTransformer, path: str | Path) -> None:
    """Write the weights for timm's model of the same name: ``.safetensors``, or PyTorch's format for other endings.

    Raises ValueError for a model that timm has no place for (a tanh layer before the head).
    """
    if model.config.representation_size is not None:
        raise ValueError("timm's models have no tanh layer before the head; reset_classifier removes it")
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save(weights, path)


def load_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> nn.Module:
    """Loads a state dict with our (timm's) names strictly and returns the model; resamples position embeddings.

    Raises ValueError with the first few keys that are missing, unexpected or of another shape; the model is then
    unchanged.
    """
    given = dict(state_dict)
    theirs, ours = given.get("pos_embed"), getattr(model, "pos_embed", None)
    if isinstance(model, VisionTransformer) and theirs is not None and _other_length(theirs, ours):
        given["pos_embed"] = resample_pos_embed(
            theirs,
            model.patch_embed.grid_size,
            num_prefix_tokens=model.num_embedded_prefix_tokens,
            interpolation=interpolation,
            antialias=antialias,
        )
    _load(model, given)
    return model


def _read(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights with our names, and how positions and filters of this kind of file are resampled."""
    files = find_weights(source)
    if files[0].suffix == ".npz":
        return from_google(read_npz(files[0])), {"interpolation": "bilinear", "antialias": False}
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_state_dict(file)
    return to_our_names(weights), {}


def _load(model: nn.Module, given: dict[str, Tensor]) -> None:
    wanted = model.state_dict()
    problems = [
        _first_few("missing", [key for key in wanted if key not in given]),
        _first_few("unexpected", [key for key in given if key not in wanted]),
        _first_few(
            "of another shape",
            [
                f"{key} (file {tuple(given[key].shape)}, model {tuple(wanted[key].shape)})"
                for key in wanted
                if key in given and given[key].shape != wanted[key].shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError(f"the state dict does not fit {type(model).__name__}: {'; '.join(filter(None, problems))}")
    model.load_state_dict(given, strict=True, assign=any(value.is_meta for value in wanted.values()))


def _other_length(theirs: Tensor, ours: Tensor | None) -> bool:
    same_width = ours is not None and theirs.ndim == 3 and theirs.shape[-1] == ours.shape[-1]
    return ours is not None and same_width and theirs.shape[1] != ours.shape[1]


def _first_few(what: str, keys: list[str], limit: int = 5) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{len(keys)} {what}: {', '.join(keys[:limit])}{more}"
