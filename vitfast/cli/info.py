"""What vitfast finds here: versions, devices, CPU features and rate, the extension, and which backend of which op runs."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

_PACKAGES = ("torch", "torchvision", "triton", "numpy", "timm", "scikit-learn", "matplotlib", "safetensors")
_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rates", action="store_true", help="also measure copies and matrix products (three seconds)")


def run(args: argparse.Namespace) -> int:
    facts = gather()
    if args.rates:
        facts["rates"] = _rates()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return 0


def gather() -> dict[str, Any]:
    """Everything `vitfast info --json` prints."""
    import torch

    import vitfast
    from vitfast import ops

    return {
        "versions": {"vitfast": vitfast.__version__, "python": platform.python_version(), **_package_versions()},
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "available": torch.cuda.is_available(),
            "devices": _gpus(torch),
        },
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "features": cpu_features(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **_multiply_adds(torch),
        },
        "extension": ops.extension_status(),
        "backends": ops.backends(),
    }


def _multiply_adds(torch: Any) -> dict[str, Any]:
    """The CPU's limit, measured in a second: of the chip itself, or without the extension of PyTorch's matrix products."""
    from vitfast.benchmarks.machine import matrix_tflops
    from vitfast.benchmarks.peak import chip_tflops, instruction_set

    tflops, by = chip_tflops(), "multiply-adds on registers"
    if not tflops:
        tflops = {name: round(matrix_tflops(getattr(torch, name), "cpu"), 4) for name in ("float32", "bfloat16")}
        by = "the fastest matrix product"
    return {"instruction_set": instruction_set(), "tflops": tflops, "tflops_measured_by": by}


def _rates() -> dict[str, dict[str, Any]]:
    """Device -> what it reaches, as the floors of `vitfast bench` take it."""
    import torch

    from vitfast.benchmarks.machine import rates

    return {device: rates(device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))}


def _package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _gpus(torch: Any) -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def _cpuinfo(*keys: str) -> str:
    """The first value of one of the keys in /proc/cpuinfo; "" where there is none (macOS, Windows)."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in keys:
                    return value.strip()
    except OSError:
        pass
    return ""


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Which of the instruction sets that matter to vitfast this CPU has."""
    flags = set(_cpuinfo("flags", "Features").split())
    return [flag for flag in _CPU_FLAGS if flag in flags]


def _lines(facts: dict[str, Any]) -> list[str]:
    cpu, cuda = facts["cpu"], facts["cuda"]
    versions = "  ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())
    lines = [
        versions,
        facts["platform"],
        f"CPU   {cpu['model']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads",
    ]
    lines.append(f"      {' '.join(cpu['features']) or 'features not known on this system'}")
    limits = ", ".join(f"{name} {rate:.3g}" for name, rate in cpu["tflops"].items())
    with_set = f" with {cpu['instruction_set']}" if cpu["instruction_set"] else ""
    lines.append(f"      limit, TFLOP/s: {limits} ({cpu['tflops_measured_by']}{with_set}, {cpu['threads']} threads)")
    for gpu in cuda["devices"]:
        lines.append(
            f"GPU   {gpu['name']}, sm_{gpu['compute_capability'].replace('.', '')}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors"
        )
    if not cuda["devices"]:
        built = (
            f"torch is built for CUDA {cuda['torch_built_for']}"
            if cuda["torch_built_for"]
            else "torch is built without CUDA"
        )
        lines.append(f"GPU   none ({built})")
    for device, rate in facts.get("rates", {}).items():
        products = ", ".join(f"{dtype} {tflops:.3g} TFLOP/s" for dtype, tflops in rate["matrix_tflops"].items())
        lines.append(f"{device.upper():<5} measured: copy {rate['copy_gb_per_s']:.3g} GB/s, products {products}")
    lines += ["", "extension"]
    for library, status in facts["extension"].items():
        state = f"loaded from {status['path']}" if status["loaded"] else f"not loaded: {_flat(status['error'])}"
        lines.append(f"  {library:<10}  {state}")
    return [*lines, "", *backend_table(facts["backends"])]


def backend_table(rows: list[dict[str, Any]]) -> list[str]:
    """The op x backend table, then each reason once with what it keeps from running."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    known = {(row["op"], row["backend"]): row for row in rows}
    width = max([len("op"), *map(len, ops)])
    lines = [f"{'op':<{width}}  " + "  ".join(f"{name:<{_wide(name)}}" for name in backends)]
    for op in ops:
        cells = []
        for backend in backends:
            row = known.get((op, backend))
            cells.append("-" if row is None else "yes" if row["available"] else "no")
        lines.append(
            f"{op:<{width}}  " + "  ".join(f"{cell:<{_wide(name)}}" for cell, name in zip(cells, backends, strict=True))
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row["available"]:
            reasons.setdefault((row["backend"], _flat(row["reason"])), []).append(row["op"])
    for (backend, reason), affected in reasons.items():
        which = "" if len(affected) == len(ops) else f" ({', '.join(affected)})"
        lines.append(f"{backend}: {reason}{which}")
    return lines


def _wide(name: str) -> int:
    return max(6, len(name))


def _flat(text: str | None) -> str:
    return " ".join((text or "no reason given").split())
