"""What one library's adapter tells the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from vitfast.dropin import fast

# library -> what of it the supported families are called in messages; the adapter module has the same name
FAMILIES = {
    "timm": "timm VisionTransformer and Eva",
    "torchvision": "torchvision VisionTransformer (vit_*)",
    "transformers": (
        "transformers ViT, DeiT, DINOv2 (with and without registers), DINOv3-ViT, SigLIP and SigLIP2 vision, CLIP vision,"
        " ViTMAE"
    ),
}


@dataclass(frozen=True)
class Adapter:
    """One library's classes and what takes their place.

    Attributes:
        library: its import name.
        blocks: the exact class of a transformer block -> its fast subclass.
        models: the exact class of a model that reads the first token alone -> its subclass that makes no others in the end.
        single: the exact class of a module that stands alone (a norm, a convolution) -> its fast subclass, beside torch's.
        children: class of a parent -> paths of what is replaced in it as single modules.
        left: exact classes that are known and left alone -> why.
        why_stay: why one block is left although its class is known, beside what its parts say.
        notes: (block, part, why that part will not run fused) for what only the module around the blocks knows.
    """

    library: str
    blocks: Mapping[type, Any]
    children: Mapping[type, tuple[str, ...]]
    models: Mapping[type, type] = field(default_factory=dict)
    single: Mapping[type, type] = field(default_factory=dict)
    left: Mapping[type, str] = field(default_factory=dict)
    why_stay: Callable[[nn.Module], str | None] = lambda block: None
    notes: Callable[[nn.Module], Iterable[tuple[nn.Module, str, str]]] = lambda module: ()

    def single_class(self, module: nn.Module) -> Any:
        """The fast class for a module that stands alone."""
        return {nn.LayerNorm: fast.LayerNorm, nn.Conv2d: fast.Conv2d, **self.single}.get(type(module))


def adapters(model: nn.Module) -> list[Adapter]:
    """The adapters of the libraries that ``model``'s modules come from; only those libraries are imported."""
    bases = {base.__module__.split(".")[0] for module in model.modules() for base in type(module).__mro__}
    return [
        import_module(f"vitfast.dropin.{library}").adapter()
        for library in FAMILIES
        if library in bases and library in sys.modules
    ]
