"""Other people's implementations: which are installed, how to get those that are not, and how ours are listed beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vitfast.ops.dispatch import TABLE
from vitfast.ops.library import COMPOSITE

from .gate import Run
from .harness import Provider

# module -> (how it is called in tables, how to install it)
INSTALL = {
    "timm": ("timm", "pip install timm"),
    "torchvision": ("torchvision", "pip install torchvision"),
    "transformers": ("transformers", "pip install transformers"),
    "onnxruntime": ("ONNX Runtime", "pip install onnx onnxruntime"),
    "openvino": ("OpenVINO", "pip install onnx openvino"),
    "flash_attn": ("flash-attn 2", "pip install flash-attn --no-build-isolation"),
    "flash_attn_interface": (
        "flash-attn 3",
        "the hopper folder of github.com/Dao-AILab/flash-attention: python setup.py install",
    ),
    "flash_attn.cute": ("flash-attn 4", "pip install flash-attn-4"),
    "xformers": ("xFormers", "pip install xformers"),
    "liger_kernel": ("Liger", "pip install liger-kernel"),
    "quack": ("quack", "pip install quack-kernels"),
    "transformer_engine": ("TransformerEngine", "pip install transformer-engine[pytorch]"),
}
GPU_ONLY = (
    "flash_attn",
    "flash_attn_interface",
    "flash_attn.cute",
    "xformers",
    "liger_kernel",
    "quack",
    "transformer_engine",
)


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def absent(modules: Iterable[str], device: str) -> list[dict[str, str]]:
    """The entries of a result file's ``absent`` list."""
    entries = []
    for module in modules:
        name, install = INSTALL[module]
        if device == "cpu" and module in GPU_ONLY:
            reason = "needs a CUDA GPU"
        elif not installed(module):
            reason = "not installed"
        else:
            continue
        entries.append({"provider": name, "reason": reason, "install": install})
    return entries


def attempt(name: str, make: Callable[[], Provider], **options: Any) -> Provider:
    """``make()``; if it fails, a provider that fails with the same error, so that the row says why and the others run."""
    try:
        return make()
    except Exception as error:
        reason = error

    def fail(**inputs: Any) -> Any:
        raise reason

    return Provider(name, fail, **options)


def compiled(run: Callable[..., Any], **options: Any) -> Run:
    """torch.compile for the one shape at hand; compiled at the first call."""
    return torch.compile(run, dynamic=False, **options)


def plain_providers(reference: Run) -> list[Provider]:
    """Plain PyTorch, eager and compiled; max-autotune takes minutes, so it runs only when named."""
    return [
        Provider("pytorch eager", reference),
        Provider("torch.compile", compiled(reference)),
        Provider("torch.compile max-autotune", compiled(reference, mode="max-autotune-no-cudagraphs"), slow=True),
    ]


def own_providers(op: str, run: Callable[..., Any], device: str, dtype: torch.dtype) -> list[Provider]:
    """Each of vitfast's backends that can run here; only when named what is no choice of anyone's.

    These are Triton's interpreter, and PyTorch's functions for tracers and transforms, which "auto" never takes.
    """
    found = []
    for backend in TABLE[op]:
        if backend.why_not(device, (dtype,), True) is not None:
            continue
        interpreted = backend.name.startswith("triton") and device == "cpu"
        found.append(
            Provider(
                f"vitfast {backend.name}",
                _with_backend(run, backend.name),
                ours=True,
                slow=interpreted or backend.name == COMPOSITE,
                note="Triton's interpreter: right, but no time worth reading" if interpreted else "",
            )
        )
    return found


def _with_backend(run: Callable[..., Any], backend: str) -> Run:
    def call(**inputs: Any) -> Any:
        return run(**inputs, backend=backend)

    return call
