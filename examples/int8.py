"""What int8 costs and gains: predictions of a model trained here against fp32, and the speed of ViT-B/16 on this CPU.

Trains the demo's ViT on scikit-learn's digits unless given one, compares every precision with fp32 on its test images, and times
a forward pass in fp32, bf16 and int8, in turn, with as many threads as PyTorch has; with --timm timm's model as well, as it is and
accelerated. Writes JSON and prints tables:

    python examples/int8.py --checkpoint runs/demo/vit/last.pt --out docs/int8.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitfast
from vitfast.ops import weight_cache
from vitfast.train import fit
from vitfast.train.checkpoint import load_model
from vitfast.train.data import checkpoint_dataset
from vitfast.train.loader import eval_batches

SPEED_MODEL = "vit_base_patch16_224"
PRECISIONS = {
    "fp32": (torch.float32, "float"),
    "bf16": (torch.bfloat16, "float"),
    "int8, fp32 parameters": (torch.float32, "int8"),
    "int8, bf16 parameters": (torch.bfloat16, "int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a model trained before; default: train one")
    parser.add_argument("--run", type=Path, default=Path("runs/int8"), help="folder of the training run")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1], help="batch sizes to time; none with 0")
    parser.add_argument(
        "--timm", action="store_true", help="time timm's model too, before and after vitfast.accelerate"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timings of each, the median counts")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    checkpoint = args.checkpoint
    if checkpoint is None:
        checkpoint = fit(recipe="digits-vit", out=str(args.run), overwrite=True).checkpoint
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result["agreement"] = agreement(checkpoint)
    print(agreement_table(result["agreement"]))
    result["speed"] = [speed(batch, args.rounds, args.timm) for batch in args.batches if batch]
    for row in result["speed"]:
        print(speed_table(row))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def at(model: nn.Module, precision: str) -> tuple[Any, torch.dtype]:
    """A copy of the model in one of PRECISIONS, and its dtype."""
    dtype, products = PRECISIONS[precision]
    other: Any = copy.deepcopy(model).to(dtype).eval()
    other.set_precision(products)
    return other, dtype


@torch.no_grad()
def agreement(checkpoint: Path) -> dict[str, Any]:
    """Accuracy on the test split, share of images with fp32's class, and the logits' distance from fp32's."""
    trained, info, content = load_model(checkpoint)
    dataset = checkpoint_dataset(info, content["config"], None, None)
    batches = list(eval_batches(dataset.test, info, batch_size=256, workers=0, device="cpu"))
    labels = torch.cat([y for _, y in batches])

    def logits(precision: str) -> Tensor:
        model, dtype = at(trained, precision)
        return torch.cat([model(x.to(dtype) if x.is_floating_point() else x).double() for x, _ in batches])

    exact = logits("fp32")
    rows = []
    for precision in PRECISIONS:
        found = logits(precision)
        rows.append(
            {
                "precision": precision,
                "accuracy": float((found.argmax(1) == labels).double().mean()),
                "same_class_as_fp32": float((found.argmax(1) == exact.argmax(1)).double().mean()),
                "logit_error": float((found - exact).norm() / exact.norm()),
            }
        )
    return {"model": content["model"]["name"], "dataset": info.name, "images": len(labels), "rows": rows}


def theirs() -> dict[str, tuple[nn.Module, torch.dtype]]:
    """timm's model as it is and accelerated."""
    import timm

    found: dict[str, tuple[nn.Module, torch.dtype]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = timm.create_model(SPEED_MODEL).to(dtype).eval()
        found[f"timm, {name}"] = model, dtype
        for products in ("float", "int8"):
            ours = vitfast.accelerate(copy.deepcopy(model), precision=products)
            found[f"timm accelerated, {name}{'' if products == 'float' else ' parameters, int8'}"] = ours, dtype
    return found


@torch.no_grad()
def speed(batch: int, rounds: int, with_timm: bool) -> dict[str, Any]:
    """Median milliseconds of a forward pass in each precision, the precisions taking turns."""
    torch.manual_seed(0)
    model = vitfast.create_model(SPEED_MODEL)
    images = torch.randn(batch, 3, 224, 224)
    models = {precision: at(model, precision) for precision in PRECISIONS} | (theirs() if with_timm else {})
    weight_cache.clear()
    runs: dict[str, Any] = {}
    kept: dict[str, int] = {}
    for name, (copied, dtype) in models.items():
        runs[name] = (copied, images.to(dtype))
        before = weight_cache.size_bytes()
        copied(runs[name][1])
        kept[name] = weight_cache.size_bytes() - before
    times: dict[str, list[float]] = {precision: [] for precision in runs}
    for _ in range(rounds):
        for precision, (copied, given) in runs.items():
            start = time.perf_counter()
            copied(given)
            times[precision].append(1000 * (time.perf_counter() - start))
    median = {precision: statistics.median(found) for precision, found in times.items()}
    return {
        "model": SPEED_MODEL,
        "batch": batch,
        "ms": {precision: round(value, 2) for precision, value in median.items()},
        "spread_ms": {precision: [round(min(found), 2), round(max(found), 2)] for precision, found in times.items()},
        "int8_over_bf16": round(median["bf16"] / median["int8, bf16 parameters"], 3),
        "kept_mb": {name: round(size / 1e6, 1) for name, size in kept.items()},  # packed weights and integers
    }


def agreement_table(found: dict[str, Any]) -> str:
    lines = [
        f"\n{found['model']} on {found['dataset']}, {found['images']} test images\n",
        "| precision | accuracy | same class as fp32 | logits off by |",
        "|:--|--:|--:|--:|",
    ]
    lines += [
        f"| {r['precision']} | {r['accuracy']:.2%} | {r['same_class_as_fp32']:.2%} | {r['logit_error']:.2%} |"
        for r in found["rows"]
    ]
    return "\n".join(lines)


def speed_table(found: dict[str, Any]) -> str:
    lines = [
        f"\n{found['model']}, batch {found['batch']}; int8 is {found['int8_over_bf16']:.2f} times as fast as bf16\n",
        "| precision | ms | images/s |",
        "|:--|--:|--:|",
    ]
    lines += [f"| {p} | {ms:.1f} | {1000 * found['batch'] / ms:.1f} |" for p, ms in found["ms"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
