"""``vitfast.accelerate``, ``vitfast.report`` and ``vitfast.restore``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from vitfast.dropin import fast
from vitfast.dropin.adapter import FAMILIES, Adapter, adapters
from vitfast.dropin.fused import Options
from vitfast.dropin.parts import kind_name
from vitfast.dropin.report import AccelerateReport, ReportRow
from vitfast.dropin.together import Sequential, holds_blocks
from vitfast.models.config import PRECISIONS, RECOMPUTES
from vitfast.models.vit import VisionTransformer
from vitfast.ops import backends
from vitfast.ops.dispatch import FORCED, check_backend_name

# The ops that replaced modules call; a named backend must be there for each.
_OPS = ("attention", "layer_norm", "linear_residual", "norm_attention", "norm_linear", "norm_mlp", "patch_embed")
_log = logging.getLogger("vitfast")

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, *, backend: str = "auto", recompute: str = "fused", precision: str = "float") -> M:
    """Run our ops inside a Vision Transformer of timm, torchvision or transformers, or inside a model that contains one.

    In place: recognised blocks, patch projections and norms change their class to a subclass with a faster ``forward``
    and keep everything else, so that ``state_dict()``, optimizers, hooks, ``isinstance`` and saving work as before. Where
    the fused path would change behaviour (a hook inside a block, a layer somebody replaced, dropout in training, a mask it
    does not know), the original code runs, at that moment and for that half of the block. See docs/accelerate.md.

    Args:
        model: any ``nn.Module``; see docs/accelerate.md for the families.
        backend: for every op: "auto", "cpu", "triton", "torch", or "composite" (PyTorch's own functions, with derivatives of
            any order).
        recompute: what backward computes again: "none", "fused" (LayerNorm and activation outputs), "mlp" (also the first
            MLP product) or "block" (keep block inputs only).
        precision: what blocks multiply in on CPUs in eval mode where no gradient is wanted: "float", or "int8", 8-bit integers
            (docs/int8.md); with masks, hooks inside, or norms of q and k they stay floats.

    Returns:
        ``model``. A second call only changes the options; models of ``vitfast.create_model`` have their
        own and are returned as they are. One line is logged to the logger "vitfast".

    Raises:
        ValueError: ``model`` has nothing that is supported (it is not touched), or another argument is a wrong word.
        RuntimeError: a named backend cannot run on this machine; the message has every reason.
    """
    options = _check(model, backend, recompute, precision)
    chosen = adapters(model)
    todo = [(module, kind) for _, module, kind in _replaceable(model, chosen) if kind is not None]
    done = [module for module in model.modules() if isinstance(module, fast.Fast)]
    if not todo and not done:
        if any(isinstance(module, VisionTransformer) for module in model.modules()):
            _log.info("%s runs vitfast's ops already: nothing to accelerate", type(model).__name__)
            return model
        raise ValueError(_unsupported(model, chosen))
    for module, kind in todo:
        fast.swap(module, kind, options)
    whole = {kind: fast_kind for adapter in chosen for kind, fast_kind in adapter.models.items()}
    for module in model.modules():
        if type(module) is nn.Sequential and holds_blocks(module):
            fast.swap(module, Sequential, options)
        elif type(module) in whole:
            fast.swap(module, whole[type(module)], options)
    changed = any(module._vitfast != options for module in done)
    for module in done:
        fast.set_options(module, options)
    if todo or changed:
        _log.info("accelerated %s", report(model).summary())
    else:
        _log.info("%s is accelerated already: nothing changed", type(model).__name__)
    return model


def report(model: nn.Module) -> AccelerateReport:
    """What of ``model`` runs our ops, what was left as it was, and why, as it stands now.

    Returns:
        An :class:`AccelerateReport`, with one row for each block, patch projection, norm and pooling that was looked at.

    Raises:
        ValueError: ``model`` is no ``nn.Module``.
    """
    _check_module(model)
    rows = []
    options = None
    chosen = adapters(model)
    notes: dict[int, dict[str, str]] = {}
    for adapter in chosen:
        for module in model.modules():
            for block, part, reason in adapter.notes(module):
                notes.setdefault(id(block), {})[part] = reason
    for path, module, kind in _replaceable(model, chosen):
        if isinstance(module, fast.Fast):
            options = options or module._vitfast
            rows.append(_fast_row(path, module, notes.get(id(module), {})))
        elif kind is not None:
            rows.append(ReportRow(path, kind_name(type(module)), "left", (), "not accelerated"))
        else:
            rows.append(ReportRow(path, kind_name(type(module)), "left", (), _why_left(path, module, chosen)))
    return AccelerateReport(type(model).__name__, rows, *(options or ()))


def restore(model: M) -> M:
    """Undo :func:`accelerate` in place: every module has its own class again, and computes bit for bit what it did before.

    Returns:
        ``model``; one that is not accelerated is returned as it is.

    Raises:
        ValueError: ``model`` is no ``nn.Module``, or a replaced module was wrapped into another class since (by FSDP2's
            ``fully_shard``, for example); nothing is changed then.
    """
    _check_module(model)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, fast.Fast)]
    for path, module in found:
        if not type(module).__module__.startswith("vitfast.dropin."):
            raise ValueError(
                f"{path or 'model'} was wrapped as {type(module).__name__} after accelerate; restore it before wrapping"
            )
    for _, module in found:
        fast.unswap(module)
    if found:
        _log.info("restored %s: %d modules", type(model).__name__, len(found))
    return model


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; allowed: torch.nn.Module")


def _check(model: Any, backend: str, recompute: str, precision: str) -> Options:
    _check_module(model)
    check_backend_name(backend)
    if recompute not in RECOMPUTES:
        raise ValueError(f"recompute is {recompute!r}; allowed are {', '.join(map(repr, RECOMPUTES))}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed are {', '.join(map(repr, PRECISIONS))}")
    if precision == "int8" and backend not in ("auto", "cpu"):
        raise ValueError(f"backend is {backend!r}; with precision 'int8' allowed are 'auto', 'cpu'")
    rows = {(row["op"], row["backend"]): row for row in backends()}
    if precision == "int8" and not rows["int8_linear", "cpu"]["available"]:
        raise RuntimeError(f"precision 'int8' cannot run: {rows['int8_linear', 'cpu']['reason']}")
    if backend != "auto":
        for op in _OPS:
            row = rows.get((op, backend)) or rows.get((op, "triton" if backend in FORCED else ""))
            if row is None or not row["available"]:
                raise RuntimeError(
                    f"backend {backend!r} cannot run {op}: {row['reason'] if row else 'it has no such kernel'}"
                )
    return Options(backend, recompute, precision)


def _replaceable(model: nn.Module, chosen: list[Adapter]) -> Iterator[tuple[str, nn.Module, type[nn.Module] | None]]:
    """(path, module, fast class or None if it stays) for every module that an adapter has a word on, each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for adapter in chosen:
            for found in _of_adapter(path, module, adapter):
                if id(found[1]) not in seen:
                    seen.add(id(found[1]))
                    yield found


def _of_adapter(
    path: str, module: nn.Module, adapter: Adapter
) -> Iterator[tuple[str, nn.Module, type[nn.Module] | None]]:
    kind = type(module)
    if isinstance(module, fast.FastBlock) or kind in adapter.left:
        yield path, module, None
    elif kind in adapter.blocks:
        usable = any(not isinstance(part, str) for part in adapter.blocks[kind].parts(module, "eval").values())
        yield path, module, adapter.blocks[kind] if usable and not adapter.why_stay(module) else None
    elif isinstance(module, tuple(adapter.blocks)):
        yield path, module, None
    for parent, names in adapter.children.items():
        if isinstance(module, parent):
            for name in names:
                child = _descendant(module, name)
                if child is not None and type(child) is not nn.Identity:
                    yield f"{path}.{name}".lstrip("."), child, _single(child, adapter)


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _single(child: nn.Module, adapter: Adapter) -> type[nn.Module] | None:
    kind = adapter.single_class(child)
    if isinstance(child, fast.Fast) or kind is None:
        return None
    return None if _single_reason(kind, child) else kind


def _single_reason(kind: Any, child: nn.Module) -> str:
    (part,) = kind.parts(child, "eval").values()
    return part if isinstance(part, str) and part != "fused" else ""


def _why_left(path: str, module: nn.Module, chosen: list[Adapter]) -> str:
    kind = type(module)
    for adapter in chosen:
        if kind in adapter.left:
            return adapter.left[kind]
        if kind in adapter.blocks:
            reason = adapter.why_stay(module)
            return reason or _reasons(adapter.blocks[kind].parts(module, "eval"))
        if isinstance(module, tuple(adapter.blocks)):
            return "a subclass of a known block, which may compute something else"
    for adapter in chosen:
        single = adapter.single_class(module)
        if single is not None:
            return _single_reason(single, module)
    return "a class that has no fused counterpart"


def _fast_row(path: str, module: fast.Fast, notes: dict[str, str]) -> ReportRow:
    """Judged in eval mode; what only training stands against is a remark."""
    parts = module.parts(module, "eval") | notes
    fused = tuple(name for name, part in parts.items() if not isinstance(part, str) or part == "fused")
    action = "left" if not fused else "replaced" if len(fused) == len(parts) else "partly replaced"
    reason = _reasons(parts)
    if isinstance(module, fast.FastBlock):
        training = module.parts(module, "train")
        floats = "" if module._vitfast.precision == "float" else _why_floats(parts)
        reason = "; ".join(filter(None, [reason, floats, _reasons({k: v for k, v in training.items() if k in fused})]))
    return ReportRow(path, kind_name(module.original_class()), action, fused, reason)


def _why_floats(parts: dict[str, Any]) -> str:
    if any(isinstance(part, str) for part in parts.values()):
        return "products: floats, as a half stays"
    device = parts["mlp"].fc2.weight.device.type
    if device != "cpu":
        return f"products: floats, on {device}"
    plain = all(part.plain for part in parts.values())
    return "" if plain else "products: floats, for norms of q, k, heads or the hidden layer"


def _reasons(parts: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {part}" for name, part in parts.items() if isinstance(part, str) and part != "fused")


def _unsupported(model: nn.Module, chosen: list[Adapter]) -> str:
    message = (
        f"{kind_name(type(model))} has nothing that vitfast can replace. Supported: {'; '.join(FAMILIES.values())}"
    )
    left = [(path, why) for path, module, _ in _replaceable(model, chosen) if (why := _why_left(path, module, chosen))]
    return message + (f". {left[0][0]} was left: {left[0][1]}" if left else "")


__all__ = ["accelerate", "report", "restore"]
