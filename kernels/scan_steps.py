"""The recurrence under every selective scan, on any device in plain torch: h_t = exp(d_t A) h_{t-1} + B_t v_t.

Tensors are step-first: a step has G groups, each with its own B_t and C_t and with D rows that share them;
the state of a step is (G, N, D). A step costs about 7 G N D FLOPs forward, and 3 times as many backward.

What a CPU pays for is memory traffic and calls. Steps are taken in chunks whose decays and states fit into the
cache: the decays, inputs and outputs of a chunk are a few batched products, and only `state = input + decay *
previous` is one call a step. A large state is updated in place, step by step, instead. Either is many times
faster than materialising all steps, and chunks are up to 1.7 times faster than steps (tests/bench/vim2.py).
Nothing of the size of all states ever exists: the forward pass keeps the state at the borders of segments, the
backward pass recomputes one segment at a time from its border.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**17  # states of one chunk: 0.5 MB in float32, twice (decays and states) in a core's cache
FEWEST_STEPS = 8  # of a chunk
SEGMENT_ELEMENTS = 2**20  # states of one segment, which the backward pass holds three times

Inputs = Callable[[int, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def segment_length(state_elements: int) -> int:
    """Steps between two states that are kept, for a state of so many elements."""
    return max(8, min(128, SEGMENT_ELEMENTS // max(1, state_elements)))


def num_segments(length: int, state_elements: int) -> int:
    """Number of states that are kept for `length` steps."""
    segment = segment_length(state_elements)
    return (length + segment - 1) // segment


def scan_steps(
    length: int, A: Tensor, rows: int, inputs: Inputs, emit: Callable[[int, int, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Run the recurrence from a zero state.

    Args:
        length: steps.
        A: (G, N, D), or (G, N, 1) shared by the rows; not positive.
        rows: D.
        inputs: called with a range of steps [s, e), returns d (T, G, D), v (T, G, D), B (T, G, N) and
            C (T, G, N) of these steps, T = e - s, where d is not negative.
        emit: called with s, e and y (T, G, D), y_t = C_t . h_t; y is overwritten afterwards.

    Returns:
        The states before each segment (S, G, N, D), and the last state (G, N, D).
    """
    G, N = A.shape[:2]
    state = G * N * rows
    segment = segment_length(state)
    chunk = min(max(1, CHUNK_ELEMENTS // max(1, state)), segment, max(1, length))
    work = _Work(A, chunk, rows)
    y = A.new_empty(min(segment, max(1, length)), G, 1, rows)
    h = A.new_zeros(G, N, rows)
    borders = A.new_empty(num_segments(length, state), G, N, rows)
    for i, border in enumerate(borders):
        border.copy_(h)
        s, e = i * segment, min(length, (i + 1) * segment)
        d, v, B, C = inputs(s, e)
        C = C.unsqueeze(2)
        if chunk < FEWEST_STEPS:  # a state so large costs more than calls do, and is best updated in place
            clamp, decay = work.underflows(d), work.step_decays[0]
            views = (d.unsqueeze(2), v.unsqueeze(2), B.unsqueeze(3), C, y[: e - s])
            for d_t, v_t, B_t, C_t, y_t in zip(*(view.unbind(0) for view in views)):
                torch.mul(A, d_t, out=decay)
                if clamp:
                    decay.clamp_(min=work.floor)
                h.mul_(decay.exp_()).addcmul_(B_t, v_t)
                torch.bmm(C_t, h, out=y_t)
        else:
            for first in range(0, e - s, chunk):
                part = slice(first, min(e - s, first + chunk))
                states, last = work.advance(h, d[part], v[part], B[part])
                torch.matmul(C[part], states, out=y[part])
                h.copy_(last)
        emit(s, e, y[: e - s, :, 0])
    return borders, h


def scan_steps_backward(
    length: int,
    A: Tensor,
    rows: int,
    borders: Tensor,
    inputs: Inputs,
    output_grad: Callable[[int, int], Tensor],
    emit: Callable[[int, int, Tensor, Tensor, Tensor, Tensor], None],
    last_grad: Tensor | None = None,
) -> Tensor:
    """Gradients of `scan_steps`, from the last segment to the first.

    Args:
        length: steps.
        A: as forward.
        rows: D.
        borders: the states before each segment.
        inputs: as forward.
        output_grad: called with a range of steps, returns the gradient of y (T, G, D).
        emit: called with s, e and the gradients of d, v (T, G, D), B and C (T, G, N) of these steps.
        last_grad: gradient of the last state (G, N, D).

    Returns:
        The gradient of A for each row, (G, N, D).
    """
    G, N = A.shape[:2]
    segment = segment_length(G * N * rows)
    steps = min(segment, max(1, length))
    work = _Work(A, steps, rows)
    grads = A.new_empty(steps, G, N, rows)
    step_grads = grads.unbind(0)
    carry = A.new_zeros(G, N, rows) if last_grad is None else last_grad.to(A.dtype, copy=True)
    dA = A.new_zeros(G, N, rows)
    for i in reversed(range(len(borders))):
        s, e = i * segment, min(length, (i + 1) * segment)
        T = e - s
        d, v, B, C = inputs(s, e)
        state, _ = work.advance(borders[i], d, v, B)
        decay, grad = work.decays[:T], grads[:T]
        dy = output_grad(s, e)
        # grad_t = C_t dy_t + exp(d_{t+1} A) grad_{t+1}
        torch.mul(C.unsqueeze(3), dy.unsqueeze(2), out=grad)
        grad[-1] += carry
        for t in range(T - 2, -1, -1):
            step_grads[t].addcmul_(work.step_decays[t + 1], step_grads[t + 1])
        torch.mul(decay[0], grad[0], out=carry)
        dC = torch.matmul(state, dy.unsqueeze(3)).squeeze(3)
        dB = torch.matmul(grad, v.unsqueeze(3)).squeeze(3)
        dv = torch.matmul(B.unsqueeze(2), grad).squeeze(2)
        # through the exponent d A: grad_t exp(d_t A) h_{t-1}
        decay *= grad
        decay[1:] *= state[:-1]
        decay[0] *= borders[i]
        dd = torch.mul(decay, A, out=grad).sum(2)
        dA += torch.mul(decay, d.unsqueeze(2), out=grad).sum(0)
        emit(s, e, dd, dv, dB, dC)
    return dA


class _Work:
    """Room for the decays and states of some steps, (T, G, N, D), and its views by step."""

    def __init__(self, A: Tensor, steps: int, rows: int):
        self.A = A
        self.decays, self.states = (A.new_empty(steps, *A.shape[:2], rows) for _ in range(2))
        self.step_decays, self.step_states = self.decays.unbind(0), self.states.unbind(0)
        self.fastest = float(A.min()) if A.numel() else 0.0
        self.floor = math.log(torch.finfo(A.dtype).tiny)

    def decay(self, d: Tensor) -> Tensor:
        """exp(d A) of some steps, (T, G, N, D)."""
        decays = torch.mul(d.unsqueeze(2), self.A, out=self.decays[: d.shape[0]])
        if self.underflows(d):
            decays.clamp_(min=self.floor)
        return decays.exp_()

    def underflows(self, d: Tensor) -> bool:
        """Whether exp(d A) may be denormal or zero, where it takes 100 times as long: then d A is clamped."""
        return d.numel() > 0 and float(d.max()) * self.fastest < self.floor

    def advance(self, h: Tensor, d: Tensor, v: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Fill in the steps that follow the state `h`; returns their states and the last of these."""
        T = d.shape[0]
        states = self.states[:T]
        self.decay(d)
        torch.mul(v.unsqueeze(2), B.unsqueeze(3), out=states)
        for t in range(T):
            h = self.step_states[t].addcmul_(self.step_decays[t], h)
        return states, h


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), x itself above 20 as in torch, whose own function takes 5 times as long on a CPU."""
    if x.numel() and not float(x.max()) <= 20:
        return F.softplus(x)
    return torch.exp(x).log1p_()


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
