"""What keeping weights packed saves at inference on this CPU, and the memory it takes.

Times a model with and without them, in turn, with as many threads as PyTorch has, and prints a line for each model, batch and
dtype:

    python examples/packed_weights.py --model vit_tiny_patch16_224 --batch 1 8
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import vitfast
from vitfast.ops import weight_cache


@torch.no_grad()
def times(name: str, batch: int, dtype: torch.dtype, rounds: int, calls: int = 5) -> tuple[float, float, int]:
    """Median milliseconds of a call with and without packed weights, and the bytes they take."""
    model = vitfast.create_model(name).eval().to(dtype)
    images = torch.randn(batch, 3, *model.config.image_hw, dtype=dtype)
    found: dict[int | None, list[float]] = {None: [], 0: []}
    size = 0
    for _ in range(rounds):
        for limit, samples in found.items():
            weight_cache.limit_bytes(limit)
            for _ in range(2):  # packs
                model(images)
            size = max(size, weight_cache.size_bytes())
            for _ in range(calls):
                start = time.perf_counter()
                model(images)
                samples.append(1e3 * (time.perf_counter() - start))
    weight_cache.limit_bytes(None)
    return statistics.median(found[None]), statistics.median(found[0]), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["vit_tiny_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for name in args.model:
        for batch in args.batch:
            for dtype in args.dtype:
                packed, unpacked, size = times(name, batch, getattr(torch, dtype), args.rounds)
                print(
                    f"{name} batch {batch} {dtype}: {packed:.2f} ms, without {unpacked:.2f} ms "
                    f"({unpacked / packed:.2f} times), {size / 2**20:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
