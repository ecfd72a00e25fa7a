"""How far a model's numbers are from the truth, beside plain PyTorch's own distance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.dropin.api import restore
from vitfast.dropin.fast import Fast
from vitfast.models.reference import reference_forward
from vitfast.models.vit import VisionTransformer

# Allowed error: fp32 an absolute share of the truth's norm, half precisions a multiple of plain PyTorch's own error.
FP32_ALLOWED = 1e-5
HALF_FACTOR = 1.2
# precision="int8": a share of the truth's norm (models of random weights are 4 % off, at 12 blocks), and of the images.
INT8_ALLOWED = 0.1
INT8_CHANGED_ALLOWED = 0.01


@dataclass(frozen=True)
class Row:
    """One line of the report: relative errors (norm of the difference over norm of the truth) against fp64.

    ``what`` is "logits", the name of another output, or "gradients" (all parameters' together); ``worst`` is the parameter
    whose gradient is furthest off, ``worst_error`` its own error (where a gradient is zero in theory, as that of a key's
    bias, relative to a hundredth of the gradients' typical norm).
    """

    dtype: str
    what: str
    ours: float
    plain: float
    allowed: float
    worst: str = ""
    worst_error: float = 0.0

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

    def error(self, dtype: str, what: str | None = None) -> float:
        """The measured error of one line, as ``report.error("float32")``: the first output's, or that of ``what``."""
        return next(row.ours for row in self.rows if row.dtype == dtype and what in (None, row.what))

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary for each line, with ``passed``, ready for JSON."""
        return [vars(row) | {"passed": row.passed} for row in self.rows]

    def __str__(self) -> str:
        width = max([9, *(len(row.what) for row in self.rows)]) + 2
        lines = [f"{'dtype':10s}{'what':{width}s}{'error':>10s}{'plain':>10s}{'allowed':>10s}  result"]
        for row in self.rows:
            verdict = "pass" if row.passed else "FAIL"
            lines.append(
                f"{row.dtype:10s}{row.what:{width}s}{row.ours:10.1e}{row.plain:10.1e}{row.allowed:10.1e}  {verdict}"
                + (f" (worst: {row.worst} {row.worst_error:.1e})" if row.worst else "")
            )
        return "\n".join(lines)


def verify(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    images: Tensor | Mapping[str, Any] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Report:
    """Compare a model, forward and backward, with plain PyTorch and with fp64.

    Args:
        model: a model of ``vitfast.create_model`` or of ``vitfast.accelerate`` (then ``reference`` may be left out), or any
            model that has the reference's parameters.
        reference: the plain PyTorch model with the same ``state_dict`` keys, for example timm's. Default: our own plain
            forward, or the accelerated model restored.
        images: [B, C, height, width] floats, or a model's inputs by keyword (floats are cast to each dtype); default: two
            random images of the model's size.
        dtypes: what to run the models in.

    Returns:
        A :class:`Report`: for each dtype the error of every output (a tensor is called "logits"; the tensors of a
        transformers output keep their names) and of all parameters' gradients against the reference in fp64, beside the
        reference's own error in that dtype. fp32 passes up to 1e-5, others up to 1.2 times the reference's error, and an
        output of a single number (a loss) also up to one rounding: the ratio of two roundings is chance. Both run in eval
        mode on copies, from the same random state. A model with precision "int8" has more rows, of a forward pass
        without gradients in its own dtype: its outputs, which pass up to 0.1, and, if ``images`` are given and there are logits,
        "top-1 changed": the share of images that get another class than in fp64, which passes up to 0.01.

    Raises:
        ValueError: there is no reference, its parameters have other names, or the size of
            ``images`` cannot be told from the model.
    """
    forward = None
    if reference is None:
        if any(isinstance(module, Fast) for module in model.modules()):
            reference = restore(copy.deepcopy(model))
        elif isinstance(model, VisionTransformer):
            reference, forward = model, reference_forward
        else:
            raise ValueError(f"reference is missing: {type(model).__name__} is not a model of vitfast.create_model")
    _check_same_parameters(model, reference)
    device = next(model.parameters()).device
    inputs = {"": _random_images(model)} if images is None else images if isinstance(images, Mapping) else {"": images}
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    names = [n for n, _ in model.named_parameters()]

    truth = _outcome(reference, inputs, torch.float64, forward)
    outputs = [name for name in truth if name not in names]
    rows = []
    for dtype in dtypes:
        ours, theirs = _outcome(model, inputs, dtype, None), _outcome(reference, inputs, dtype, forward)
        kind = str(dtype).removeprefix("torch.")
        for what, keys in [(name.removeprefix(_OUTPUT), [name]) for name in outputs] + [("gradients", names)]:
            mine, own = _error(ours, truth, keys), _error(theirs, truth, keys)
            allowed = FP32_ALLOWED if dtype == torch.float32 else HALF_FACTOR * own
            if dtype != torch.float32 and sum(truth[key].numel() for key in keys) == 1:
                allowed = max(allowed, torch.finfo(dtype).eps / 2)
            worst = _worst(ours, truth, keys) if what == "gradients" else ("", 0.0)
            rows.append(Row(kind, what, mine, own, allowed, *worst))
    if _precision(model) == "int8":
        truths = {name.removeprefix(_OUTPUT): truth[name] for name in outputs}
        rows += _int8_rows(model, reference, forward, inputs, truths, images is not None)
    return Report(rows)


# What sets an output's name apart from a parameter's in one dictionary.
_OUTPUT = "output:"


def _outcome(
    model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype, forward: Callable[[Any, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """Every output and every parameter's gradient of one eval-mode step in ``dtype``, on a copy of the model."""
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # for models that draw in eval mode, as masked autoencoders do
        result = _call(model, inputs, dtype, forward)
    outputs = {_OUTPUT + name: tensor for name, tensor in _tensors(result, "logits") if tensor.requires_grad}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in outputs.values():
        weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        # weighted to a mean, so that a large output does not drown the gradient of a small one
        loss = loss + (tensor * weights.to(tensor)).sum(dtype=torch.float64) / tensor.numel() ** 0.5
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in outputs.items()} | grads


def _call(
    model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype, forward: Callable[[Any, Tensor], Tensor] | None
) -> Any:
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    first = [cast.pop("")] if "" in cast else []
    return model(*first, **cast) if forward is None else forward(model, *first)


@torch.no_grad()
def _int8_rows(
    model: nn.Module,
    reference: nn.Module,
    forward: Callable[[Any, Tensor], Tensor] | None,
    inputs: Mapping[str, Any],
    truths: Mapping[str, Tensor],
    count_classes: bool,
) -> list[Row]:
    dtype = next(model.parameters()).dtype
    reference = copy.deepcopy(reference).to(dtype).eval()
    if isinstance(reference, VisionTransformer):
        reference.set_precision("float")
    with torch.random.fork_rng(devices=[]):
        results = []
        for call in ((copy.deepcopy(model).eval(), inputs, dtype, None), (reference, inputs, dtype, forward)):
            torch.manual_seed(0)  # as for ``_outcome``
            results.append(dict(_tensors(_call(*call), "logits")))
    ours, plain = results
    rows = []
    for name, truth in truths.items():
        mine, own = (float((x[name].double() - truth).norm() / truth.norm()) for x in (ours, plain))
        rows.append(Row("int8", name, mine, own, INT8_ALLOWED))
    if count_classes and "logits" in truths:
        best = truths["logits"].argmax(-1)
        mine, own = (float((x["logits"].argmax(-1) != best).double().mean()) for x in (ours, plain))
        rows.append(Row("int8", "top-1 changed", mine, own, INT8_CHANGED_ALLOWED))
    return rows


def _tensors(result: Any, name: str) -> list[tuple[str, Tensor]]:
    """The float tensors of a result, named by their path in it."""
    if isinstance(result, Tensor):
        return [(name, result)] if result.is_floating_point() else []
    if isinstance(result, Mapping):
        return [pair for key, value in result.items() for pair in _tensors(value, str(key))]
    if isinstance(result, (tuple, list)):
        return [pair for i, value in enumerate(result) for pair in _tensors(value, f"{name}.{i}")]
    return []


def _precision(model: nn.Module) -> str:
    if isinstance(model, VisionTransformer):
        return model.config.precision
    return next((module._vitfast.precision for module in model.modules() if isinstance(module, Fast)), "float")


def _check_same_parameters(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    different = set(ours) ^ set(theirs)
    if different:
        raise ValueError(f"reference has other parameters than model: {', '.join(sorted(different)[:5])}, ...")


def _error(ours: dict[str, Tensor], truth: dict[str, Tensor], keys: Sequence[str]) -> float:
    difference, norm = _distance(ours, truth, keys), _distance(truth, {}, keys)
    return difference / norm if norm > 0 else difference


def _worst(ours: dict[str, Tensor], truth: dict[str, Tensor], keys: Sequence[str]) -> tuple[str, float]:
    """The key with the largest error of its own, and that error."""
    floor = 1e-2 * _distance(truth, {}, keys) / len(keys) ** 0.5
    errors = {k: _distance(ours, truth, [k]) / max(_distance(truth, {}, [k]), floor, 1e-300) for k in keys}
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def _distance(a: dict[str, Tensor], b: dict[str, Tensor], keys: Sequence[str]) -> float:
    """The norm of a - b over all keys together; what ``b`` has not is zero."""
    return sum(float((a[k].double() - b[k].double() if k in b else a[k].double()).square().sum()) for k in keys) ** 0.5


def _random_images(model: nn.Module) -> Tensor:
    """Two images of the size and the channels that the model says it takes."""
    for owner in (getattr(model, "patch_embed", None), getattr(model, "config", None), model):
        size = getattr(owner, "img_size", None) or getattr(owner, "image_size", None)
        if size is not None:
            break
    else:
        raise ValueError(f"images are missing: the image size of a {type(model).__name__} is not known")
    height, width = (size, size) if isinstance(size, int) else size
    projection = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if projection is None else projection.in_channels
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
