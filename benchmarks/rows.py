"""Runs benchmarks and writes the result file, nothing else: `python -m vitfast.benchmarks.rows SUITE... --out FILE`.

For processes that must be their own: another commit's code, or a GPU suite whose crash must not take the others along.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from . import options


def main(argv: list[str] | None = None) -> int:
    """0; 3 if a provider broke the GPU (its name on standard error), 130 after Ctrl-C; the file has what was measured."""
    parser = argparse.ArgumentParser(prog="vitfast.benchmarks.rows", description=__doc__)
    parser.add_argument("suites", nargs="+", choices=options.SUITES)
    parser.add_argument("--out", type=Path, required=True)
    options.add_run_options(parser)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=UserWarning)  # of libraries: they would break up the progress lines
    from .harness import DeviceLost
    from .suites import Stopped

    try:
        options.run(tuple(args.suites), args, f"vitfast bench {' '.join(args.suites)}", args.out)
    except DeviceLost as lost:
        print(f"device lost: {lost}", file=sys.stderr)
        return 3
    except Stopped:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
