"""The machine a result comes from: what it is, and the rates it reaches, measured in about three seconds."""

from __future__ import annotations

import datetime
import glob
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitfast import ops

from .peak import chip_tflops
from .stopwatch import Stopwatch, clocked

PACKAGES = (
    "torch",
    "triton",
    "timm",
    "torchvision",
    "transformers",
    "onnxruntime",
    "openvino",
    "flash-attn",
    "flash-attn-4",
    "xformers",
    "liger-kernel",
    "quack-kernels",
    "transformer-engine",
    "numpy",
)
_CPU_CACHE_MIB, _CORE_CACHE_MIB = 32.0, 1.0  # assumed where the system does not say
# The most that inputs in turn take on a CPU. Server chips have last-level caches of hundreds of MiB, shared with strangers:
# twice that would be minutes of copying, and in use, too, activations and weights come from there.
_MOST_COLD_MIB = 128.0
# What a figure depends on: results and documents may change after it was measured.
_CODE = (":/vitfast", ":/kernels", ":/csrc", ":/benchmarks/*.py", ":/setup.py")
_COPIED_MIB = {"cpu": 256, "cuda": 1024}  # well over any cache that inputs are to miss


def measure(device: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> dict[str, Any]:
    """The ``machine`` entry of a result file. Rates are the best of several tries: they are the floor's denominators."""
    machine = {"kind": device, "threads": torch.get_num_threads()}
    machine |= {"cache_mib": cache_mib(device), "cold_mib": cold_mib(device)}
    return machine | (_gpu() if device == "cuda" else _cpu()) | rates(device, dtypes)


def rates(device: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> dict[str, Any]:
    """What the machine reaches: copies (read and write counted), matrix products, launches, PyTorch calls.

    ``product_tflops`` are the best matrix products of any library here; ``matrix_tflops``, which floors are made of, on a
    CPU the chip's own multiply-add rate where that is higher.
    """
    cached = cold_mib(device) < 2 * cache_mib(device)  # then inputs come from the last-level cache, and so do these
    copies = int(cold_mib(device) / 2) if cached else _COPIED_MIB[device]
    copy_ms = _copy_ms(copies * 2**20, device)
    small = torch.zeros(16, device=device)
    launch_ms = _best(lambda: small.add_(1), device, 0.05)
    products = {str(d).removeprefix("torch."): round(matrix_tflops(d, device), 3) for d in dtypes}
    chip = chip_tflops(products) if device == "cpu" else {}
    return {
        "copy_gb_per_s": round(2 * copies * 2**20 / copy_ms / 1e6, 1),
        "matrix_tflops": {name: max(rate, chip.get(name, 0.0)) for name, rate in products.items()},
        "product_tflops": products,
        "launch_us": round(launch_ms * 1e3, 2),
        "dispatch_us": round(_dispatch_us(small), 2),
    }


def _copy_ms(size: int, device: str) -> float:
    x = torch.ones(size, dtype=torch.uint8, device=device)
    y = torch.zeros_like(x)  # written once, so that its pages are there
    return _best(lambda: y.copy_(x), device, 0.3)


def _best(call: Callable[[], Any], device: str, seconds: float) -> float:
    """The least milliseconds of a call, among samples of some ``seconds`` together."""
    watch = Stopwatch(device)
    clocked(call, device)
    ms, host_us = clocked(call, device)
    calls = [call] * watch.calls_per_sample(ms, 1, False)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        best = min(best, watch.sample(calls, host_us))
        if time.perf_counter() > end:
            return best


def matrix_tflops(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a square product; the best of PyTorch's, ours and (on a CPU) oneDNN's own."""
    n = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    ways = [lambda: torch.nn.functional.linear(a, b), lambda: ops.linear(a, b)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    fastest = float("inf")
    for way in ways:
        try:
            fastest = min(fastest, _best(way, device, 0.25))
        except RuntimeError as error:
            if device == "cuda":
                raise
            if way is ways[-1] and fastest == float("inf"):
                raise RuntimeError(f"no product of {dtype} runs on this machine: {error}") from error
    return 2 * n**3 / fastest / 1e9


def _dispatch_us(small: torch.Tensor) -> float:
    """What the host spends on one PyTorch call: the least of ten hundreds."""
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(100):
            small.add_(1)
        best = min(best, (time.perf_counter() - start) / 100)
        if small.is_cuda:
            torch.cuda.synchronize()
    return best * 1e6


def cache_mib(device: str) -> float:
    """Size of the last-level cache, MiB."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size / 2**20  # type: ignore[attr-defined]
    return max(_cpu_caches_mib(), default=_CPU_CACHE_MIB)


def cold_mib(device: str) -> float:
    """What inputs must take together so that each call finds its own outside of the caches that count, MiB.

    Twice the last-level cache. On a CPU where that is more than ``_MOST_COLD_MIB``, so much or twice all cores' own
    caches, whichever is more: inputs then miss these, and come from the last-level cache.
    """
    wanted = 2 * cache_mib(device)
    if device == "cuda":
        return wanted
    own = sorted(_cpu_caches_mib())[-2:-1] or [_CORE_CACHE_MIB]  # the second largest: a core's own
    return min(wanted, max(_MOST_COLD_MIB, 2 * own[0] * torch.get_num_threads()))


def _cpu_caches_mib() -> list[float]:
    sizes = []
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        text = Path(path).read_text().strip()
        sizes.append(float(text[:-1]) * {"K": 2**-10, "M": 1.0, "G": 2.0**10}[text[-1]])
    return sizes


def name_of(device: str) -> str:
    """What the result files call the CPU or the GPU of this machine."""
    from vitfast.cli.info import cpu_model

    return torch.cuda.get_device_name(0) if device == "cuda" else cpu_model()


def _cpu() -> dict[str, Any]:
    mhz = None
    try:
        with open("/proc/cpuinfo") as file:
            mhz = next((float(line.split(":")[1]) for line in file if line.startswith("cpu MHz")), None)
    except OSError:
        pass
    return {"name": name_of("cpu"), "clocks": {"cpu_mhz": mhz}, "driver": None, "load": _cpu_load()}


def _cpu_load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def load(machine: dict[str, Any]) -> float | None:
    """Its load now; of a GPU what it was."""
    known: float | None = machine["load"]
    return known if machine["kind"] == "cuda" else _cpu_load()


def _gpu() -> dict[str, Any]:
    query = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "utilization.gpu")
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits", "--id=0"]
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
        values = dict(zip(query, (v.strip() for v in line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        values = {}
    name = torch.cuda.get_device_name(0)
    load = values.pop("utilization.gpu", "")
    return {
        "name": name,
        "driver": values.pop("driver_version", None),
        "clocks": values,
        "load": float(load) / 100 if load.isdigit() else None,
    }


def _git(*command: str) -> str | None:
    """Output of git in the folder of these sources; None where that is no clone (an installed wheel)."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def origin(command: str) -> dict[str, Any]:
    """The entries of a result file that say which code ran, and when."""
    tracked = _git("ls-files", "--error-unmatch", "machine.py") is not None
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *_CODE) if tracked else None
    versions = {"python": platform.python_version(), "vitfast": _version("vitfast")}
    return {
        "versions": versions | {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def same_code(commit: str | None, dirty: bool | None) -> bool:
    """Whether the sources here are those of that entry of a result file; without a clone the versions have to tell."""
    if commit is None or dirty is None:
        return _git("rev-parse", "HEAD") is None or _git("ls-files", "--error-unmatch", "machine.py") is None
    if dirty or _git("status", "--porcelain", "--untracked-files=no", "--", *_CODE):
        return False
    return _git("diff", "--quiet", commit, "HEAD", "--", *_CODE) is not None


def _version(package: str) -> str | None:
    if package == "vitfast":
        import vitfast

        return vitfast.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder_name(machine: dict[str, Any]) -> str:
    """The machine's name for a folder: "nvidia-h200", "amd-epyc-2-threads"."""
    words = "".join(c if c.isalnum() else " " for c in machine["name"].lower()).split()
    if machine["kind"] == "cpu":
        words += [str(machine["threads"]), "threads"]
    return "-".join(words)


if __name__ == "__main__":  # the name of this machine's folder of results
    _device = "cuda" if torch.cuda.is_available() else "cpu"
    _found = _gpu() if _device == "cuda" else _cpu()
    print(folder_name(_found | {"kind": _device, "threads": torch.get_num_threads()}))
