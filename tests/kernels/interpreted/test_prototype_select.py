"""The kernels of `prototype_select` against its definition."""

import pytest
import torch

from zoo.kernels.prototype_select import prototype_select, reference, select_tokens


@pytest.mark.parametrize(
    ("B", "Q", "N", "C", "heads"),
    [(2, 7, 33, 32, 4), (1, 20, 600, 16, 2), (1, 1, 1, 8, 1), (0, 3, 4, 8, 2), (1, 130, 70, 96, 2)],
)
def test_output_and_gradient_equal_the_definition(device, precise, B, Q, N, C, heads):
    queries = torch.randn(B, Q, C, dtype=precise, device=device)
    keys = torch.randn(B, C, N, dtype=precise, device=device).transpose(1, 2).requires_grad_()
    allowed = torch.rand(B, Q, N, device=device) < 0.5
    out, expected = (f(queries, keys, allowed, heads) for f in (prototype_select, reference))
    assert torch.equal(out, expected)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, keys, weight)[0] for y in (out, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if precise == torch.float32 else 1e-13)


def test_empty_masks_and_ties_follow_the_rules(device, precise):
    queries = torch.randn(2, 4, 16, dtype=precise, device=device)
    keys = torch.randn(2, 600, 16, dtype=precise, device=device)
    allowed = torch.rand(2, 4, 600, device=device) < 0.5
    allowed[0, 1] = False
    allowed[1] = False
    index = select_tokens(queries, keys, allowed, 2)
    assert index[0, 1].eq(0).all()
    assert torch.equal(index[1], select_tokens(queries, keys, torch.ones_like(allowed), 2)[1])
    everywhere = torch.ones_like(allowed)
    assert select_tokens(queries, torch.ones_like(keys), everywhere, 2).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types_choose_a_token_that_is_as_similar(device, dtype):
    queries, keys = torch.randn(1, 9, 32, device=device), torch.randn(1, 80, 32, device=device)
    queries, keys = queries.to(dtype), keys.to(dtype)
    allowed = torch.rand(1, 9, 80, device=device) < 0.5
    chosen = prototype_select(queries, keys, allowed, 2).double()
    best = reference(queries.double(), keys.double(), allowed, 2)
    got, want = ((queries.double() * p).unflatten(-1, (2, 16)).sum(-1) for p in (chosen, best))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_opcheck(device):
    queries, keys = torch.randn(1, 3, 16, device=device), torch.randn(1, 20, 16, device=device)
    allowed = torch.rand(1, 3, 20, device=device) < 0.5
    torch.library.opcheck(torch.ops.zoo.prototype_index, (queries, keys, allowed, 2))
    index = select_tokens(queries, keys, allowed, 2)
    torch.library.opcheck(torch.ops.zoo.prototype_gather, (keys.requires_grad_(), index))
    torch.library.opcheck(torch.ops.zoo.prototype_gather_backward, (torch.randn(1, 3, 16, device=device), index, 20))
