"""Every launch of every kernel compiles for four GPUs, without spills and within their shared memory."""

import pytest

from tests.kernels.compile_only import DOCUMENT, TARGETS, distinct_launches, operators, usages


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", operators())
def test_it_compiles_without_spills(operator, target):
    pytest.importorskip("triton")
    problems = [f"{u.kernel}, {u.label}: {u.problem}" for u in usages(operator, target) if u.problem]
    assert not problems, problems


@pytest.mark.parametrize("operator", operators())
def test_every_launch_stands_in_the_document(operator):
    text = DOCUMENT.read_text()
    missing = [
        f"{launch.kernel.__name__.strip('_')}, {label}"
        for label, launch in distinct_launches(operator, "sm_90")
        if f"| {launch.kernel.__name__.strip('_')} | {label} |" not in text
    ]
    assert not missing, f"run python -m tests.kernels.compile_only --write: {missing}"
