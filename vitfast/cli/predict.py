"""Classify image files: the five most likely classes of each, and a picture of the images with their labels."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="best.pt or last.pt of a run")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="instead of files: N test images of its dataset"
    )
    parser.add_argument("--data", metavar="FOLDER", help="folder of that dataset (default: as in training)")
    parser.add_argument("--out", default="predictions.png", metavar="PNG", help="the picture (default predictions.png)")
    parser.add_argument("--device", default="auto", metavar="STR", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "cpu", "triton", "cuda"), help="of vitfast's ops"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")


def run(args: argparse.Namespace) -> int:
    if bool(args.images) == bool(args.samples):
        raise ValueError("give either image files or --samples N")
    if args.samples < 0:
        raise ValueError(f"--samples must be at least 1; got {args.samples}")
    from vitfast.train.checkpoint import load_model
    from vitfast.train.plots import contact_sheet
    from vitfast.train.predict import classify, sample_images
    from vitfast.train.run import pick_device
    from vitfast.train.sources import read_image

    device = pick_device(args.device)
    model, info, content = load_model(args.checkpoint, device=device, backend=args.backend)
    truths: list[str | None]
    if args.images:
        images = [read_image(Path(path), info.channels) for path in args.images]
        names, truths = list(args.images), [None] * len(images)
    else:
        names, images, truths = sample_images(info, content["config"], args.data, args.samples)
    predictions = classify(model, images, info)
    for name, top, truth in zip(names, predictions, truths, strict=True):
        print(_as_json(name, top, truth) if args.json else _as_text(name, top, truth))
    labels = [
        f"{top[0][0]}  {top[0][1]:.0%}" + _aside(top[0][0], truth)
        for top, truth in zip(predictions, truths, strict=True)
    ]
    right = [None if truth is None else top[0][0] == truth for top, truth in zip(predictions, truths, strict=True)]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, labels, out, right=right)
    if not args.json:
        print(f"picture: {out}")
    return 0


def _aside(predicted: str, truth: str | None) -> str:
    return f"\n(is {truth})" if truth not in (None, predicted) else ""


def _as_text(name: str, top: list[tuple[str, float]], truth: str | None) -> str:
    known = f"  (is {truth})" if truth is not None else ""
    return f"{name}{known}\n" + "\n".join(f"  {probability:7.2%}  {label}" for label, probability in top)


def _as_json(name: str, top: list[tuple[str, float]], truth: str | None) -> str:
    record: dict[str, Any] = {"image": name, "top": [{"class": c, "probability": p} for c, p in top]}
    return json.dumps(record | ({"true": truth} if truth is not None else {}))
