"""How an op enters PyTorch: one torch.library namespace, defined in Python, and the loader of the C++ extension.

Ops are defined here rather than in C++ so that they exist, trace and document themselves where the extension is absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

COMPOSITE = "composite"  # the backend of ordinary PyTorch functions: composite.py
_ORDINARY = (torch.Tensor, torch.nn.Parameter)
LIBRARY = torch.library.Library("vitfast", "DEF")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define one op from its schema and return how to call it.

    With ordinary tensors and with nothing that watches PyTorch's dispatcher, the call is ``run`` itself or, with gradients, an
    autograd.Function of it: the way through the dispatcher to Python takes longer than some kernels. Inside a ``torch.func``
    transform, under forward-mode differentiation and in ONNX export, which know nothing of our ops, the call is ``run``
    with the backend "composite": PyTorch's own functions.

    Args:
        schema: ``"name(Tensor x, ..., str backend) -> Tensor"``; the last argument is the backend. A gradient's name ends
            with "_backward".
        run: the implementation for every device (it picks the backend).
        fake: the same with shapes only; allocates with ``x.new_empty(shape)``.
        backward, setup_context: as for ``torch.library.register_autograd``. Without them the op has no derivative, and
            differentiating it raises.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    unrecorded = _unrecorded(run)
    LIBRARY.impl(name, unrecorded, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitfast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"vitfast::{name}", backward or _no_second_derivative(name), setup_context=setup_context, lib=LIBRARY
    )
    op = getattr(torch.ops.vitfast, name).default
    function = _function(name, unrecorded, backward, setup_context) if backward and setup_context else None

    def call(*args: Any) -> Any:
        if args[-1] == COMPOSITE:
            return run(*args)
        if is_unwatched(*args):
            if not torch.is_grad_enabled():
                return run(*args)
            if function:
                return function.apply(*args)
        return run(*args[:-1], COMPOSITE) if _sees_only_pytorch() else op(*args)

    def call_gradient(*args: Any) -> Any:
        return run(*args) if not torch.is_grad_enabled() and is_unwatched(*args) else op(*args)

    return call_gradient if name.endswith("_backward") else call


def is_unwatched(*args: Any) -> bool:
    """Whether, autograd aside, only the kernels could tell that an op with these arguments was not dispatched."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd._profiler_enabled() or torch._C._get_tracing_state() is not None:
        return False
    return all(type(a) in _ORDINARY for a in args if isinstance(a, torch.Tensor))


def _unrecorded(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` unseen by autograd: a view that it returns is an ordinary tensor, which may be changed in place."""

    def inner(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return run(*args)

    return inner


def _function(
    name: str, run: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The op for autograd alone."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"vitfast_{name}", (torch.autograd.Function,), members)


def _sees_only_pytorch() -> bool:
    """Whether somebody looks on who can do nothing with an op that is not PyTorch's."""
    return (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.onnx.is_in_onnx_export()
    )


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"vitfast::{name} is itself a gradient: second derivatives need backend={COMPOSITE!r}, or nested torch.func.grad"
        )

    return backward


@functools.cache
def extension_status() -> dict[str, dict[str, Any]]:
    """Load the C++ libraries once and say how that went.

    Returns ``{"_C": {"loaded": bool, "path": str | None, "error": str | None}, "_C_cuda": {...}}``: ``_C`` has the CPU
    kernels and every schema, ``_C_cuda`` (needs ``_C``) the CUDA kernels. The error is the loader's own message.
    """
    status: dict[str, dict[str, Any]] = {}
    folder = Path(__file__).resolve().parents[1]
    for stem in ("_C", "_C_cuda"):
        path = folder / f"{stem}.abi3.so"
        entry: dict[str, Any] = {"loaded": False, "path": str(path), "error": None}
        if not path.exists():
            entry |= {
                "path": None,
                "error": f"{path.name} is not built (python setup.py build_ext --inplace builds it)",
            }
        elif stem == "_C_cuda" and not status["_C"]["loaded"]:
            entry["error"] = "needs _C, which did not load"
        else:
            try:
                torch.ops.load_library(str(path))
                entry["loaded"] = True
            except (OSError, RuntimeError) as error:
                entry["error"] = str(error.__cause__ or error)  # torch wraps the loader's own message
        status[stem] = entry
    return status
