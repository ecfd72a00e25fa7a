"""The GPUs that kernels are compiled for: what one block and one multiprocessor may use, and published peak rates.

Rates are dense, at boost clocks, from NVIDIA's data sheets: A100 80GB SXM (2021), H200 SXM (2023), HGX B200 (2024, one of
eight). A floor computed with them is a bound: measured products reach 70 to 90 % of the rate, copies 90 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import Device


@dataclass(frozen=True)
class Chip:
    name: str
    device: Device
    shared_per_multiprocessor: int  # bytes
    tflops: dict[str, float]  # of a product, by the operands' dtype
    terabytes_per_second: float


CHIPS = {
    80: Chip(
        "A100 SXM 80GB",
        Device(arch=80, multiprocessors=108, shared_bytes=166912),
        167936,
        {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},
        2.039,
    ),
    90: Chip(
        "H200 SXM",
        Device(arch=90, multiprocessors=132, shared_bytes=232448),
        233472,
        {"bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0},
        4.8,
    ),
    100: Chip(
        "B200 (HGX)",
        Device(arch=100, multiprocessors=148, shared_bytes=232448),
        233472,
        {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0, "fp32": 75.0},
        7.7,
    ),
}
