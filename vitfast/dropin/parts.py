"""What the fused path reads out of somebody else's block, and when it may not.

Every function here runs twice: when a model is accelerated or reported on (what could be replaced, and why not), and at each
forward (is it still so?). So there is one truth, and a hook, an adapter or a quantised layer that arrives later is seen.
A reason is a short text; None (or the parts themselves) means that nothing stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vitfast.layers.halves import AttentionHalf, Linear, MlpHalf, Norm
from vitfast.layers.untouched import hooks_of
from vitfast.ops.arguments import ACTIVATIONS, autocast_dtype, product_dtype

# When the question is asked for: "now" as the modules' own training flags say, or for a mode that may come.
Mode = Literal["now", "eval", "train"]


def assemble(kind: Callable[..., Any], **parts: Any) -> Any:
    """The half, or why not: the first text among its parts, or what its tensors are."""
    for name, part in parts.items():
        for piece in part if type(part) is tuple else (part,):
            if isinstance(piece, str) and name != "activation":
                return piece
    half = kind(**parts)
    return _why_not_tensors(half) or half


def kind_name(kind: type) -> str:
    """``torch.nn.modules.linear.Linear`` as ``torch.Linear``: the library and the class."""
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def why_not_call(name: str, module: nn.Module | None, *kinds: type) -> str | None:
    """Why the fused path may not stand in for calling ``module``: another class than ``kinds``, a hook, an own forward."""
    if module is None or type(module) not in kinds:
        return f"{name} is {'missing' if module is None else kind_name(type(module))}"
    # spelled out, since this runs some twenty times for each block and call
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    return f"{name}.forward was replaced" if "forward" in module.__dict__ else None


def why_hooked(name: str, module: nn.Module) -> str | None:
    """Hooks on ``module``, or a ``forward`` put on the instance."""
    if has_hooks(module):
        return f"{name} has hooks"
    return f"{name}.forward was replaced" if "forward" in module.__dict__ else None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would run a forward or backward hook of its own."""
    return any(hooks_of(module))


def is_plain(tensor: Tensor | None) -> bool:
    """False for DTensor, quantised and other wrapping tensors, nested ones and fx proxies."""
    kind = type(tensor)
    if tensor is None or kind is nn.Parameter or kind is Tensor:
        return True
    if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor):
        return False
    return kind.__module__.startswith("torch._subclasses")  # FakeTensor and its kin, while a graph is traced


def transforms_active() -> bool:
    """torch.func transforms, forward-mode differentiation or hooks on every module: for the original code."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.nn.modules.module._has_any_global_hook()
    )


def may_run(x: Any) -> bool:
    """Whether the fused path can take ``x`` [B, L, D] at all."""
    return is_plain(x) and x.dim() == 3 and not transforms_active()


def keeps_dtype(x: Tensor, weight: Tensor, gamma: Tensor | None) -> bool:
    """Whether x + gamma * linear(x) has x's dtype in the original, as it has in our ops, and runs there at all."""
    if x.device != weight.device:
        return False
    if autocast_dtype(x) is None and x.dtype != weight.dtype:
        return False
    branch = product_dtype(x, weight)
    return torch.promote_types(x.dtype, branch_dtype(branch, gamma)) == x.dtype


def branch_dtype(product: torch.dtype, gamma: Tensor | None) -> torch.dtype:
    """The dtype of gamma * branch."""
    return product if gamma is None else torch.promote_types(product, gamma.dtype)


def layer_norm(name: str, module: nn.Module | None, *kinds: type) -> Norm | str:
    """The parts of a LayerNorm of one of ``kinds`` over the last dimension with weight and bias."""
    reason = why_not_call(name, module, *kinds)
    if reason is not None or module is None:
        return reason or ""
    if module.weight is None or module.bias is None:
        return f"{name} has no weight or no bias"
    if len(module.normalized_shape) != 1:  # type: ignore[arg-type]
        return f"{name} normalises {module.normalized_shape}"
    if getattr(module, "_fast_norm", False):
        return f"{name} uses timm's fast norm, which keeps autocast's dtype"
    return Norm(module.weight, module.bias, module.eps)  # type: ignore[arg-type]


def linear(name: str, module: nn.Module | None, *kinds: type) -> Linear | str:
    """Weight and bias of an ``nn.Linear`` (or exactly one of ``kinds``)."""
    reason = why_not_call(name, module, *(kinds or (nn.Linear,)))
    if reason is not None or module is None:
        return reason or ""
    return Linear(module.weight, module.bias)  # type: ignore[arg-type]


def why_not_identity(name: str, module: nn.Module | None) -> str | None:
    """A module that should do nothing: nn.Identity, or nothing at all."""
    return None if module is None else why_not_call(name, module, nn.Identity)


def why_dropout(name: str, module: nn.Module | None, mode: Mode) -> str | None:
    """A dropout that drops in ``mode``, or is something else than a dropout."""
    if module is None:
        return None
    reason = why_not_call(name, module, nn.Dropout, nn.Identity)
    if type(module) is nn.Identity:
        return reason
    if reason is None and module.p > 0.0 and is_training(module, mode):  # type: ignore[operator]
        return f"{name} drops with p={module.p} in training"
    return reason


def is_training(module: nn.Module, mode: Mode) -> bool:
    """Whether ``module`` counts as in training mode."""
    return module.training if mode == "now" else mode == "train"


def why_not_activation(kind: str) -> str | None:
    """None for an activation that the ops have."""
    return None if kind in ACTIVATIONS else f"activation {kind} has no fused op"


def _why_not_tensors(half: AttentionHalf | MlpHalf) -> str | None:
    """Parameters that are no plain tensors, or live on several devices."""
    tensors = [t for t in _tensors(half) if t is not None]
    for t in tensors:
        if not is_plain(t):
            return f"a parameter is a {type(t).__name__}"
        if t.device != tensors[0].device:
            return f"its parameters are on {tensors[0].device} and {t.device}"
    return None


def _tensors(half: AttentionHalf | MlpHalf) -> list[Tensor | None]:
    if isinstance(half, AttentionHalf):
        layers: list[Any] = [half.norm, *half.qkv, half.proj, half.q_norm, half.k_norm, half.out_norm]
    else:
        layers = [half.norm, *half.fc1, half.fc2, half.inner_norm]
    return [half.gamma] + [t for layer in layers if layer is not None for t in (layer.weight, layer.bias)]
