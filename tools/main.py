"""`zoo COMMAND ...`: exit status 0, 1 if the job failed, 2 for bad arguments."""

from __future__ import annotations

import argparse
import importlib
import sys

import zoo

# command -> module; a module has HELP, add_arguments(parser) and run(args) -> exit status
COMMANDS = {
    "list": "zoo.tools.list",
    "info": "zoo.tools.info",
    "train": "zoo.tools.train",
    "eval": "zoo.tools.evaluate",
    "predict": "zoo.tools.predict",
    "inspect": "zoo.tools.inspect",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = argparse.ArgumentParser(prog="zoo", description="Efficient vision models behind timm's front door.")
    parser.add_argument("--version", action="version", version=f"zoo {zoo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Expected failures end with one sentence on stderr, not with a traceback."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError, NotADirectoryError, ImportError) as error:
        # a wrong argument, file or data set: CheckpointError and ImageError are ValueErrors
        print(f"zoo {args.command}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"zoo {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"zoo {args.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
