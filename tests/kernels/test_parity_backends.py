"""Golden operator cases hold for the Triton kernels, through the parity runner's `--backend triton`."""

import pytest

from tests.parity.__main__ import main
from tests.parity.golden import GOLDEN

CASES = ["fcaformer/op_cross_attention_7x7_k4", "slab/op_sla_core_n49_d64", "slab/op_sla_core_n196_d96"]


@pytest.mark.slow
def test_golden_operators_hold_under_the_interpreter(capfd):
    pytest.importorskip("triton")
    paths = [str(GOLDEN / f"{name}.json") for name in CASES]
    assert main(["--backend", "triton", "--eager", *paths]) == 0, capfd.readouterr().out
    assert capfd.readouterr().out.count(" yes ") == len(CASES)


def test_a_backend_that_cannot_run_is_not_silently_another(capsys):
    assert main(["--backend", "torch", "--eager", str(GOLDEN / "slab" / "op_sla_core_n49_d64.json")]) == 0
    assert "yes" in capsys.readouterr().out
