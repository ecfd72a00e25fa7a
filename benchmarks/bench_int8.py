"""Whole models whose layers multiply 8-bit integers: ours beside PyTorch's and ONNX Runtime's, and beside floats.

Nobody calibrates: weights are rounded once, activations as they come (ours: each output and each token by itself; the others have one
scale for a tensor of activations). The dtype is that of our parameters and of who multiplies floats. A result may be as far
from fp64 as ``vitfast.verify`` allows, a tenth of its norm.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn

from vitfast.dropin.api import accelerate
from vitfast.verification import INT8_ALLOWED

from .bench_model import DEFAULTS, OPTIONAL, Models, check, forward_case, of_model
from .graph_runtimes import graph_runtimes
from .harness import Case, Provider
from .peers import attempt, installed

__all__ = ["DEFAULTS", "OPS", "OPTIONAL", "PEERS", "SHAPES", "case", "check"]

OPS = ("int8",)
PEERS = ("timm", "onnxruntime", "openvino")
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [],
    "overview cuda": [],
    "cpu": [
        {"B": 8},
        {"B": 1},
        {"model": "vit_small_patch16_224", "B": 8},
        {"model": "vit_small_patch16_224", "B": 1},
    ],
    "cuda": [],  # there the integers are multiplied as floats
    "growth": [],
    "growth cuda": [],
    "dry": [{"model": "vit_tiny_patch16_224", "B": 1, "depth": 1}],
}
_FORWARD = ("forward",)


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    return forward_case(op, shape, dtype, device, _providers, gate_floor=INT8_ALLOWED)


def _providers(models: Models) -> list[Provider]:
    ours = models.fresh()
    ours.set_precision("int8")
    found = [
        Provider("vitfast", of_model(ours), ours=True, directions=_FORWARD),
        Provider("vitfast floats", of_model(models.ours), ours=True, directions=_FORWARD),
    ]
    if installed("timm"):
        accelerated = accelerate(models.timm(), precision="int8")
        found += [
            Provider("timm accelerated", of_model(accelerated), ours=True, directions=_FORWARD),
            Provider("timm", of_model(models.timm()), directions=_FORWARD),
            attempt("timm PyTorch int8", functools.partial(_pytorch, models), directions=_FORWARD),
        ]
        if installed("onnx"):
            found += graph_runtimes(models, int8=True)
    return found


def _pytorch(models: Models) -> Provider:
    """PyTorch's own dynamic quantisation, of a model in fp32: it knows no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(models.timm().float(), {nn.Linear}, dtype=torch.qint8)
    return Provider(
        "timm PyTorch int8", lambda images: model(images.float()), directions=_FORWARD, note="fp32 around the integers"
    )
