"""What token merging costs and saves: accuracy and work of one trained model at several numbers of merged tokens.

Trains a small ViT on scikit-learn's digits, enlarged to 16 pixels (64 patches of 2 x 2), without merging, and then merges
tokens at inference only (arXiv:2210.09461, section 4.1). Writes a JSON file and prints it as a table:

    python examples/token_merging.py --out docs/token_merging.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitfast
from vitfast.train import fit
from vitfast.train.checkpoint import load_model
from vitfast.train.data import checkpoint_dataset
from vitfast.train.evaluate import evaluate
from vitfast.train.loader import eval_batches

MERGED = (0, 1, 2, 4, 6, 8, 12, 16)
ROUNDS = 3
TIMED_IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a model trained before; default: train one")
    parser.add_argument("--run", type=Path, default=Path("runs/token-merging"), help="folder of the training run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    checkpoint = args.checkpoint
    if checkpoint is None:
        checkpoint = fit(recipe="digits-vit", img_size=16, out=str(args.run), overwrite=True).checkpoint
    result = measure(checkpoint)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def measure(checkpoint: Path) -> dict[str, Any]:
    """Accuracy on the test split, multiply-adds of an image and CPU time for each number of merged tokens."""
    trained, info, content = load_model(checkpoint)
    spec = content["model"]
    dataset = checkpoint_dataset(info, content["config"], None, None)
    images = torch.cat(
        [x for x, _ in eval_batches(dataset.test, info, batch_size=TIMED_IMAGES, workers=0, device="cpu")]
    )
    rows = []
    for merge in MERGED:
        model = vitfast.create_model(spec["name"], **spec["kwargs"] | {"token_merging": merge}).eval()
        model.load_state_dict(trained.state_dict())
        batches = eval_batches(dataset.test, info, batch_size=TIMED_IMAGES, workers=0, device="cpu")
        found = evaluate(model, batches, len(info.class_names))
        tokens = tokens_after_each_block(model, images[:1])
        rows.append(
            {
                "merged_per_block": merge,
                "tokens_at_the_end": tokens[-1],
                "accuracy": round(found.accuracy, 5),
                "multiply_adds": multiply_adds(model, tokens),
                "cpu_ms_per_image": round(1000 * cpu_seconds(model, images[:TIMED_IMAGES]) / TIMED_IMAGES, 4),
            }
        )
    threads = torch.get_num_threads()
    about = {
        "model": spec["name"],
        "settings": spec["kwargs"],
        "dataset": info.name,
        "images": found.images,
        "trained_epochs": content["progress"]["epoch"],
        "planned_epochs": content["config"]["epochs"],
    }
    return about | {"threads": threads, "torch": torch.__version__, "rows": rows}


def tokens_after_each_block(model: nn.Module, images: torch.Tensor) -> list[int]:
    """Sequence lengths: before the first block, then after each."""
    with torch.no_grad():
        x, tokens = model.start(images)
        lengths = [x.shape[1]]
        for i, block in enumerate(model.blocks):
            x, tokens = model.run_block(i, block, x, tokens)
            lengths.append(x.shape[1])
    return lengths


def multiply_adds(model: nn.Module, tokens: list[int]) -> int:
    """Of the blocks' matrix products for one image: attention sees the tokens before merging, the MLP those after."""
    D, F = model.config.embed_dim, model.config.mlp_hidden
    return sum(
        before * 4 * D * D + 2 * before * before * D + after * 2 * D * F for before, after in itertools.pairwise(tokens)
    )


@torch.no_grad()
def cpu_seconds(model: nn.Module, images: torch.Tensor) -> float:
    """The least CPU time of a forward pass, so that other processes on the machine do not count."""
    model(images)
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        model(images)
        times.append(time.process_time() - start)
    return min(times)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| merged per block | tokens at the end | accuracy | multiply-adds | CPU time |",
        "|--:|--:|--:|--:|--:|",
    ]
    first = result["rows"][0]
    for row in result["rows"]:
        work = row["multiply_adds"] / first["multiply_adds"]
        spent = row["cpu_ms_per_image"] / first["cpu_ms_per_image"]
        lines.append(
            f"| {row['merged_per_block']} | {row['tokens_at_the_end']} | {row['accuracy']:.2%} | {work:.0%} | {spent:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
