"""No operator of the attention family allocates more on a CPU than its docstring says. Sizes in elements of float32."""

import pytest
import torch

from tests.kernels.memory import peak_bytes
from zoo.kernels import attention, linear_attention, prototype_select, tied_attention

B, H, N, D = 2, 3, 256, 16
SLACK = 1.05  # sums over keys, logarithms of softmax sums


def draw(*shape, grad=False):
    return torch.randn(*shape).requires_grad_(grad)


def elements(function, *args):
    return peak_bytes(function, *args) / 4


def with_gradients(function):
    def both(*leaves):
        out = function(*leaves)
        torch.autograd.grad(out, [x for x in leaves if x.requires_grad], torch.ones_like(out))

    return both


def test_the_counter_counts():
    x = draw(1000)
    assert elements(lambda x: x + 1, x) == 1000
    assert elements(lambda x: (x + 1) + 2, x) == 2000
    assert elements(lambda x: x.view(10, 100).t(), x) == 0
    assert elements(attention.reference, *(draw(B, H, N, D) for _ in range(3))) > 2 * B * H * N * N


@pytest.mark.parametrize("N", [256, 512])
def test_attention_keeps_no_logits(N):
    q, k, v = (draw(B, H, N, D) for _ in range(3))
    assert elements(attention.attention, q, k, v) <= SLACK * B * H * N * (D + 2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    # output, its gradient, three gradients, and the logarithms of the softmax sums
    assert elements(with_gradients(attention.attention), *leaves) <= SLACK * B * H * N * (5 * D + 4)


def test_attention_adds_a_table_once_for_all_images_and_joins_the_segments():
    q, k, v, k2, v2 = (draw(8, H, n, D) for n in (N, N, N, 64, 64))
    table, key_bias2 = draw(H, 31, 31), draw(H, 64)
    peak = elements(
        lambda *x: attention.attention(x[0], x[1], x[2], k2=x[3], v2=x[4], table=x[5], key_bias2=x[6]),
        *(q, k, v, k2, v2, table, key_bias2),
    )
    keys = N + 64
    bias = H * N * keys  # made in a few steps; never for every image
    assert peak <= SLACK * (8 * H * (2 * keys * D + N * (D + 2)) + 4 * bias)
    assert bias * 4 < 8 * H * N * keys


@pytest.mark.parametrize("N", [197, 577])
def test_tied_attention_keeps_no_scores(N):
    w = draw(B, H, N, 64)
    assert elements(tied_attention.tied_attention, w) <= SLACK * B * H * N * 66
    w.requires_grad_()
    # output, its gradient, three gradients that are added up
    assert elements(with_gradients(tied_attention.tied_attention), w) <= SLACK * B * H * N * (6 * 64 + 4)


@pytest.mark.parametrize("N", [400, 1600])
def test_linear_attention_is_linear_in_the_tokens(N):
    q, k, v = draw(3, B, N, H, D).transpose(2, 3)
    tokens, context = B * H * N * D, B * H * D * (D + 2)
    # features of q and k and their copies, v's copy, the product, the result
    assert elements(linear_attention.linear_attention, q, k, v) <= SLACK * (7 * tokens + 2 * context)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert elements(with_gradients(linear_attention.linear_attention), *leaves) <= SLACK * (14 * tokens + 4 * context)


def test_prototype_select_keeps_similarities_of_one_tile():
    queries, keys, allowed = draw(1, 100, 256), draw(1, 8192, 256), torch.rand(1, 100, 8192) < 0.5
    peak = elements(lambda *x: prototype_select.prototype_select(*x, 8), queries, keys, allowed)
    tile = 8 * 100 * 1024
    masks = 100 * 8192 / 4 * 3  # bytes
    assert peak <= 1.5 * tile + 1024 * 256 + 100 * 1024 * 2 + masks
    everything = elements(lambda *x: prototype_select.reference(*x, 8), queries, keys, allowed)
    assert peak < everything / 4
