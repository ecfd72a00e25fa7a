"""The `vitfast` command: finds the command's file, imports only that, and turns errors into one line."""

import argparse
import difflib
import sys
import traceback
from importlib import import_module
from typing import NoReturn

import vitfast

# Each command is vitfast/cli/<name>.py with add_arguments(parser) and run(args) -> exit code.
COMMANDS = {
    "info": "versions, devices, CPU features, and which backend of which op runs here",
    "train": "train a model on real images",
    "eval": "accuracy, top-5, loss and per-class figures of a checkpoint",
    "predict": "classify image files with a checkpoint",
    "bench": "time kernels and models beside other libraries and the machine's own floor",
}


class Parser(argparse.ArgumentParser):
    """argparse, with the error as one line in the same form as every other error."""

    def error(self, message: str) -> NoReturn:
        print(f"vitfast: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "commands:\n" + "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    top = Parser(
        prog="vitfast",
        usage="vitfast COMMAND [options]",
        description="A fast Vision Transformer for PyTorch.",
        epilog=_overview() + "\n\nvitfast COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"vitfast {vitfast.__version__}")
    if not argv or argv[0].startswith("-"):
        top.parse_args(argv)
        top.print_help()
        return 0 if argv else 2
    command = argv[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        top.error(f"no command {command!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    module = import_module(f"vitfast.cli.{command}")
    parser = Parser(prog=f"vitfast {command}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv[1:])
    try:
        return module.run(args)
    except KeyboardInterrupt:
        print("vitfast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vitfast ... | head`
        sys.stderr.close()
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"vitfast: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 2] "
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"  # not one of ours: likely a mistake in vitfast


if __name__ == "__main__":
    sys.exit(main())
