"""How fast is it here: kernels and models beside plain PyTorch and other libraries, and how far from the machine's floor.

Without a name: an overview of two minutes. `vitfast bench all --out DIR` runs every suite and its sweeps in about 55 minutes, and
goes on where it stopped. `vitfast bench report DIR` makes tables and plots of saved results."""

import argparse
import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from vitfast.benchmarks import options

EXIT_WORSE = 1
EXIT_WRONG = 3  # one of our own results
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=(*options.SUITES, "all", "report"),
        metavar="NAME",
        help=f"{', '.join(options.SUITES)}, all or report",
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="report: the folder of result files")
    options.add_run_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results (JSON, CSV), a report and plots there")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="PATH",
        help="compare with a saved result file, or this machine's in a folder of several machines' results; exit 1 where a "
        "ratio fell beyond noise",
    )
    parser.add_argument("--against", metavar="REV", help="also build another commit and compare our times with its")
    parser.add_argument(
        "--into", nargs="+", type=Path, default=(), metavar="FILE", help="report: documents with measured parts to fill"
    )


def run(args: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=UserWarning)  # of libraries: they would break up the progress bar
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # likewise, of a CUDA toolkit without a GPU
    if args.what == "report":
        return _report(args)
    if args.folder is not None or args.into:
        raise ValueError("DIR and --into go with `vitfast bench report` only")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)  # an error comes before minutes of measuring
    if args.what == "all":
        return _all(args)
    names = (args.what,) if args.what else options.SUITES
    file = options.file_name(args.what, options.preset_of(names, args))
    baseline = _baseline(args, file)  # likewise
    if args.against:
        return _against(args, names)
    path = None if args.out is None else args.out / file
    from vitfast.benchmarks.suites import Stopped

    stopped = None
    try:
        content = options.run(names, args, _command(), path)
    except Stopped as early:
        stopped, content = early, early.content
    from vitfast.benchmarks.report import print_table

    print_table(content)
    if path is not None:
        _write_beside(path, content)
    if stopped is not None:
        print(f"vitfast: interrupted; the tables have {stopped.done} of {stopped.total} cases", file=sys.stderr)
        return EXIT_INTERRUPTED
    code = 0 if baseline is None else _check(content, baseline)
    return EXIT_WRONG if _say_wrong(content) else code


def _command() -> str:
    return "vitfast bench " + shlex.join(sys.argv[2:]) if len(sys.argv) > 2 else "vitfast bench"


def _all(args: argparse.Namespace) -> int:
    """Every suite; the report at the end, or at Ctrl-C, is of what there is."""
    if args.out is None:
        raise ValueError("all needs a folder for its result files: vitfast bench all --out DIR")
    not_here = ("shapes", "direction", "longest", "timing", "check", "against")
    if given := [f"--{name}" for name in not_here if getattr(args, name)]:
        raise ValueError(f"{', '.join(given)} cannot go with all; name one suite")
    if args.preset not in (None, "dry"):
        raise ValueError("all runs presets standard, growth, threads and smoke; --preset can only be dry")
    from vitfast.benchmarks import everything, report, schema
    from vitfast.benchmarks.suites import Stopped

    device = options.device_of(args)
    minutes = args.minutes or everything.MINUTES
    steps = everything.DRY if args.preset == "dry" else everything.STEPS
    stopped = False
    try:
        everything.Everything(
            args.out, device, _command(), minutes, tuple(args.dtype), tuple(args.providers), steps
        ).run()
    except Stopped:
        stopped = True
    if not list(args.out.glob("*.json")):
        return EXIT_INTERRUPTED
    machine = next(m for m in report.machines(args.out) if m.folder == args.out)
    schema.write_text(args.out / "results.csv", schema.to_csv(list(machine.every)))
    print("\n".join(map(str, [args.out / "results.csv", *_folder_report(args.out)])))
    if stopped:
        print("vitfast: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    wrong = [_say_wrong(content) for content in machine.contents]
    return EXIT_WRONG if any(wrong) else 0


def _say_wrong(content: dict[str, Any]) -> bool:
    """Whether one of our own rows has no number because its result was wrong or it failed; each is printed."""
    wrong = [row for row in content["rows"] if row["ours"] and row["note"].startswith(("wrong: ", "failed: "))]
    for row in wrong:
        place = " ".join(str(row[name]) for name in ("op", "shape", "dtype", "direction", "provider"))
        print(f"vitfast: {place}: {row['note']}", file=sys.stderr)
    return bool(wrong)


def _write_beside(path: Path, content: dict[str, Any]) -> None:
    """The CSV of these results, and report and plots of the whole folder."""
    from vitfast.benchmarks import schema

    csv = path.with_suffix(".csv")
    schema.write_text(csv, schema.to_csv(schema.rows_of(content)))
    written = [path, csv, *_folder_report(path.parent)]
    print("\n" + "\n".join(map(str, written)))


def _folder_report(folder: Path) -> list[Path]:
    """report.md and plots of the result files in this one folder; plots need matplotlib."""
    from vitfast.benchmarks import report, schema

    written = []
    machine = next(m for m in report.machines(folder) if m.folder == folder)
    try:
        from vitfast.benchmarks import plots

        written += plots.draw(machine)
    except ImportError as error:
        print(f"no plots: {error} (pip install matplotlib)", file=sys.stderr)
    links = [plot.name for plot in written]
    schema.write_text(folder / "report.md", report.everything(machine, links) + "\n")
    return [folder / "report.md", *written]


def _report(args: argparse.Namespace) -> int:
    if args.folder is None:
        raise ValueError("report needs the folder of result files: vitfast bench report DIR [--into FILE ...]")
    from vitfast.benchmarks import report, schema

    written = []
    for machine in report.machines(args.folder):
        written += _folder_report(machine.folder)
    for document in args.into:
        filled = report.fill(document.read_text(), args.folder, document.parent)
        schema.write_text(document, filled)
        written.append(document)
    print("\n".join(map(str, written)))
    return 0


def _baseline(args: argparse.Namespace, file: str) -> dict[str, Any] | None:
    if args.check is None:
        return None
    from vitfast.benchmarks import compare

    content, note = compare.baseline(args.check, file, options.device_of(args))
    if note:
        print(f"vitfast: {note}", file=sys.stderr)
    return content


def _check(content: dict[str, Any], baseline: dict[str, Any]) -> int:
    from vitfast.benchmarks import compare

    changes = compare.check(content, baseline)
    worse = [change for change in changes if change.worse]
    for change in worse:
        print(f"worse: {change}")
    print(f"{len(changes)} ratios compared with the baseline, {len(worse)} worse by more than the noise")
    return EXIT_WORSE if worse else 0


def _against(args: argparse.Namespace, names: tuple[str, ...]) -> int:
    from vitfast.benchmarks import compare

    options.prepare(names, args, "", None)  # wrong options show before minutes of building
    print(f"building {args.against} in a worktree of its own", file=sys.stderr)
    with compare.other_commit(args.against) as tree:
        now, then = compare.against(tree, [*names, *_run_arguments(args, names)])
    found = compare.differences(now, then)
    width = max((len(" ".join(row.key)) for row, _, _ in found), default=0)
    print(f"{'':{width}}  {'now, ms':>10s} {'then, ms':>10s} {'then / now':>11s}")
    for row, old, verdict in found:
        assert row.ms is not None
        assert old.ms is not None
        print(f"{' '.join(row.key):{width}}  {row.ms:10.3f} {old.ms:10.3f} {old.ms / row.ms:11.2f}  {verdict}")
    if args.out is not None:
        from vitfast.benchmarks import schema

        schema.write(args.out / "now.json", now)
        schema.write(args.out / "then.json", then)
    return 0


def _run_arguments(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """The options again, for other processes; only our providers and plain PyTorch unless told."""
    providers = list(args.providers) or ["vitfast*", "pytorch eager"]
    arguments = ["--seconds", str(args.seconds), "--providers", *providers]
    arguments += ["--preset", options.preset_of(names, args)]
    for name, values in (("--shapes", args.shapes), ("--dtype", args.dtype), ("--direction", args.direction)):
        if values:
            arguments += [name, *values]
    for name, value in (("--device", args.device), ("--minutes", args.minutes), ("--threads", args.threads)):
        if value is not None:
            arguments += [name, str(value)]
    if args.timing is not None:
        arguments += ["--timing", args.timing]
    return arguments
