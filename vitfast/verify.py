"""How far a model's numbers are from the truth, beside plain PyTorch's own distance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.models.reference import reference_forward
from vitfast.models.vit import VisionTransformer

# Allowed error: fp32 an absolute share of the truth's norm, half precisions a multiple of plain PyTorch's own error.
FP32_ALLOWED = 1e-5
HALF_FACTOR = 1.2


@dataclass(frozen=True)
class Row:
    """One line of the report: relative errors (norm of the difference over norm of the truth) against fp64.

    ``what`` is "logits" or "gradients" (all parameters' together); ``worst`` is the parameter whose gradient is furthest
    off, with its own error.
    """

    dtype: str
    what: str
    ours: float
    plain: float
    allowed: float
    worst: str = ""

    @property
    def passed(self) -> bool:
        return self.ours <= self.allowed


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found; prints as a table."""

    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def error(self, dtype: str, what: str = "logits") -> float:
        """The measured error of one line, as ``report.error("float32")``."""
        return next(row.ours for row in self.rows if (row.dtype, row.what) == (dtype, what))

    def __str__(self) -> str:
        lines = [f"{'dtype':10s}{'what':11s}{'error':>10s}{'plain':>10s}{'allowed':>10s}  result"]
        for row in self.rows:
            verdict = "pass" if row.passed else "FAIL"
            lines.append(
                f"{row.dtype:10s}{row.what:11s}{row.ours:10.1e}{row.plain:10.1e}{row.allowed:10.1e}  {verdict}"
                + (f" (worst: {row.worst})" if row.worst else "")
            )
        return "\n".join(lines)


def verify(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    images: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Report:
    """Compare a model, forward and backward, with plain PyTorch and with fp64.

    Args:
        model: a model of ``vitfast.create_model`` (then ``reference`` may be left out), or any model that has the
            reference's parameters.
        reference: the plain PyTorch model with the same ``state_dict`` keys, for example timm's.
        images: [B, C, height, width] floats; default: two random images of the model's size.
        dtypes: what to run the models in.

    Returns:
        A :class:`Report`: for each dtype the error of the logits and of all parameters' gradients against the reference
        in fp64, beside the reference's own error in that dtype. fp32 passes up to 1e-5, others up to 1.2 times the
        reference's error. The models are not changed.

    Raises:
        ValueError: there is no reference, or its parameters have other names.
    """
    if reference is None and not isinstance(model, VisionTransformer):
        raise ValueError(f"reference is missing: {type(model).__name__} is not a model of vitfast.create_model")
    if images is None:
        height, width = _image_size(model)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, _channels(model), height, width, generator=generator)
    device = next(model.parameters()).device
    images = images.to(device)
    names = [n for n, _ in model.named_parameters()]
    if reference is not None and {n for n, _ in reference.named_parameters()} != set(names):
        different = set(names) ^ {n for n, _ in reference.named_parameters()}
        raise ValueError(f"reference has other parameters than model: {', '.join(sorted(different)[:5])}, ...")

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        return _outcome(reference or model, images, dtype, None if reference else reference_forward)

    truth = plain(torch.float64)
    rows = []
    for dtype in dtypes:
        ours, theirs = _outcome(model, images, dtype, None), plain(dtype)
        kind = str(dtype).removeprefix("torch.")
        for what, keys in (("logits", ["logits"]), ("gradients", names)):
            errors = {k: _error(ours, truth, [k]) for k in keys}
            worst = max(errors, key=errors.__getitem__)
            mine, own = _error(ours, truth, keys), _error(theirs, truth, keys)
            allowed = FP32_ALLOWED if dtype == torch.float32 else HALF_FACTOR * own
            note = f"{worst} {errors[worst]:.1e}" if what == "gradients" else ""
            rows.append(Row(kind, what, mine, own, allowed, note))
    return Report(rows)


def _outcome(
    model: nn.Module, images: Tensor, dtype: torch.dtype, forward: Callable[[Any, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """Logits and every parameter's gradient of one eval-mode step in ``dtype``, on a copy of the model."""
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
    logits = model(images.to(dtype)) if forward is None else forward(model, images.to(dtype))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights.to(logits)).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"logits": logits.detach()} | grads


def _error(ours: dict[str, Tensor], truth: dict[str, Tensor], keys: Sequence[str]) -> float:
    difference = sum(float((ours[k].double() - truth[k].double()).square().sum()) for k in keys)
    norm = sum(float(truth[k].double().square().sum()) for k in keys)
    return (difference / norm) ** 0.5 if norm > 0 else difference**0.5


def _image_size(model: nn.Module) -> tuple[int, int]:
    size = model.patch_embed.img_size  # type: ignore[union-attr]
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value, arg-type]


def _channels(model: nn.Module) -> int:
    return model.patch_embed.proj.weight.shape[1]  # type: ignore[union-attr, index, return-value]
