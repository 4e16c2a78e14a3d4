"""`zoo COMMAND ...`: exit status 0, 1 if the job failed, 2 for bad arguments."""

from __future__ import annotations

import argparse
import importlib
import sys

import zoo

# command -> (module, help); a module has add_arguments(parser) and run(args) -> exit status, and is imported
# only when its command is called
COMMANDS = {
    "list": ("zoo.tools.list", "models, with their families and whether weights can be had"),
    "info": ("zoo.tools.info", "what a model is, costs and needs; without a model, what this machine has"),
    "train": ("zoo.tools.train", "train, fine-tune or distil a model on your images"),
    "eval": ("zoo.tools.evaluate", "measure a model on annotated images, and compare with its authors' claims"),
    "card": ("zoo.tools.card", "a model card from registry, manifest and results"),
    "predict": ("zoo.tools.predict", "names and scores for pictures, and pictures with them"),
    "weights": ("zoo.tools.weights", "list, fetch, check and add released weights"),
    "verify": ("zoo.tools.verify", "check a weight file: model, entries, hash, a golden input"),
    "convert": ("zoo.tools.convert", "official weight files into zoo's, and back"),
    "export": ("zoo.tools.export", "write ONNX and torch.export files, checked against the model"),
    "bench": ("zoo.tools.bench", "time models in several forms, or operators against their alternatives"),
    "inspect": ("zoo.tools.inspect", "white-box measures of a CRATE model, as numbers and as a picture"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of `command` (of none of them for the overview)."""
    parser = argparse.ArgumentParser(prog="zoo", description="Efficient vision models behind timm's front door.")
    parser.add_argument("--version", action="version", version=f"zoo {zoo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (path, summary) in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(path)
        sub = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Expected failures end with one sentence on stderr, not with a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = build_parser(arguments[0] if arguments else None).parse_args(arguments)
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
