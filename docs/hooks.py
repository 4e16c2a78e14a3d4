"""What mkdocs adds to the written pages: the command line's reference, CONTRIBUTING, and the packages' sources.

The command line is described by the parsers themselves (`zoo.tools.main`), so that its page cannot be out of date.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ("README.md", "CONTRIBUTING.md")


def on_startup(**_) -> None:
    """Lay the folders out for mkdocstrings as the one package that they are installed as.

    Before any configuration: mkdocstrings passes over a path that is not there when it is configured.
    """
    package_dir = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    target = ROOT / "build" / "api"
    shutil.rmtree(target, ignore_errors=True)
    for package, folder in package_dir.items():
        where = target.joinpath(*package.split("."))
        where.mkdir(parents=True, exist_ok=True)
        for source in (ROOT / folder).glob("*.py"):
            shutil.copy(source, where)  # a link would be followed to the folder that it comes from


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that nobody writes."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    files.append(File.generated(config, "reference/cli.md", content=command_line_page()))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Links that lead to the repository's own files become plain names: they are not part of the site."""
    for name in PUBLISHED:
        markdown = markdown.replace(
            f"](../{name})", "](contributing.md)" if name == "CONTRIBUTING.md" else "](index.md)"
        )
    return markdown


def command_line_page() -> str:
    """The page of all commands with their arguments."""
    from zoo.tools.main import COMMANDS, build_parser

    lines = [
        "# Command line",
        "",
        "Made from the parsers when the site is built; `zoo COMMAND --help` says the same. Exit status: 0 done, 1 the "
        "job failed, 2 wrong arguments or data, with one sentence on what to do.",
        "",
        "| command | |",
        "|---|---|",
        *(f"| [`zoo {name}`](#zoo-{name}) | {_cell(summary)} |" for name, (_, summary) in COMMANDS.items()),
        "",
    ]
    for name in COMMANDS:
        parser = _subparsers(build_parser(name))[name]
        lines += [f"## zoo {name}", "", *describe(parser)]
    return "\n".join(lines)


def describe(parser: argparse.ArgumentParser, level: int = 3) -> list[str]:
    """A parser as Markdown: usage, description, a table for each group, and its subcommands."""
    lines = []
    if parser.description:
        lines += [_with_examples(inspect.cleandoc(parser.description)), ""]
    nested = _subparsers(parser)
    for group in parser._action_groups:
        actions = [
            a
            for a in group._group_actions
            if a.help is not argparse.SUPPRESS and not isinstance(a, argparse._HelpAction | argparse._SubParsersAction)
        ]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            lines += [f"**{group.title}**" + (f" ({group.description})" if group.description else ""), ""]
        lines += ["| argument | |", "|---|---|", *(_row(a) for a in actions), ""]
    for child in nested.values():
        lines += [f"{'#' * level} {child.prog}", "", *describe(child, level + 1)]
    return lines


def _with_examples(text: str) -> str:
    """A description whose indented lines are commands."""
    parts = re.split(r"((?:^ {2,}\S.*(?:\n|$))+)", text, flags=re.MULTILINE)
    return "".join(
        f"\n```console\n{inspect.cleandoc(chr(10) + part).strip()}\n```\n" if i % 2 else part
        for i, part in enumerate(parts)
    )


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _row(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest).upper()
    if action.option_strings and action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        value = action.metavar or choices or action.dest.upper()
        value = value if isinstance(value, str) else " ".join(value)
        name += f" [{value}]" if action.nargs == "?" else f" {value}"
    elif action.choices:
        name += " {" + ",".join(map(str, action.choices)) + "}"
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    default = action.default
    if default not in (None, False, argparse.SUPPRESS, [], (), {}) and "default" not in text and action.option_strings:
        text += f" (default: {default})"
    return f"| `{' '.join(name.split())}` | {_cell(text)} |"  # a pipe in code is no border


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
