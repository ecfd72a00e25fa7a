"""Evaluate a checkpoint on the test split of its dataset, or of another one with the same classes."""

import argparse
import dataclasses
import json

from vitfast.train.config import DATASETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="best.pt or last.pt of a run")
    parser.add_argument("--dataset", choices=DATASETS, help="default: the one it was trained on")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the dataset (default: as in training)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which images (default test)")
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="INT", help="images per forward pass (default 256)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: as in training")
    parser.add_argument("--device", default="auto", metavar="STR", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "cpu", "triton", "cuda"), help="of vitfast's ops"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from vitfast.train.checkpoint import load_model
    from vitfast.train.data import TensorSplit, checkpoint_dataset
    from vitfast.train.evaluate import evaluate
    from vitfast.train.loader import eval_batches
    from vitfast.train.run import pick_device

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {args.batch_size}")
    device = pick_device(args.device)
    model, info, content = load_model(args.checkpoint, device=device, backend=args.backend)
    dataset = checkpoint_dataset(info, content["config"], args.dataset, args.data)
    split = dataset.train if args.split == "train" else dataset.test
    split = split.to(device) if isinstance(split, TensorSplit) else split
    precision = args.precision or content["config"]["precision"]
    batches = eval_batches(split, info, batch_size=args.batch_size, workers=2, device=device)
    result = evaluate(model, batches, len(info.class_names), precision=precision)
    rows = result.per_class(info.class_names)
    if args.json:
        figures = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "confusion"}
        about = {
            "checkpoint": args.checkpoint,
            "dataset": dataset.info.name,
            "split": args.split,
            "precision": precision,
        }
        print(json.dumps(about | figures | {"classes": rows, "confusion": result.confusion.tolist()}))
        return 0
    print(
        f"{content['model']['name']} on {result.images} {args.split} images of {dataset.info.name} ({precision}): "
        f"accuracy {result.accuracy:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f}"
    )
    width = max(len("class"), *(len(name) for name in info.class_names))
    print(f"\n{'class':<{width}}  {'images':>6}  {'recall':>7}  {'precision':>9}")
    for row in rows:
        recall, right = (f"{row[k]:.1%}" if row[k] is not None else "-" for k in ("recall", "precision"))
        print(f"{row['class']:<{width}}  {row['images']:>6}  {recall:>7}  {right:>9}")
    return 0
