"""Values made from a weight once and kept while it stays the same: packed, quantised or cast copies for inference.

A value belongs to the weight's storage: it is found again through any tensor that looks at the same numbers in the same
way, and goes away with the storage. Nothing here holds the weight itself, and nothing is part of a module, so neither
``state_dict`` nor pickle nor deepcopy sees it.

A change is noticed by the tensor's version counter (in-place operations, optimizers, ``load_state_dict``) and by the
storage (``.to()``, ``.data = ...``). Writes through ``weight.data`` or a NumPy view pass the counter by, so on the CPU a few
of the numbers are compared as well: they show a change of the whole weight, as an exponential moving average makes, but not of
a single element. After such a write call ``clear()``.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

_SAMPLES = 8  # words of 64 bits, evenly spread


class Source:
    """A weight as it was when a value was made from it."""

    def __init__(self, weight: Tensor) -> None:
        self.storage = weakref.ref(weight.untyped_storage())
        self.dtype = weight.dtype
        self.version = weight._version
        self.address = weight.data_ptr()
        self.words = _words(weight)  # in the weight's own memory
        self.seen = [word.value for word in self.words]

    def fits(self, weight: Tensor) -> bool:
        """Whether the weight is still the same."""
        same_place = self.version == weight._version and self.address == weight.data_ptr()
        return same_place and self.dtype == weight.dtype and [word.value for word in self.words] == self.seen


@dataclass(frozen=True)
class Kept:
    """A value, and what its weights were when it was made."""

    value: Any
    nbytes: int
    sources: tuple[Source, ...]

    def fits(self, *weights: Tensor) -> bool:
        """Whether the weights are still what the value was made from."""
        return all(source.fits(weight) for source, weight in zip(self.sources, weights, strict=True))


_lock = threading.RLock()
_entries: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Hashable, Kept]] = weakref.WeakKeyDictionary()
_limit: int | None = None
_generation = 0


def derived(weight: Tensor, kind: Hashable, make: Callable[[Tensor], Value]) -> Value:
    """``make(weight)``, made again only when the weight has changed.

    Args:
        weight: a parameter or any other tensor; ``make`` gets it detached and in normal mode, so that what is made can be
            used outside ``torch.inference_mode`` too.
        kind: names what ``make`` makes; everything else that the value depends on (an instruction set, a block size)
            belongs into it.
        make: returns a tensor, or a tuple of tensors, None and other tuples.

    Returns:
        The value; not to be written to. It is made at every call, and not kept, where keeping it would be wrong: a gradient
        of the weight is wanted (then ``make`` gets the weight itself; inside an op, where gradients are off, the caller
        asks only when none is wanted), the weight was created under ``torch.inference_mode`` (it counts no versions), is
        no plain tensor (FakeTensor, DTensor, functorch) or is being traced, or the value is a view of the weight; and
        where it does not fit under the limit.
    """
    if not _may_keep(weight):
        return make(weight)
    entry, _ = _find_or_make((weight,), kind, make)
    return entry.value


def kept(weights: tuple[Tensor, ...], kind: Hashable, make: Callable[..., Any], nbytes: int) -> Kept | None:
    """As ``derived``, of several weights, for callers that can do without the value: None where it would not be kept.

    nbytes: of the value, so that it is not made in vain where it does not fit under the limit. The entry is good as long as it
    ``fits`` the weights and ``generation()`` stays the same.
    """
    if not all(map(_may_keep, weights)) or (_limit is not None and nbytes > _limit):
        return None
    entry, stays = _find_or_make(weights, kind, make)
    return entry if stays else None


def _may_keep(weight: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and weight.requires_grad
    return not wanted and _limit != 0 and _can_keep(weight)


def _find_or_make(weights: tuple[Tensor, ...], kind: Hashable, make: Callable[..., Any]) -> tuple[Kept, bool]:
    """The entry, and whether it is kept from now on: with the first weight's storage."""
    storages = [weight.untyped_storage() for weight in weights]
    key = (kind, *((w.dtype, w.shape, w.stride(), w.storage_offset()) for w in weights))

    def fits(entry: Kept) -> bool:
        same = all(source.storage() is storage for source, storage in zip(entry.sources, storages, strict=True))
        return same and entry.fits(*weights)

    of_storage = _entries.get(storages[0])
    entry = None if of_storage is None else of_storage.get(key)
    if entry is not None and fits(entry):
        return entry, True
    with _lock:  # one thread makes it, the others wait for it
        of_storage = _entries.get(storages[0], {})
        entry = of_storage.pop(key, None)
        if entry is None or not fits(entry):
            del entry  # the old value, before the new one needs room
            entry = _make_entry(weights, make)
        shared = any(t.untyped_storage() is storage for t in _tensors(entry.value) for storage in storages)
        stays = not shared and (_limit is None or size_bytes() + entry.nbytes <= _limit)
        if stays:
            _entries.setdefault(storages[0], {})[key] = entry
        return entry, stays


def generation() -> int:
    """Grows with ``clear`` and ``limit_bytes``: who holds a kept value for longer than a call lets go of it then."""
    return _generation


def limit_bytes(limit: int | None) -> None:
    """Let the kept values take at most ``limit`` bytes in this process: 0 keeps nothing, None (the start) everything.

    Values that are over the limit now are dropped, the newest first; a value that does not fit is made at every call.

    Raises:
        ValueError: ``limit`` is negative.
    """
    global _limit, _generation
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; allowed are 0 or more bytes, or None")
    with _lock:
        _limit = limit
        _generation += 1
        if limit is None:
            return
        total = 0
        for of_storage in list(_entries.values()):
            for key, entry in list(of_storage.items()):
                total += entry.nbytes
                if total > limit:
                    del of_storage[key]
                    total -= entry.nbytes


def size_bytes() -> int:
    """Bytes of all kept values."""
    with _lock:
        return sum(entry.nbytes for of_storage in list(_entries.values()) for entry in of_storage.values())


def clear() -> None:
    """Drop every kept value; needed after changing part of a weight through ``.data`` or NumPy."""
    global _generation
    with _lock:
        _generation += 1
        _entries.clear()


def _can_keep(weight: Tensor) -> bool:
    plain = type(weight) is torch.nn.Parameter or type(weight) is Tensor
    if not plain or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if weight.is_inference() or weight.layout != torch.strided:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(weight)


def _make_entry(weights: tuple[Tensor, ...], make: Callable[..., Any]) -> Kept:
    sources = tuple(map(Source, weights))  # before making: a change meanwhile shows at the next call
    with torch.inference_mode(False), torch.no_grad():
        value = make(*(weight.detach() for weight in weights))
    return Kept(value, sum(t.untyped_storage().nbytes() for t in _tensors(value)), sources)


def _words(weight: Tensor) -> tuple[ctypes.c_uint64, ...]:
    count = weight.numel() * weight.element_size() // 8
    if weight.device.type != "cpu" or count == 0 or not weight.is_contiguous():
        return ()
    picked = sorted({(2 * i + 1) * count // (2 * _SAMPLES) for i in range(_SAMPLES)})
    return tuple(ctypes.c_uint64.from_address(weight.data_ptr() + 8 * i) for i in picked)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple) else []
