"""Other libraries' models before and after ``vitfast.accelerate``: time and memory, and a table of their numbers' errors.

`vitfast bench accelerate` measures; `python -m vitfast.benchmarks.bench_accelerate` prints the parity table.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitfast.dropin.api import accelerate, report
from vitfast.verification import Report, verify

from .architectures import NAMES, build
from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import compiled
from .schema import write_text

OPS = ("accelerate", "accelerate_train")
PEERS = ("timm", "torchvision", "transformers")
DEFAULTS: dict[str, int | str] = {"model": "timm/vit_small_patch16_dinov3", "B": 8}
_CPU: list[dict[str, int | str]] = [
    {"model": name, "B": batch}
    for batch in (8, 1)
    for name in (
        "timm/vit_tiny_patch16_224",
        "timm/vit_small_patch16_dinov3",
        "timm/eva02_tiny_patch14_224",
        "torchvision/vit_b_16",
        "openai/clip-vit-base-patch32",  # transformers' others are the architectures above
    )
]
_CUDA: list[dict[str, int | str]] = [
    {"model": name, "B": batch}
    for name, batch in (
        ("timm/vit_base_patch16_224", 128),
        ("timm/deit3_base_patch16_224", 128),
        ("timm/vit_small_patch16_dinov3", 128),
        ("timm/eva02_base_patch14_224", 32),
        ("timm/vit_so400m_patch14_siglip_224", 64),
        ("torchvision/vit_b_16", 128),
        ("google/vit-base-patch16-224", 128),
        ("facebook/dinov2-base", 16),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", 128),
        ("google/siglip-base-patch16-224", 128),
        ("openai/clip-vit-base-patch32", 256),
        ("facebook/vit-mae-base", 128),
    )
]
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [],
    "overview cuda": [],
    "cpu": _CPU,
    "cuda": _CUDA,
    "growth": [{"model": "timm/vit_tiny_patch16_224", "B": batch} for batch in (1, 2, 4, 8)],
    "growth cuda": [{"model": "timm/vit_base_patch16_224", "B": batch} for batch in (1, 8, 64, 256)],
    "dry": [{"model": "timm/vit_tiny_patch16_224", "B": 1, "small": 1}],
}
_GATE_SAMPLES = 2


def check(shape: Mapping[str, int | str]) -> None:
    """Raise ValueError for a model that is not in the list, before any is made."""
    if shape["model"] not in NAMES:
        near = difflib.get_close_matches(str(shape["model"]), NAMES, n=1)
        raise ValueError(f"model is {shape['model']!r}; allowed: {', '.join(near or NAMES)}")


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    train, autocast = op == "accelerate_train", dtype == "autocast"
    kind = torch.float32 if autocast else TORCH_DTYPE[dtype]
    model, inputs = build(str(shape["model"]), small=bool(shape.get("small", 0)), batch=int(shape["B"]))
    model = model.to(device, kind)
    exact = copy.deepcopy(model).double()  # of the rounded weights
    floats = {n: t.to(device, kind) for n, t in inputs.items() if t.is_floating_point()}
    constants = {n: t.to(device) for n, t in inputs.items() if n not in floats}
    call: Any = functools.partial(_first_gradients if train else _logits, constants=constants, device=device)
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=lambda: dict(floats),
        grads=(),
        reference=call(model, autocast=autocast),
        truth_of=call(exact, autocast=False),
        providers=functools.partial(_providers, model, constants, train, autocast, device),
        work=_work(model, floats | constants, train, kind.itemsize),
        timing="host",
    )


def _work(model: nn.Module, inputs: Mapping[str, Tensor], train: bool, element: int) -> dict[str, list[Work]]:
    """The model's floating-point operations as PyTorch counts them, and its weights and images read once."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    moved = sum(p.numel() * p.element_size() for p in model.parameters())
    moved += sum(t.numel() * t.element_size() for t in inputs.values())
    flops = counter.get_total_flops()
    return {"both": [Work(3 * moved, 3 * flops)]} if train else {"forward": [Work(moved, flops)]}


def _output(result: Any) -> Tensor:
    """The logits, or the tokens where there are none, of any library's model."""
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def _forward(model: Callable[..., Any], device: str, autocast: bool, inputs: Mapping[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # masked autoencoders draw their masks
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        return _output(model(**inputs))


def _logits(
    model: nn.Module, *, constants: dict[str, Tensor], device: str, autocast: bool, forward: Any = None
) -> Callable[..., Tensor]:
    return lambda **floats: _forward(forward or model, device, autocast, floats | constants)


def _first_gradients(
    model: nn.Module, *, constants: dict[str, Tensor], device: str, autocast: bool, forward: Any = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """inputs -> (the first samples' output, their gradients of all parameters in the order of their names)."""
    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]

    def run(**floats: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            out = _forward(forward or model, device, autocast, floats | constants)
        towards = torch.zeros(out.shape, dtype=torch.float64)
        first = out[:_GATE_SAMPLES].shape
        towards[:_GATE_SAMPLES] = torch.randn(first, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(out, parameters, towards.to(out), allow_unused=True)
        flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
        return out.detach()[:_GATE_SAMPLES], torch.cat(flat)

    return run


def _providers(
    model: nn.Module, constants: dict[str, Tensor], train: bool, autocast: bool, device: str
) -> list[Provider]:
    make = functools.partial(_provider, constants=constants, train=train, autocast=autocast, device=device)
    found = [make("original", model)]
    for policy in ("fused", "mlp") if train else ("fused",):
        ours = accelerate(copy.deepcopy(model), recompute=policy)
        found.append(make(f"vitfast {policy}" if train else "vitfast", ours, ours=True))
    found.append(make("original torch.compile", model, forward=compiled(model), slow=True))
    ours = accelerate(copy.deepcopy(model))
    found.append(make("vitfast torch.compile", ours, forward=compiled(ours), ours=True, slow=True))
    return found


def _provider(
    name: str,
    model: nn.Module,
    *,
    constants: dict[str, Tensor],
    train: bool,
    autocast: bool,
    device: str,
    forward: Any = None,
    **options: Any,
) -> Provider:
    if not train:
        run = _logits(model, constants=constants, device=device, autocast=autocast, forward=forward)
        return Provider(name, run, directions=("forward",), **options)

    def loss_of(**floats: Tensor) -> Tensor:
        return _forward(forward or model, device, autocast, floats | constants).float().square().mean()

    def step(**floats: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        loss_of(**floats).backward()

    return Provider(
        name,
        _first_gradients(model, constants=constants, device=device, autocast=autocast, forward=forward),
        directions=("both",),
        step=step,
        forward=loss_of,
        parameters=(*model.parameters(), *model.buffers(), *constants.values()),
        **options,
    )


def parity(name: str, small: bool, device: str = "cpu") -> tuple[Report, str]:
    """(errors of the accelerated model beside the original's own, what was replaced) of one architecture."""
    model, inputs = build(name, small=small, batch=8 if small else 2)
    accelerate(model.to(device))
    rows = report(model).rows
    blocks = [row for row in rows if "attention" in row.fused or "mlp" in row.fused]
    whole = sum(row.action == "replaced" for row in blocks)
    return verify(model, images=inputs), f"{whole} of {len(blocks)}"


def table(results: Iterator[tuple[str, Report, str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| architecture | blocks fused | fp32 outputs | fp32 gradients | bf16 outputs | bf16 gradients | |"
    yield "|---|---|---|---|---|---|---|"
    for name, found, replaced in results:
        cells = []
        for dtype in ("float32", "bfloat16"):
            for gradients in (False, True):
                rows = [row for row in found.rows if row.dtype == dtype and (row.what == "gradients") == gradients]
                worst = max(rows, key=lambda row: row.ours / row.plain if row.plain else row.ours)
                cells.append(f"{worst.ours:.1e} / {worst.plain:.1e}")
        yield f"| {name} | {replaced} | {' | '.join(cells)} | {'pass' if found.passed else '**FAIL**'} |"


def versions(device: str) -> str:
    """What the numbers depend on, as "torch 2.14.0, timm 1.0.31, ... on the CPU"."""
    names = [f"{name} {metadata.version(name)}" for name in ("torch", *PEERS)]
    place = "the CPU" if device == "cpu" else torch.cuda.get_device_name()
    return f"{', '.join(names)} on {place}"


def main(argv: list[str] | None = None) -> int:
    """Prints the parity table as it grows; 0 if every architecture passed, 1 if not."""
    parser = argparse.ArgumentParser(prog="vitfast.benchmarks.bench_accelerate", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--full", action="store_true", help="real width and depth (an hour on a CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(NAMES)}")
    passed = []

    def results() -> Iterator[tuple[str, Report, str]]:
        for name in args.names or NAMES:
            found, replaced = parity(name, not args.full, args.device)
            passed.append(found.passed)
            yield name, found, replaced

    size = "Real width and depth, batch 2" if args.full else "Two blocks of the real head width, batch 8"
    lines = [
        "# Parity of accelerated models",
        "",
        f"Written by `python -m vitfast.benchmarks.bench_accelerate` with {versions(args.device)}. {size}. A cell is",
        "our error / the original's own error, both against fp64; see [accelerate.md](accelerate.md).",
        "",
    ]
    print("\n".join(lines))
    for line in table(results()):
        lines.append(line)
        print(line, flush=True)
    lines += ["", f"{sum(passed)} of {len(passed)} architectures pass."]
    print(lines[-1])
    if args.out is not None:
        write_text(args.out, "\n".join(lines) + "\n")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
