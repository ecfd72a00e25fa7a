"""Whether a module's parts are still the ones it was made of, so that a fused op may read their weights past them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def remember_parts(module: nn.Module) -> None:
    """Note the exact class of every child; call it at the end of ``__init__``."""
    module.__dict__["_parts"] = tuple((name, type(child)) for name, child in module.named_children())


def untouched(module: nn.Module) -> bool:
    """True while no part below ``module`` has a hook, another class or a forward of its own.

    False after adapters (LoRA), parametrisations, quantised layers or weights, offloading wrappers and feature hooks: then
    the sub-modules have to be called. Hooks on ``module`` itself do not count, its own call runs them. ``module`` and its
    parts with children must have gone through ``remember_parts``. Costs some 3 microseconds for a block.
    """
    for name, kind in module.__dict__["_parts"]:
        part = getattr(module, name)
        if type(part) is not kind or watched(part):
            return False
        if isinstance(part, nn.Linear):
            if _wrapped(part.weight):
                return False
        elif "_parts" in part.__dict__ and not untouched(part):
            return False
    return True


def watched(part: nn.Module) -> bool:
    """Whether someone looks at what goes into this module or comes out of it."""
    own_forward = "forward" in part.__dict__  # as offloading libraries set it
    return own_forward or any(hooks_of(part))


def hooks_of(part: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of everything that runs around a module's own code."""
    return part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks


def _wrapped(weight: Tensor) -> bool:
    """A weight of a subclass that holds other tensors: quantised or sharded."""
    return type(weight) not in (nn.Parameter, Tensor) and is_traceable_wrapper_subclass(weight)
