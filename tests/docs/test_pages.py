"""The pages are current: generated tables, figures, commands, links."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import zoo
from zoo.tools.main import COMMANDS, build_parser
from zoo.tools.train import resolve_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate():
    return _module(DOCS / "generate.py")


def test_generated_tables_are_current(generate):
    stale = [str(page.relative_to(ROOT)) for page in generate.stale_pages()]
    assert not stale, f"{stale}: run python docs/generate.py"


def test_every_model_of_zoo_is_in_the_table_of_its_family(generate):
    listed = [name for family in generate.FAMILIES for name in generate.models_of(family)]
    assert len(listed) == len(set(listed))
    assert set(zoo.list_models()) <= set(listed)
    assert set(listed) == set(generate.read_counts()), "run python docs/generate.py --count"
    for family in generate.FAMILIES:
        assert f"<!-- generated: variants {family} -->" in (DOCS / "models" / f"{family}.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "poolformerv1_s12",
        "crate_tiny",
        "fcaformer_l1",
        "slab_deit_t",
        "ascan_tiny",
        "ninformer_patch4_32",
        "activator_patch4_32",
        "spartan_xtiny",
        "vim2_tiny",
        "stdc1",
    ],
)
def test_parameters_and_multiply_adds_of_the_tables_are_counted(generate, name):
    assert generate.count(name) == generate.read_counts()[name]


def test_a_stale_table_is_found(generate):
    page = "a\n<!-- generated: variants stdc -->\nold\n<!-- end -->\nb"
    assert "| `stdc1` |" in generate.rewrite(page)
    assert "old" not in generate.rewrite(page)


def test_figures_are_what_their_script_draws():
    draw = _module(DOCS / "figures" / "draw.py")
    assert {path.stem for path in (DOCS / "figures").glob("*.svg")} == set(draw.FIGURES)
    for name, figure in draw.FIGURES.items():
        svg = figure().svg()
        assert (DOCS / "figures" / f"{name}.svg").read_text() == svg, "run python docs/figures/draw.py"
        assert svg.count("<title") == svg.count("<desc") == 1


def _commands() -> list[tuple[str, str]]:
    """(page, command) of every `zoo` command in a fenced block or a code span of a table."""
    found = []
    for page in PAGES:
        text = page.read_text()
        fenced = "".join(m[2] for m in re.finditer(r"^```(bash|console)\n(.*?)^```$", text, re.M | re.S))
        fenced += "".join(f"{m[1]}\n" for m in re.finditer(r"^ {4}(zoo .*)$", text, re.M))
        spans = re.findall(r"`(zoo (?:\w+) [^`]*)`", text)
        lines = re.sub(r"\\\n\s*", " ", fenced).splitlines()
        found += [(page.name, line) for line in [*lines, *spans] if re.match(r"\s*zoo \w", line)]
    return found


@pytest.mark.parametrize(("page", "command"), _commands(), ids=lambda text: text[:60])
def test_each_zoo_command_of_the_pages_exists(page, command, capsys):
    words = shlex.split(command.split("  #")[0])[1:]
    if re.fullmatch(r"[A-Z_]+", words[0]) or words[0].startswith("-"):
        return  # `zoo COMMAND`
    assert words[0] in COMMANDS, page
    try:
        args = build_parser(words[0]).parse_args(words)
    except SystemExit as stop:
        said = capsys.readouterr().err
        if stop.code == 0 or (
            "arguments are required" in said and "--" not in command
        ):  # --help, or named in a sentence
            return
        pytest.fail(f"{page}: {command}\n{said}")
    if words[0] == "train":
        model = resolve_recipe(args).model
        assert model == "craft" or timm.is_model(model), model


def test_the_reference_shows_every_command_and_argument():
    pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install "zoo-vision[docs]"')
    hooks = _module(DOCS / "hooks.py")
    page = hooks.command_line_page()
    for name in COMMANDS:
        assert f"## zoo {name}\n" in page
        sub = next(
            action for action in build_parser(name)._actions if isinstance(action, argparse._SubParsersAction)
        ).choices[name]
        for action in sub._actions:
            for option in set(action.option_strings) - {"-h", "--help"}:
                assert option in page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install "zoo-vision[docs]"')
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for page in ("index", "models/crate", "tutorials/detect", "reference/cli", "contributing", "results"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
