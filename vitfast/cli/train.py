"""Train a model on real images. A recipe gives the settings; options given beside it win."""

import argparse
import dataclasses
import json
import sys
from typing import Any, get_args, get_type_hints

from vitfast.train.config import TrainConfig
from vitfast.train.recipes import RECIPES


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of TrainConfig, and what steers the run itself."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, RECIPES))
    parser.epilog = "recipes:\n" + "\n".join(f"  {name:<{width}}  {recipe.summary}" for name, recipe in RECIPES.items())
    parser.add_argument("--recipe", choices=RECIPES, metavar="NAME", help="start from a named recipe (listed below)")
    parser.add_argument(
        "--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: from the run folder's last.pt, if any"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the run folder")
    parser.add_argument("--download", action="store_true", help="let torchvision download a missing dataset")
    parser.add_argument("--json", action="store_true", help="end with the result as one JSON object on standard output")
    hints = get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(TrainConfig):
        name = f.metadata["group"]
        groups.setdefault(name, parser.add_argument_group(name) if name not in groups else None)
        _add_option(groups[name], f, hints[f.name])


def _add_option(group: Any, f: dataclasses.Field, hint: Any) -> None:
    flag = "--" + f.name.replace("_", "-")
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    text = f.metadata["help"].replace("%", "%%")
    if f.default is not None and not isinstance(f.default, (bool, dataclasses._MISSING_TYPE)):
        text += f" (default {f.default})"
    if f.name == "model_args":
        group.add_argument(
            "--model-arg",
            action="append",
            dest=f.name,
            type=_pair,
            metavar="KEY=VALUE",
            default=argparse.SUPPRESS,
            help=text,
        )
    elif kinds[0] is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif kinds[0] in (int, float, str):
        group.add_argument(
            flag,
            type=kinds[0],
            choices=f.metadata["choices"] or None,
            metavar=None if f.metadata["choices"] else kinds[0].__name__.upper(),
            default=argparse.SUPPRESS,
            help=text,
        )
    else:  # mean and std
        group.add_argument(flag, type=float, nargs="+", metavar="X", default=argparse.SUPPRESS, help=text)


def run(args: argparse.Namespace) -> int:
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    overrides = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if "model_args" in overrides:
        recipe_args = RECIPES[args.recipe].settings.get("model_args", {}) if args.recipe else {}
        overrides["model_args"] = recipe_args | dict(overrides["model_args"])
    from vitfast.train import Interrupted, fit, keep_freed_memory

    keep_freed_memory()
    try:
        result = fit(
            recipe=args.recipe, resume=args.resume, overwrite=args.overwrite, download=args.download, **overrides
        )
    except Interrupted as stopped:
        print(f"\n{stopped}; go on with: vitfast train --resume {stopped.checkpoint}", file=sys.stderr)
        return stopped.exit_code
    if args.json:
        print(json.dumps(dataclasses.asdict(result), default=str))
        return 0
    print(
        f"test accuracy {result.test_accuracy:.2%} (best {result.best_accuracy:.2%}, epoch {result.best_epoch}) "
        f"after {result.steps} steps, {result.seconds:.0f} s\n"
        f"{result.checkpoint}  {result.folder / 'curves.png'}  {result.folder / 'metrics.jsonl'}"
    )
    return 0
