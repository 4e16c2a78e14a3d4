"""The one rule that says whether Triton or plain torch runs."""

import os
import subprocess
import sys

import pytest
import torch

from zoo.kernels import dispatch
from zoo.kernels.dispatch import explain, get_backend, set_backend, use_backend, use_triton


def test_auto_is_plain_torch_on_a_cpu():
    assert get_backend() == "auto"
    assert not use_triton("op", torch.ones(2))
    if not torch.cuda.is_available():
        assert "plain torch" in explain()


def test_asking_for_triton_where_it_cannot_run_is_one_sentence():
    pytest.importorskip("triton")
    with use_backend("triton"), pytest.raises(ValueError, match=r"op was asked .* on cpu .*TRITON_INTERPRET"):
        use_triton("op", torch.ones(2))
    assert get_backend() == "auto"


def test_the_backend_of_a_block_ends_with_it_also_after_an_error():
    seen = []

    def fail():
        with use_backend("torch"):
            seen.extend([get_backend(), explain()])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen[0] == "torch"
    assert "'torch'" in seen[1]
    assert get_backend() == "auto"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        set_backend("cuda")


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_FOUND", False)
    assert "not installed" in explain()
    with pytest.raises(ValueError, match="pip install triton"):
        set_backend("triton")


class _OnGpu:
    """Enough of a CUDA tensor for the rule."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.float16, device=0):
        self.dtype, self.device = dtype, torch.device("cuda", device)


def test_on_a_gpu_auto_means_triton_unless_something_is_unsupported(monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_FOUND", True)
    assert use_triton("op", _OnGpu(), None, _OnGpu())
    assert not use_triton("op", _OnGpu(), unsupported="a head size of 512")
    assert not use_triton("op", _OnGpu(torch.float64))
    assert not use_triton("op", _OnGpu(), _OnGpu(device=1))
    with use_backend("torch"):
        assert not use_triton("op", _OnGpu())
    with use_backend("triton"), pytest.raises(ValueError, match="a head size of 512; choose"):
        use_triton("op", _OnGpu(), unsupported="a head size of 512")
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with use_backend("triton"):
        assert not use_triton("op", _OnGpu())


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch"), ("", "auto"), ("fast", "ZOO_KERNELS is 'fast'")])
def test_the_environment_chooses_before_the_import(value, expected):
    code = "import zoo.kernels; print(zoo.kernels.get_backend())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ZOO_KERNELS": value}, capture_output=True, text=True
    )
    if result.returncode:
        assert expected in result.stderr
    else:
        assert result.stdout.split() == [expected]
