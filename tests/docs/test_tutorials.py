"""The tutorials run as a reader runs them: each page's `bash` and `python` blocks, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str

    @property
    def where(self) -> str:
        return f"{self.page}.md:{self.line} ({self.language})"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page.stem, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in FENCE.finditer(text)
    ]


def pages() -> list[str]:
    """The pages in the order of the site."""
    listed = re.findall(r"tutorials/([\w-]+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(page.stem for page in FOLDER.glob("*.md"))
    return [name for name in listed if name != "index"]


def run(block: Block, folder: Path) -> str:
    """Run a block as the page says, with this environment's `zoo` and `python` first on the path.

    Raises:
        AssertionError: it failed; the message holds the block and what it printed.
    """
    command = {"bash": ["bash", "-e", "-c", block.code], "python": [sys.executable, "-c", block.code]}[block.language]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    env["PYTHONPYCACHEPREFIX"] = str(folder.parent / "bytecode")  # compiled once for all blocks, outside of the sources
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    printed = result.stdout + result.stderr
    assert result.returncode == 0, f"{block.where} ended with status {result.returncode}:\n{block.code}\n{printed}"
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a fresh clone has of data and weights; what the tutorials make is left in its `runs`."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "tests").mkdir()
    (folder / "tests" / "data").symlink_to(ROOT / "tests" / "data")
    (folder / "weights").symlink_to(ROOT / "weights")
    return folder


@pytest.mark.slow
def test_the_tutorials_run_in_their_order(folder):
    for name in pages():
        page = blocks(FOLDER / f"{name}.md")
        for block in page:
            if block.language in ("bash", "python"):
                print(f"{block.where}\n{run(block, folder)}")


def test_each_block_is_of_a_kind_that_the_tutorials_explain():
    for page in FOLDER.glob("*.md"):
        for block in blocks(page):
            assert block.language in ("bash", "python", "text", "console", "py"), block.where


def test_a_failing_block_is_named_with_what_it_printed(tmp_path):
    block = Block("page", 7, "bash", "echo before\nfalse\necho after\n")
    with pytest.raises(AssertionError, match=r"page.md:7 \(bash\) ended with status 1") as failed:
        run(block, tmp_path)
    assert "before\n" in str(failed.value).split("echo after")[1]
    assert "after" not in str(failed.value).split("echo after")[1]
