"""Modules whose class was exchanged for a subclass with a faster ``forward``.

A replaced module is the same object with the same parameters, buffers, hooks and children; only ``__class__`` and one
attribute differ. So state dicts, optimizers, ``isinstance``, ``.to()``, deepcopy and pickle see what they saw before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitfast import ops
from vitfast.dropin.fused import Context, Options, attend, feed_forward
from vitfast.dropin.parts import Mode, is_plain, keeps_dtype, transforms_active
from vitfast.layers.halves import AttentionHalf, Halves, MlpHalf, Norm
from vitfast.layers.stack import BlockStack, Describe
from vitfast.ops.arguments import autocast_dtype

_OPTIONS = "_vitfast"
_stacks: WeakKeyDictionary[nn.Module, BlockStack] = WeakKeyDictionary()  # what one call of a module's blocks takes


class Fast:
    """Mixed in before the original class, which is the next in line: ``super().forward`` is always the way out.

    A subclass is named like the original, because others look modules up by class name (FSDP's wrapping policies do).
    """

    _vitfast = Options()

    @classmethod
    def original_class(cls) -> type[nn.Module]:
        """The library's own class."""
        return next(c for c in cls.__mro__ if issubclass(c, nn.Module) and not issubclass(c, Fast))

    @staticmethod
    def parts(module: Any, mode: Mode) -> dict[str, Any]:
        """What ``module`` (fast or original) would run fused in ``mode``, by name: the parts, or a text why not."""
        raise NotImplementedError


def swap(module: nn.Module, fast: type[nn.Module], options: Options) -> None:
    """Exchange the class; nothing else about ``module`` changes."""
    module.__class__ = fast
    module.__dict__[_OPTIONS] = options


def unswap(module: Any) -> None:
    """Undo :func:`swap`."""
    module.__class__ = module.original_class()
    module.__dict__.pop(_OPTIONS, None)
    _stacks.pop(module, None)


def set_options(module: Any, options: Options) -> None:
    """Change how a fast module runs."""
    module.__dict__[_OPTIONS] = options


class FastBlock(Fast):
    """A pre-norm block. An adapter gives ``parts`` ("attention" and "mlp") and the two original halves."""

    def run_fused(
        self,
        x: Tensor,
        context: Context,
        original_attention: Callable[[Tensor], Tensor],
        attention_stays: str | None = None,
    ) -> Tensor | None:
        """The block with every half fused that can be, the other through its own modules; None where neither can.

        ``original_attention`` computes x + attention branch by the original modules, ``self.original_mlp`` the other half.
        ``attention_stays``: why attention has to be the original's in this call.
        """
        options, found = self._vitfast, None

        def describe() -> list[Halves | None]:
            nonlocal found
            found = self.parts(self, "now")
            return [both_halves(self, found, x)]

        if attention_stays is None and not context.masks:
            together = run_together(self, [self], x, describe, rope=context.rope, inside=True)
            if together is not None:
                return together
        parts = found or self.parts(self, "now")
        attention, mlp = parts["attention"], parts["mlp"]
        fuse_attention = attention_stays is None and _fits(attention, x)
        if fuse_attention and _fits(mlp, x):
            if options.recompute == "block" and torch.is_grad_enabled():
                return checkpoint(_both, x, attention, mlp, options, context, use_reentrant=False)
            return _both(x, attention, mlp, options, context)
        if fuse_attention:
            return self.original_mlp(attend(x, attention, options, context))
        return feed_forward(original_attention(x), mlp, options) if _fits(mlp, x) else None

    def original_mlp(self, x: Tensor) -> Tensor:
        """x + the MLP branch, by the original modules."""
        raise NotImplementedError


def run_together(module: Any, blocks: list[Any], x: Tensor, describe: Describe, **how: Any) -> Tensor | None:
    """``BlockStack.run``, by a stack that lives as long as ``module``."""
    if not ops.is_unwatched(x) or len({block._vitfast for block in blocks}) != 1:
        return None
    stack = _stacks.get(module)
    if stack is None:
        stack = _stacks.setdefault(module, BlockStack())
    return stack.run(blocks, x, describe, blocks[0]._vitfast.backend, **how)


def _fits(half: AttentionHalf | MlpHalf | str, x: Tensor) -> bool:
    """Whether a half can run fused and gives what the original gives for x in the same dtype."""
    if isinstance(half, str):
        return False
    return keeps_dtype(x, (half.proj if isinstance(half, AttentionHalf) else half.fc2).weight, half.gamma)


def both_halves(block: Any, parts: dict[str, Any], x: Tensor) -> Halves | None:
    """A block's parts where both can run fused on x."""
    if not all(_fits(half, x) for half in parts.values()):
        return None
    return Halves(parts["attention"], parts["mlp"], "float" if block.training else block._vitfast.precision)


def _both(x: Tensor, attention: AttentionHalf, mlp: MlpHalf, options: Options, context: Context) -> Tensor:
    return feed_forward(attend(x, attention, options, context), mlp, options)


def masked(mask: Tensor | None, x: Tensor, heads: int) -> Context | None:
    """SDPA's mask as the fused path takes it, or None where it cannot.

    A boolean mask is True where a query may look; others are added to the logits. It has four dimensions or fewer and
    broadcasts to [B, H, L, L]; one bool [B, 1, 1, L] is padding, for which the op has a cheaper way.
    """
    if mask is None:
        return Context()
    if not isinstance(mask, Tensor) or not is_plain(mask) or mask.dim() > 4 or mask.device != x.device:
        return None
    full = (x.shape[0], heads, x.shape[1], x.shape[1])
    if any(m not in (1, f) for m, f in zip(mask.shape[::-1], full[::-1], strict=False)):
        return None
    if mask.dtype != torch.bool:
        return Context(mask) if mask.is_floating_point() else None
    if mask.dim() == 4 and mask.shape[1:] == (1, 1, x.shape[1]):
        return Context(padding=~mask[:, 0, 0].expand(x.shape[0], -1))
    return Context(torch.zeros(mask.shape, dtype=torch.float32, device=x.device).masked_fill_(~mask, float("-inf")))


class LayerNorm(Fast, nn.LayerNorm):
    """A norm that stands alone: before the first block or after the last."""

    @staticmethod
    def parts(module: Any, mode: Mode) -> dict[str, Any]:
        return {"norm": norm_parts(module, nn.LayerNorm)}

    def forward(self, input: Tensor) -> Tensor:
        return fused_norm(self, input) if norm_fits(self, input) else super().forward(input)


def norm_parts(module: Any, kind: type) -> Norm | str:
    """What ``LayerNorm`` and its kin run; hooks on the module itself do not matter, since it is called as before."""
    kinds = (type(module),) if isinstance(module, Fast) else (kind,)
    if module.weight is None or module.bias is None or len(module.normalized_shape) != 1:
        return "it has no weight or no bias, or normalises several dimensions"
    if type(module) not in kinds:
        return f"it is a {type(module).__name__}"
    if getattr(module, "_fast_norm", False):
        return "it uses timm's fast norm, which keeps autocast's dtype"
    return Norm(module.weight, module.bias, module.eps)


def norm_fits(module: Any, x: Any) -> bool:
    """Whether the fused norm gives what ``F.layer_norm`` gives here: autocast turns half precision to fp32 on CUDA."""
    return (
        is_plain(x)
        and is_plain(module.weight)
        and is_plain(module.bias)
        and x.device == module.weight.device
        and isinstance(norm_parts(module, type(module)), Norm)
        and (autocast_dtype(x) is None or x.dtype == torch.float32)
        and not transforms_active()
    )


def fused_norm(module: Any, x: Tensor) -> Tensor:
    """The norm by our op."""
    return ops.layer_norm(x, module.weight, module.bias, module.eps, backend=module._vitfast.backend)


class Conv2d(Fast, nn.Conv2d):
    """A patch projection: a convolution whose stride is its kernel, as one product over token-major patches.

    The result has the convolution's shape [B, D, rows, columns] as a view of [B, rows * columns, D], so that the
    ``flatten(2).transpose(1, 2)`` behind it copies nothing.
    """

    @staticmethod
    def parts(module: Any, mode: Mode) -> dict[str, Any]:
        return {"patch projection": why_not_patches(module) or "fused"}

    def forward(self, input: Tensor) -> Tensor:
        patch = self.kernel_size[0]
        if (
            why_not_patches(self) is None
            and is_plain(input)
            and input.dim() == 4
            and input.shape[1] == self.in_channels
            and input.shape[2] % patch == 0
            and input.shape[3] % patch == 0
            and input.is_floating_point()
            and input.device == self.weight.device
            and (input.dtype == self.weight.dtype or autocast_dtype(input) is not None)
            and not transforms_active()
        ):
            grid = (input.shape[2] // patch, input.shape[3] // patch)
            tokens_BND = ops.patch_embed(input, self.weight, self.bias, backend=self._vitfast.backend)
            return tokens_BND.transpose(1, 2).unflatten(2, grid)
        return super().forward(input)


def why_not_patches(conv: Any) -> str | None:
    """Why a convolution does not cut an image into square patches without overlap or gap."""
    if not isinstance(conv, (Conv2d,)) and type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}"
    square = conv.kernel_size[0] == conv.kernel_size[1]
    plain = conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1) and conv.groups == 1
    if conv.kernel_size != conv.stride or not square or not plain:
        return (
            f"kernel {conv.kernel_size}, stride {conv.stride}, padding {conv.padding}: no square patches side by side"
        )
    return None if is_plain(conv.weight) and is_plain(conv.bias) else "a parameter is no plain tensor"


__all__ = [
    "Conv2d",
    "Fast",
    "FastBlock",
    "LayerNorm",
    "both_halves",
    "fused_norm",
    "masked",
    "norm_fits",
    "norm_parts",
    "run_together",
    "set_options",
    "swap",
    "unswap",
]
