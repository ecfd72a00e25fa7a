"""A fast Vision Transformer for PyTorch.

    import vitfast
    model = vitfast.create_model("vit_base_patch16_224")   # timm's names and parameter names

Names are imported on first use, so that ``vitfast --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vitfast import ops
    from vitfast.dropin.api import accelerate, report, restore
    from vitfast.models.registry import create_model, list_models
    from vitfast.models.weights import load_pretrained
    from vitfast.ops import backends, extension_status
    from vitfast.verification import verify

_HOMES = {
    "accelerate": "dropin.api",
    "backends": "ops",
    "create_model": "models.registry",
    "extension_status": "ops",
    "list_models": "models.registry",
    "load_pretrained": "models.weights",
    "report": "dropin.api",
    "restore": "dropin.api",
    "verify": "verification",
}
__all__ = [
    "__version__",
    "accelerate",
    "backends",
    "create_model",
    "extension_status",
    "list_models",
    "load_pretrained",
    "ops",
    "report",
    "restore",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("vitfast.ops")
    if name in _HOMES:
        value = getattr(import_module(f"vitfast.{_HOMES[name]}"), name)
        globals()[name] = value  # from now on without this detour; also where a submodule has the same name
        return value
    raise AttributeError(f"module 'vitfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
