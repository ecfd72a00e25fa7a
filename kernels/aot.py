"""Compile every Triton kernel as its launcher would, for chips that need not be here, and say what each costs.

    python -m vitfast.kernels.aot [--quick] [--arch 80 90 100] [--dtype bf16 fp16 fp32 tf32] [--only NAME ...] [--out FILE]

The launchers run on meta tensors with the launch itself replaced by compilation, so what is compiled is what would
run. Prints and writes, for each kernel, configuration, dtype and architecture, registers, spills (a kernel's STACK
bytes), shared memory, blocks per multiprocessor, the tensor-core instruction, whether the tensor memory accelerator
fetches the operands, and the floor: the time that its FLOPs and its tensors, moved once, take at the published rates of
the named GPU (chips.py) for the case's shape. Fails on a spill, on
shared memory over the chip's limit, on a 16-bit product without tensor cores (on Hopper and later: a product of mlp.py
without theirs), and on descriptors without the accelerator.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import (
    activation,
    attention_backward,
    attention_forward,
    attention_heads,
    configs,
    device,
    layer_norm,
    mlp,
    patch_embed,
    patchify,
)
from .chips import CHIPS

# By what the PTX calls them: fifth, fourth and second generation of the tensor cores' interface.
TENSOR_CORE = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}
TENSOR_MEMORY = "cp.async.bulk.tensor"  # the tensor memory accelerator, in PTX
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

BATCH = 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class _Driver:
    """Stands in for the CUDA driver: a device of the wanted architecture, which nothing is ever launched on."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are cached per device

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack (spills) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers:\n{text}")
    return int(found[1]), int(found[2])


def describe(arch: int, name: str, compiled, has_product: bool, half: bool, described: bool) -> dict:
    chip = CHIPS[arch]
    registers, spills = resources(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    instruction = next((short for text, short in TENSOR_CORE.items() if text in compiled.asm["ptx"]), "")
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps by 256
    blocks = min(65536 // (per_warp * warps), 64 // warps, chip.shared_per_multiprocessor // (shared + 1024), 32)
    tensor_memory = TENSOR_MEMORY in compiled.asm["ptx"]
    problems = [f"spills {spills} bytes"] if spills else []
    if shared > chip.device.shared_bytes:
        problems.append(f"shared memory {shared} over the chip's {chip.device.shared_bytes}")
    if has_product and half and not instruction:
        problems.append("16-bit product without tensor cores")
    if has_product and half and arch >= 90 and instruction == "mma" and name.startswith("mlp."):
        problems.append("product on the tensor cores' old interface")
    if described and not tensor_memory:
        problems.append("descriptors without the tensor memory accelerator")
    return {
        "arch": arch, "kernel": name, "registers": registers, "spills": spills, "shared": shared, "warps": warps,
        "blocks": blocks, "tensor_core": instruction, "tensor_memory": tensor_memory, "problems": problems,
    }  # fmt: skip


# Products of two L x L x E matrices for each sequence and head.
ATTENTION_PRODUCTS = {
    "attention_forward.one_pass": 2,
    "attention_forward.looped": 2,
    "attention_backward.one_pass": 5,
    "attention_backward.keys": 4,
    "attention_backward.queries": 3,
    "attention_bias.bias_gradient": 2,
}


def flops(title: str, given: dict, shape: dict[str, int]) -> int:
    """Of one launch's products, from the kernel's own arguments or, for attention, the case's shape; else 0."""
    if title == "mlp.linear":
        return 2 * given["T"] * given["N"] * given["K"] * (2 if given["KIND"] == "swiglu" else 1)
    if title == "mlp.hidden_backward":
        return 2 * given["T"] * given["F"] * given["N"]
    if title in ATTENTION_PRODUCTS:
        return 2 * ATTENTION_PRODUCTS[title] * shape["B"] * shape["H"] * shape["L"] ** 2 * shape["E"]
    if title.startswith("patch_embed."):
        return 2 * shape["B"] * shape["N"] * shape["K"] * shape["D"]
    return 0


def tensor_bytes(given: dict) -> int:
    """Of every tensor argument, moved once."""
    tensors = [getattr(value, "base", value) for value in given.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def floor(arch: int, dtype: str, work: int, moved: int) -> dict:
    chip = CHIPS[arch]
    seconds = max(work / (chip.tflops[dtype] * 1e12), moved / (chip.terabytes_per_second * 1e12))
    return {"gpu": chip.name, "flops": work, "bytes": moved, "floor_us": round(seconds * 1e6, 2)}


@contextmanager
def compiling(arch: int, seen: Callable[[JITFunction, object, dict], None]) -> Iterator[None]:
    """Launches inside compile for `arch` instead, and hand (kernel, compiled, arguments by name) to `seen`."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen(self, compiled, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return compiled

    driver.set_active(_Driver(arch))  # stays: without a GPU there is none to go back to, and this process only compiles
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(device, "device_properties", return_value=CHIPS[arch].device),
    ):
        yield


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def norm_case(D: int, stream: torch.dtype | None = None) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        T = BATCH * 197
        x, y = meta(T, D, dtype=stream or dtype), meta(T, D, dtype=dtype)
        row, column, factor = meta(T), meta(D), meta(BATCH)
        layer_norm.layer_norm_forward(x, None, None, None, column, column, 1e-6, None, y, row, row)
        layer_norm.layer_norm_forward(x, y, column, factor, column, column, 1e-6, x, y, row, row)
        layer_norm.layer_norm_apply(x, row, row, column, column, y)
        layer_norm.scale_add_forward(x, y, column, factor, x)
        layer_norm.layer_norm_backward(y, None, x, row, row, column, None, None, None, x, None, None, column, column)
        layer_norm.layer_norm_backward(y, x, x, row, row, column, y, column, factor, x, y, column, column, column)

    return launch


def activation_case(F: int) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        h = meta(BATCH * 197, F, dtype=dtype)
        for kind in ("gelu", "gelu_tanh", "quick_gelu"):
            activation.activation_forward(h, kind, h)
            activation.activation_backward(h, h, kind, h, None, None)
            activation.activation_backward(h, h, kind, h, h, meta(F))
        gated = meta(BATCH * 197, 2 * F, dtype=dtype)
        activation.activation_forward(gated, "swiglu", h)
        activation.activation_backward(gated, h, "swiglu", gated, None, None)
        activation.activation_backward(gated, h, "swiglu", gated, h, meta(2 * F))

    return launch


# What attention does beside softmax(q k^T) v, by name; "all" is everything that goes together.
ATTENTION_OPTIONS = {
    "": frozenset[str](),
    "bias": frozenset({"bias"}),
    "packed": frozenset({"packed"}),
    "padding": frozenset({"padding"}),
    "rope": frozenset({"rope"}),
    "norm": frozenset({"norm"}),
    "rope norm packed": frozenset({"rope", "norm", "packed"}),
    "all": frozenset({"rope", "interleaved", "norm", "bias", "padding"}),
}


def attention_case(L: int, E: int, variant: str) -> Callable[[torch.dtype], None]:
    wanted = ATTENTION_OPTIONS[variant]

    def launch(dtype: torch.dtype) -> None:
        if configs.attention_why_not(E, dtype):
            return
        H, T = 12, BATCH * L
        qkv, out, lse = meta(T, 3, H, E, dtype=dtype), meta(T, H, E, dtype=dtype), meta(H, T)
        bias = meta(1, H, L, L, dtype=dtype) if "bias" in wanted else None
        d_bias = meta(1, H, L, L) if "bias" in wanted else None
        padding = meta(BATCH, L, dtype=torch.bool) if "padding" in wanted else None
        cu_seqlens = meta(BATCH + 1, dtype=torch.int32) if "packed" in wanted else None
        options = attention_heads.HeadOptions()
        if "rope" in wanted:
            # as DINOv3: four registers and a class token, one angle for each pair; interleaved as EVA, one for each element
            interleaved = "interleaved" in wanted
            table = meta(T if "packed" in wanted else L - 5, E if interleaved else E // 2)
            options = options._replace(cos=table, sin=table, interleaved=interleaved)
        d_norm = meta(2, E) if "norm" in wanted else None
        if "norm" in wanted:
            vector, kind = meta(E), "layer_norm"
            options = options._replace(q_norm=kind, q_weight=vector, q_bias=vector, q_eps=1e-6)
            options = options._replace(k_norm=kind, k_weight=vector, k_bias=vector, k_eps=1e-6)
        lengths = (cu_seqlens, L, 0 if "packed" in wanted else L)
        given = (E**-0.5, bias, padding, options, *lengths)
        attention_forward.attention_forward(qkv, *given, out, lse)
        attention_backward.attention_backward(out, qkv, out, lse, *given, qkv, d_bias, d_norm, d_norm)

    return launch


def patch_case(P: int, D: int, pixels: torch.dtype, channels_last: bool) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        size, R = 16 * P, 1
        images = meta(BATCH, 3, size, size, dtype=pixels)
        images = images.to(memory_format=torch.channels_last) if channels_last else images
        K, N = 3 * P * P, 256
        weight, tokens, rows = (
            meta(D, 3, P, P, dtype=dtype),
            meta(BATCH, R + N, D, dtype=dtype),
            meta(BATCH * N, K, dtype=dtype),
        )
        channel, column, position, prefix = meta(3), meta(D), meta(R + N, D), meta(R, D)
        d_images = meta(BATCH, 3, size, size)
        patch_embed.patch_embed_forward(images, weight, column, position, prefix, channel, channel, tokens)
        patch_embed.patch_embed_weight_gradient(images, tokens, channel, channel, dtype, meta(D, 3, P, P))
        patch_embed.patch_embed_image_gradient(tokens, weight, channel, d_images)
        patchify.patchify(images, P, channel, channel, rows)
        patchify.unpatchify(rows, P, channel, d_images)
        patchify.assemble_tokens(meta(BATCH * N, D, dtype=dtype), column, position, prefix, tokens)

    return launch


def mlp_case(
    D: int, T: int = BATCH * 197, kinds: tuple[str, ...] = ("gelu", "gelu_tanh", "quick_gelu")
) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        F = 4 * D
        x, h, column, hidden = meta(T, D, dtype=dtype), meta(T, F, dtype=dtype), meta(D), meta(F)
        w1, w2, stream = meta(F, D, dtype=dtype), meta(D, F, dtype=dtype), meta(T, D)
        mlp.linear_forward(x, w1, hidden, h)
        for kind in kinds:
            mlp.linear_activation_forward(x, w1, hidden, kind, None, h)
            mlp.linear_activation_forward(x, w1, hidden, kind, h, h)
            mlp.hidden_backward(x, w2, h, kind, h, h, hidden)
        gated, gated_w1 = meta(T, 2 * F, dtype=dtype), meta(2 * F, D, dtype=dtype)
        mlp.linear_activation_forward(x, gated_w1, meta(2 * F), "swiglu", gated, h)
        mlp.hidden_backward(x, w2, gated, "swiglu", gated, h, meta(2 * F))
        mlp.linear_residual_forward(h, w2, column, x, None, None, x)
        mlp.linear_residual_forward(h, w2, column, stream, column, meta(1), stream)

    return launch


# Names, and the dtypes each is compiled in: the shapes are those whose configurations differ.
ALL, HALF, BF16 = ("bf16", "fp16", "fp32", "tf32"), ("bf16", "fp16"), ("bf16",)
NO_PRODUCT = ("bf16", "fp16", "fp32")
# Name, what launches its kernels, the dtypes it is compiled in, and the shape its floors are computed for.
AotCase = tuple[str, Callable[[torch.dtype], None], tuple[str, ...], dict[str, int]]


def attention_cases(quick: bool) -> Iterator[AotCase]:
    # 72 stands for 80 too, 88 for 96 (the same pieces without masks), and 197 for every length up to 208.
    lengths = (197,) if quick else (50, 65, 128, 197, 577)
    for E in (64, 72) if quick else (16, 64, 72, 88, 128, 192, 256):
        for L in lengths:
            shape = {"B": BATCH, "L": L, "H": 12, "E": E}
            dtypes = BF16 if quick else ALL if E == 64 else ("bf16", "fp32", "tf32")
            yield f"attention L={L} E={E}", attention_case(L, E, ""), dtypes, shape
            options = ("bias", "rope", "norm", "all") if L in (197, 577) and (not quick or E == 64) else ()
            for option in options:
                few = BF16 if quick or (option != "bias" and E not in (64, 88)) else dtypes
                yield f"attention L={L} E={E} {option}", attention_case(L, E, option), few, shape
        for option in ("packed",) if quick else ("packed", "padding", "rope norm packed"):
            yield f"attention L={lengths[-1]} E={E} {option}", attention_case(lengths[-1], E, option), BF16, shape


def cases(quick: bool) -> Iterator[AotCase]:
    for D in (768,) if quick else (33, 192, 768, 1280, 4096, 6144, 8192):
        shape = {"T": BATCH * 197, "D": D}
        yield f"layer_norm D={D}", norm_case(D), BF16 if quick else NO_PRODUCT, shape
        yield f"layer_norm D={D} fp32 stream", norm_case(D, torch.float32), BF16, shape
    yield "activation F=3072", activation_case(3072), BF16 if quick else NO_PRODUCT, {"T": BATCH * 197, "F": 3072}
    yield from attention_cases(quick)
    for P, D in ((16, 768),) if quick else ((4, 96), (8, 384), (14, 1280), (16, 768), (32, 1024)):
        shape = {"B": BATCH, "N": 256, "K": 3 * P * P, "D": D}
        yield f"patch_embed P={P} D={D} uint8", patch_case(P, D, torch.uint8, False), BF16 if quick else ALL, shape
        if not quick:
            yield f"patch_embed P={P} D={D} fp32 NHWC", patch_case(P, D, torch.float32, True), BF16, shape
    for D in (768,) if quick else (192, 768, 1280):
        case = mlp_case(D, kinds=("gelu",)) if quick else mlp_case(D)
        yield f"mlp D={D}", case, BF16 if quick else ALL, {"T": BATCH * 197, "D": D, "F": 4 * D}
        if not quick:
            yield f"mlp D={D} one image", mlp_case(D, 197), BF16, {"T": 197, "D": D, "F": 4 * D}


def compile_case(
    arch: int, name: str, launch: Callable[[torch.dtype], None], shape: dict[str, int], dtype: str, known: set[str]
) -> list[dict]:
    """One row for each kernel of the case that no earlier case compiled alike."""
    rows = []

    def seen(kernel: JITFunction, compiled, given: dict) -> None:
        if compiled.hash not in known:
            known.add(compiled.hash)
            title = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_').removesuffix('_kernel')}"
            has_product = "tt.dot" in compiled.asm["ttir"]
            described = bool(given.get("DESCRIPTORS"))
            row = describe(arch, title, compiled, has_product, dtype in HALF, described)
            constants = {k: v for k, v in given.items() if k.isupper() and len(k) > 1 and v is not None}
            configuration = constants | {k: given[k] for k in ("num_warps", "num_stages") if k in given}
            bound = floor(arch, dtype, flops(title, given, shape) if has_product else 0, tensor_bytes(given))
            rows.append({**row, "case": name, "dtype": dtype, "shape": shape, "configuration": configuration, **bound})

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        with compiling(arch, seen):
            launch(DTYPES[dtype])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return rows


def line(row: dict) -> str:
    note = "; ".join(row["problems"])
    core = row["tensor_core"] + (" tma" if row["tensor_memory"] else "")
    return (
        f"sm_{row['arch']:<4}{row['dtype']:<5}{row['case']:<34}{row['kernel']:<36}{row['registers']:>5}{row['spills']:>7}"
        f"{row['shared']:>8}{row['warps']:>6}{row['blocks']:>7}{row['floor_us']:>9.1f}  {core:<13}{note}"
    ).rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and report what they cost.")
    parser.add_argument("--quick", action="store_true", help="ViT-B's shapes in bf16 only")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(CHIPS), default=sorted(CHIPS))
    parser.add_argument("--dtype", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path("build/aot.json"))
    options = parser.parse_args(argv)
    if not isinstance(layer_norm._forward_kernel, JITFunction):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    print(
        f"{'arch':<7}{'dtype':<5}{'case':<34}{'kernel':<36} regs spills  shared warps blocks floor us  tensor cores",
        flush=True,
    )
    rows, known = [], set[str]()
    for arch in options.arch:
        for name, launch, dtypes, shape in cases(options.quick):
            for dtype in [d for d in dtypes if d in options.dtype and any(part in name for part in options.only)]:
                for row in compile_case(arch, name, launch, shape, dtype, known):
                    print(line(row), flush=True)
                    rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    failed = [row for row in rows if row["problems"]]
    gpus = ", ".join(CHIPS[arch].name for arch in options.arch)
    print(f"Floors are for {BATCH} images of each case's shape, or one, on {gpus}, at published rates.")
    counts = f"{len(rows)} kernels compiled with Triton {triton.__version__}, {len(failed)} with problems"
    print(f"{counts}; rows in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
