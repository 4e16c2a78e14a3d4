"""The kernels of `geglu_norm` against its definition."""

import pytest
import torch

from tests.kernels.test_geglu_norm import draw
from zoo.kernels import geglu_norm as module
from zoo.kernels import use_backend
from zoo.kernels.geglu_norm import ACTIVATIONS, geglu_norm, reference


def leaves(shape, dtype, device):
    return [t.detach().to(device).requires_grad_() for t in draw(*shape, dtype=dtype)]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 20, 96), (1, 1, 40), (3, 200), (0, 4, 8), (2, 1)])
def test_forward_and_every_gradient_equal_the_definition(shape, act, device, precise, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 2)  # programs have several blocks of rows
    tensors = leaves(shape, precise, device)
    out, expected = (form(*tensors, eps=1e-5, act=act) for form in (geglu_norm, reference))
    bar = 1e-10 if precise == torch.float64 else 2e-4
    torch.testing.assert_close(out, expected, rtol=0, atol=bar)
    grad = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, tensors, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=bar, atol=bar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_plain_torch(dtype, device):
    torch.manual_seed(0)
    low = [t.detach() for t in leaves((4, 9, 64), dtype, device)]
    truth = reference(*(t.double() for t in low))
    with use_backend("torch"):
        plain = geglu_norm(*low)
    got = geglu_norm(*low)
    assert got.dtype == dtype
    error, allowed = ((y.double() - truth).abs().max() for y in (got, plain))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max()


def test_strides_repeated_runs_and_torchs_checks(device):
    a, b, weight, bias = leaves((3, 5, 24), torch.float32, device)
    strided = a.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    grad = torch.randn_like(b)
    runs = [torch.autograd.grad(geglu_norm(x, b, weight, bias), (x, b, weight, bias), grad) for x in (a, a, strided)]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
    torch.library.opcheck(torch.ops.zoo.geglu_norm, (a, b, weight, bias, 1e-5, "gelu"))
    compiled = torch.compile(geglu_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, weight, bias), geglu_norm(a, b, weight, bias))


def test_too_many_features_are_refused(device):
    with pytest.raises(ValueError, match="5000 features"):
        geglu_norm(*leaves((1, 5000), torch.float32, device))
