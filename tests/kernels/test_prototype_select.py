"""`prototype_select` equals its definition: tiles, masks, the two rules for empty masks, and gradients."""

import pytest
import torch

from zoo.kernels.prototype_select import gather_tokens, prototype_select, reference, select_tokens


def draw(B, Q, N, C, dtype=torch.float64, share=0.5):
    queries = torch.randn(B, Q, C, dtype=dtype)
    keys = torch.randn(B, N, C, dtype=dtype).requires_grad_()
    return queries, keys, torch.rand(B, Q, N) < share


@pytest.mark.parametrize(("B", "Q", "N", "C", "heads"), [(2, 7, 33, 32, 4), (1, 5, 2500, 16, 2), (1, 1, 1, 8, 1)])
def test_output_and_gradient_equal_the_definition(B, Q, N, C, heads):
    queries, keys, allowed = draw(B, Q, N, C)
    out, expected = (f(queries, keys, allowed, heads) for f in (prototype_select, reference))
    assert torch.equal(out, expected)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, keys, weight)[0] for y in (out, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("N", [40, 1500])
def test_a_query_without_tokens_takes_the_first_and_an_image_without_any_ignores_its_mask(N):
    queries, keys, allowed = draw(2, 4, N, 16)
    allowed[0, 1] = False
    allowed[1] = False
    index = select_tokens(queries, keys, allowed, 2)
    assert index[0, 1].eq(0).all()
    assert torch.equal(index[1], select_tokens(queries, keys, torch.ones_like(allowed), 2)[1])
    assert torch.equal(gather_tokens(keys, index), reference(queries, keys, allowed, 2))


def test_the_first_of_equal_maxima_wins_across_tiles():
    keys = torch.ones(1, 2100, 8)
    index = select_tokens(torch.ones(1, 3, 8), keys, torch.ones(1, 3, 2100, dtype=torch.bool), 2)
    assert index.eq(0).all()


class _Select(torch.nn.Module):
    def forward(self, queries, keys, allowed):
        return prototype_select(queries, keys, allowed, 4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["fx", "export", "compile"])
def test_every_capture_gives_the_same_numbers(form):
    queries, keys, allowed = draw(2, 5, 30, 16)
    inputs = (queries, keys.detach(), allowed)
    module = _Select()
    captured = {
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, inputs).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    }[form](module)
    assert torch.equal(captured(*inputs), module(*inputs))
