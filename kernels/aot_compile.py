"""Compiling one case of aot_cases.py for a chip that need not be here, and what each of its kernels costs there."""

from __future__ import annotations

import re
import subprocess
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

from . import device
from .aot_cases import DTYPES, HALF, Case
from .chips import CHIPS

# By what the PTX calls them: fifth, fourth and second generation of the tensor cores' interface.
TENSOR_CORE = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}
TENSOR_MEMORY = "cp.async.bulk.tensor"  # the tensor memory accelerator, in PTX
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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
    """Launches inside compile for `arch` instead, and hand (kernel, compiled or the exception, arguments by name) to `seen`."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except (
            Exception
        ) as error:  # from the front end, a pass or ptxas: one failure must not hide the kernels after it
            compiled = error
        seen(self, compiled, dict(zip(self.arg_names, args, strict=False)) | kwargs)

    driver.set_active(_Driver(arch))  # stays: without a GPU there is none to go back to, and this process only compiles
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(device, "device_properties", return_value=CHIPS[arch].device),
    ):
        yield


def configuration(given: dict) -> dict:
    """The constants and options of a launch, those that are no plain values by their names."""
    names = [k for k, v in given.items() if k.isupper() and len(k) > 1 and v is not None]
    options = [k for k in ("num_warps", "num_stages", "maxnreg") if given.get(k) is not None]
    plain = (bool, int, float, str, tuple)
    return {k: given[k] if isinstance(given[k], plain) else str(given[k]) for k in (*names, *options)}


def compile_case(arch: int, case: Case, dtype: str, known: set[str]) -> list[dict]:
    """One row for each kernel of the case whose hash is not known yet."""
    rows = []

    def seen(kernel: JITFunction, compiled, given: dict) -> None:
        title = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_').removesuffix('_kernel')}"
        about = {"case": case.name, "dtype": dtype, "shape": case.shape, "configuration": configuration(given)}
        if isinstance(compiled, Exception):
            reason = f"does not compile: {type(compiled).__name__}: {compiled}".splitlines()[0]
            rows.append({"arch": arch, "kernel": title, "hash": "", "problems": [reason], **about})
        elif compiled.hash not in known:
            known.add(compiled.hash)
            has_product = "tt.dot" in compiled.asm["ttir"]
            row = describe(arch, title, compiled, has_product, dtype in HALF, bool(given.get("DESCRIPTORS")))
            work = flops(title, given, case.shape) if has_product else 0
            rows.append(row | about | floor(arch, dtype, work, tensor_bytes(given)) | {"hash": compiled.hash})

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        with compiling(arch, seen):
            case.launch(DTYPES[dtype])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return rows
