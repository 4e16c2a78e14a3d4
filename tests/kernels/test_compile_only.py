"""Every launch of every kernel compiles for four GPUs, without spills and within their shared memory.

docs/kernels.md holds the table of all of them, with a digest of what was compiled: a kernel or a setting that changed
since is noticed without compiling anything. Here a sixth of the launches is compiled again (all of them with
ZOO_COMPILE_ALL=1), other ones for every card.
"""

import os

import pytest

from tests.kernels.compile_only import DOCUMENT, TARGETS, digest, operators, usages

SHARE = 1 if os.environ.get("ZOO_COMPILE_ALL") else 6


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", operators())
def test_it_compiles_without_spills(operator, target):
    pytest.importorskip("triton")
    problems = [f"{u.kernel}, {u.label}: {u.problem}" for u in usages(operator, target, SHARE) if u.problem]
    assert not problems, problems


@pytest.mark.parametrize("operator", operators())
def test_the_document_has_the_table_of_these_kernels(operator):
    assert f"| **{operator}** | digest {digest(operator)} |" in DOCUMENT.read_text(), (
        "run python -m tests.kernels.compile_only --write"
    )


def test_nothing_in_the_table_spills():
    rows = [line for line in DOCUMENT.read_text().splitlines() if " r, " in line and line.startswith("|")]
    assert rows
    assert not [line for line in rows if any(" s," in cell and " 0 s," not in cell for cell in line.split("|"))]
