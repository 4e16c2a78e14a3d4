"""The recurrence under every selective scan as Triton kernels: h_t = exp(d_t A) h_{t-1} + B_t v_t.

`scan_steps.py` is its counterpart in plain torch. A program has a block of rows (channels) and walks along the
sequence in tiles of T = 16 steps. Decays, inputs and states of a tile are (T, rows, N) in registers, laid out so that
a thread has all steps of its elements: the scan of a tile is then T multiply-adds in a thread, and the loads and
exponentials of all T steps are in flight together, where a loop over steps would wait for each.

Forward, a sequence is walked by one program, or by several with a part each where few rows would leave the card
idle. Then the state at the beginning of a part comes first: `_ends` finds what a part adds to a zero state and its
decay, exp(A sum d), a sum where a product of exponentials might be expected; `_carry` chains the parts. Nothing is
ever divided by a decay. The state before every SEGMENT steps is kept.

Backward, with g_t the gradient of h_t and c_t = exp(d_t A) g_t,

    g_t = C_t dy_t + c_{t+1},   dB_t = sum over rows g_t v_t,   dC_t = sum over rows h_t dy_t,
    dv_t = B_t . g_t,           dd_t = A . (c_t h_{t-1}),       dA = sum_t d_t c_t h_{t-1}

runs from the last segment to the first: its tiles' states are recomputed from the segment's border (the first state of
each tile goes through a scratch of a few kB), then its tiles are taken in reverse. h_{t-1} and c_{t+1} come out of the
same scans as h_t and c_t. Sums over rows are made by one program, block of rows after block of rows, or go to a few
slots that torch adds up: the order is fixed, and gradients are the same bits in every run.

Two memory layouts are supported. `pixels`: u (b, L, rows) is shared by four groups, the directions of a map, which
read it in their own order; step sizes have low rank and are expanded here; outputs of opposite directions, which share
their memory order, are added by one program. Otherwise u (b, G rows, L), dt alike, B and C (b, G, N, L).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.kernels.jit import cdiv, interpreted, next_power_of_2, on_amd, triton_jit

if TYPE_CHECKING:
    import triton.language as tl

T = 16  # steps of a tile
TILE_STATES = 256  # elements of a state that a program has: registers hold T of them, several times
SEGMENT = 128  # steps between two states that are kept
MAX_STATES = {True: 16, False: 64}  # with `pixels` a block has 16 rows, as the products with low rank want
MAX_RANK = 128
PROGRAMS = 512  # enough to fill a card: about four for each multiprocessor


@dataclass(frozen=True)
class Shape:
    """Sizes of a scan, and of its kernels. `pixels`, `column`, `back`: see `scan2d`'s modes."""

    batch: int
    groups: int
    rows: int  # of a group
    length: int
    states: int
    rank: int = 0
    height: int = 0
    width: int = 0
    pixels: bool = False
    column: bool = False
    back: bool = False

    @property
    def padded(self) -> int:
        """States of a row in registers, a power of two."""
        return max(2, next_power_of_2(self.states))

    @property
    def block(self) -> int:
        """Rows of a program."""
        return min(16, max(1, TILE_STATES // self.padded))

    @property
    def blocks(self) -> int:
        """Blocks of rows."""
        return cdiv(self.rows, self.block)

    @property
    def segments(self) -> int:
        """Segments of the sequence."""
        return cdiv(self.length, SEGMENT)

    @property
    def lanes(self) -> int:
        """Programs that differ in image and group; with `pixels` one has two groups."""
        return self.batch * (2 if self.pixels else self.groups)

    def split(self, programs: int) -> tuple[int, int]:
        """Parts of the sequence, and segments of each, where there are `programs` without parts."""
        wanted = min(self.segments, max(1, PROGRAMS // max(1, programs)))
        each = max(1, cdiv(self.segments, max(1, wanted)))
        return max(1, cdiv(self.segments, each)), each

    def sizes(self) -> tuple[int, ...]:
        """The numbers that all kernels take."""
        return self.groups, self.rows, self.length, self.height, self.width

    def constants(self, warps: int) -> dict[str, int | bool]:
        """The compile-time numbers that all kernels take, for `warps` if the tile is full."""
        return dict(
            N=self.states,
            R=self.rank,
            PIXELS=self.pixels,
            COLUMN=self.column,
            NP=self.padded,
            RP=max(16, next_power_of_2(self.rank)),
            BLOCK=self.block,
            STEPS=T,
            SEGMENT_STEPS=SEGMENT,
            num_warps=warps_for(warps, self.block * self.padded),
        )


def unsupported(states: int, rank: int = 0) -> str | None:
    """What keeps these kernels from running, for `use_triton`."""
    most = MAX_STATES[rank > 0]
    if states > most:
        return f"{states} states (at most {most})"
    if rank > MAX_RANK:
        return f"step sizes of rank {rank} (at most {MAX_RANK})"
    return None


@dataclass(frozen=True)
class Inputs:
    """What a scan reads. Weights (`w`, `bias`, `A`, `skip`) are in the type that everything is computed in.

    With `pixels`, `step`, `B` and `C` are one tensor (b, L, 4, R + 2N), and `w` (4, rows, R) expands the first R.
    """

    u: Tensor
    step: Tensor
    B: Tensor
    C: Tensor
    w: Tensor
    bias: Tensor
    A: Tensor
    skip: Tensor
    z: Tensor | None
    softplus: bool

    def tensors(self) -> tuple[Tensor, ...]:
        """The arguments of the kernels that find states."""
        return self.u, self.step, self.B, self.C, self.w, self.bias, self.A


def forward(shape: Shape, given: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fill `y`; returns the states before each segment (b, S, G rows, N) and the last ones (b, G rows, N).

    With `pixels`, y is (2, b, L, rows): row-major and column-major directions.
    """
    quicken_interpreter()
    state = (shape.groups * shape.rows, shape.states)
    splits, each = shape.split(shape.lanes * shape.blocks)
    starts = given.A.new_zeros(shape.batch, splits, *state)
    if splits > 1:
        _find_starts(shape, given, given.u, starts, splits, each, adjoint=False)
    borders = given.A.new_empty(shape.batch, shape.segments, *state)
    last = given.A.new_zeros(shape.batch, *state)
    _scan_forward[(shape.blocks, splits, shape.lanes)](
        *given.tensors(),
        given.skip,
        given.u if given.z is None else given.z,
        starts,
        y,
        borders,
        last,
        *shape.sizes(),
        shape.batch,
        splits,
        each,
        shape.segments,
        BACK=shape.back,
        SOFTPLUS=given.softplus,
        HAS_Z=given.z is not None,
        DIRECTIONS=2 if shape.pixels else 1,
        **shape.constants(4),
    )
    return borders, last


@dataclass(frozen=True)
class Gradients:
    """Gradients of `Inputs`: (2, b, L, rows) of u with `pixels`, slots before B and C, parts before weights."""

    u: Tensor
    step: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    w: Tensor
    bias: Tensor
    A: Tensor
    skip: Tensor


def backward(shape: Shape, given: Inputs, borders: Tensor, dy: Tensor, dlast: Tensor | None) -> Gradients:
    """Gradients for `dy` (laid out as u), and `dlast` of the last states; parts and slots are to be summed."""
    slots = min(shape.blocks, 4, max(1, PROGRAMS // max(1, shape.lanes)))
    splits, each = shape.split(shape.lanes * slots)
    state = (shape.groups * shape.rows, shape.states)
    new = given.A.new_empty
    starts = given.A.new_zeros(shape.batch, splits, *state)
    if splits > 1:
        _find_starts(shape, given, dy, starts, splits, each, adjoint=True, init=dlast)
    elif dlast is not None:
        starts[:, 0] = dlast
    if shape.pixels:
        projected = new(slots, *given.step.shape)
        du, step, B, C = new(2, *given.u.shape), projected, projected, projected
    else:
        du, step = torch.empty_like(given.u), torch.empty_like(given.step)
        B, C = (new(slots, *given.B.shape) for _ in range(2))
    parts = shape.batch * splits
    grads = Gradients(
        du,
        step,
        B,
        C,
        None if given.z is None else torch.empty_like(given.z),
        new(parts, shape.groups * shape.rows, max(1, shape.rank)),
        *(new(parts, *t.shape) for t in (given.bias, given.A, given.skip)),
    )
    constants = shape.constants(8)
    scratch = new(slots * splits * shape.lanes, SEGMENT // T, shape.block, shape.padded)
    _scan_backward[(slots, splits, shape.lanes)](
        *given.tensors(),
        given.skip,
        given.u if given.z is None else given.z,
        dy,
        starts,
        borders,
        scratch,
        grads.u,
        grads.step,
        grads.B,
        grads.C,
        grads.u if grads.z is None else grads.z,
        grads.w,
        grads.bias,
        grads.A,
        grads.skip,
        *shape.sizes(),
        shape.batch,
        slots,
        splits,
        each,
        shape.segments,
        BACK=shape.back,
        SOFTPLUS=given.softplus,
        HAS_Z=given.z is not None,
        DIRECTIONS=2 if shape.pixels else 1,
        **constants,
    )
    return grads


def _find_starts(
    shape: Shape,
    given: Inputs,
    dy: Tensor,
    starts: Tensor,
    splits: int,
    each: int,
    adjoint: bool,
    init: Tensor | None = None,
) -> None:
    """Fill in what each part of the sequence begins with: the state, or (adjoint) c after its last step."""
    decays = torch.empty_like(starts)
    turned = shape.pixels and shape.back
    for first, count, reverse in ((0, 2, False), (2, 2, True)) if turned else ((0, shape.groups, False),):
        _scan_ends[(shape.blocks, splits, shape.batch * count)](
            *given.tensors(),
            given.u if given.z is None else given.z,
            dy,
            starts,
            decays,
            *shape.sizes(),
            splits,
            each,
            shape.segments,
            first,
            count,
            REVERSE=reverse != adjoint,
            ADJOINT=adjoint,
            SOFTPLUS=given.softplus,
            HAS_Z=given.z is not None and adjoint,
            **shape.constants(4),
        )
    size = shape.rows * shape.states
    _scan_carry[(cdiv(size, 256), shape.batch * shape.groups)](
        starts,
        decays,
        starts if init is None else init,
        shape.groups,
        size,
        splits,
        TURNED=turned,
        ADJOINT=adjoint,
        HAS_INIT=init is not None,
        BLOCK=256,
        num_warps=4,
    )


def warps_for(full: int, states: int) -> int:
    """Warps of a program with a state of so many elements, for `full` where registers are filled.

    Threads must not outnumber the elements of a state: they would share the steps, and scans would leave registers.
    """
    return max(1, min(full * states // TILE_STATES, states // (64 if on_amd() else 32)))


def quicken_interpreter() -> None:
    """Under TRITON_INTERPRET=1: let scans treat all lanes of a step together, not one number after another."""
    if not interpreted():
        return
    import numpy as np
    from triton.runtime.interpreter import ScanOps

    def scan(self, inputs):
        steps = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in inputs]
        results = [np.empty_like(step) for step in steps]
        state = None
        for i in range(len(steps[0])):
            step = tuple(self.to_tensor(np.ascontiguousarray(s[i]), t.dtype) for s, t in zip(steps, inputs))
            state = step if state is None else self.combine_fn.fn(*state, *step)
            for result, value in zip(results, state):
                result[i] = value.handle.data
        moved = (np.ascontiguousarray(np.moveaxis(result, 0, self.axis)) for result in results)
        return [self.to_tensor(data, tensor.dtype) for data, tensor in zip(moved, inputs)]

    ScanOps.generic_scan = scan


# Parts of kernels, also used by `channel_scan.py` -----------------------------------------------------------------


@triton_jit
def softplus_tile(x):  # noqa: D103
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    # log(1 + e) loses what 1 + e rounded off; log(w) / (w - 1) is as smooth there as 1, and puts it back
    small = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton_jit
def sigmoid(x):  # noqa: D103
    return 1.0 / (1.0 + tl.exp(-x))


@triton_jit
def softplus_slope(x):  # noqa: D103
    return tl.where(x > 20.0, 1.0, sigmoid(x))


@triton_jit
def _chain(a1, b1, a2, b2):
    """x -> a1 x + b1, then x -> a2 x + b2."""
    return a1 * a2, a2 * b1 + b2


@triton_jit
def _chain_with_previous(a1, b1, p1, q1, a2, b2, p2, q2):
    """The same; x -> p x + q is the chain without its last step."""
    return a1 * a2, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton_jit
def scan_tile(decay, inner, h, STEPS: tl.constexpr, REVERSE: tl.constexpr):
    """States after each step (T, rows, N) of h <- decay h + inner, from `h` (rows, N); and the last one."""
    t = tl.arange(0, STEPS)[:, None, None]
    first = STEPS - 1 if REVERSE else 0
    inner += tl.where(t == first, decay * h[None], 0.0)
    _, states = tl.associative_scan((decay, inner), 0, _chain, reverse=REVERSE)
    return states, tl.sum(tl.where(t == STEPS - 1 - first, states, 0.0), 0)


@triton_jit
def scan_tile_with_previous(decay, inner, h, STEPS: tl.constexpr, REVERSE: tl.constexpr):
    """`scan_tile`, and the states before each step."""
    t = tl.arange(0, STEPS)[:, None, None]
    first = STEPS - 1 if REVERSE else 0
    is_first = t == first
    inner += tl.where(is_first, decay * h[None], 0.0)
    p = tl.full(decay.shape, 1.0, decay.dtype)
    q = tl.where(is_first, tl.broadcast_to(h[None], decay.shape), 0.0)
    _, states, _, previous = tl.associative_scan((decay, inner, p, q), 0, _chain_with_previous, reverse=REVERSE)
    return states, previous, tl.sum(tl.where(t == STEPS - 1 - first, states, 0.0), 0)


@triton_jit
def position(q, column, height, width):
    """Place in memory of positions `q` of a height x width grid read row by row, or column by column."""
    return tl.where(column, (q % height) * width + q // height, q)


# Kernels ---------------------------------------------------------------------------------------------------------


@triton_jit
def _places(
    image,
    g,
    q,
    row,
    n,
    column,
    groups,
    rows,
    length,
    height,
    width,
    N: tl.constexpr,
    R: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Offsets of a tile's elements of u and y (T, rows), of its steps' first projected value, or of B (T, N)."""
    if PIXELS:
        at = image * length + position(q, column, height, width)
        return at[:, None] * rows + row[None, :], (at * groups + g) * (R + 2 * N)
    else:
        group = image * groups + g
        return (group * rows + row)[None, :] * length + q[:, None], group * N * length + q


@triton_jit
def _tile(
    U,
    STEP,
    B,
    C,
    w,
    bias,
    x_at,
    p_at,
    live,
    row_live,
    n,
    length,
    N: tl.constexpr,
    R: tl.constexpr,
    PIXELS: tl.constexpr,
    RP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """u, r, raw step, step size, B, C of some steps."""
    mask = live[:, None] & row_live[None, :]
    n_mask = live[:, None] & (n < N)[None, :]
    u = tl.load(U + x_at, mask, 0.0).to(bias.dtype)
    if PIXELS:
        rank = tl.arange(0, RP)
        r = tl.load(STEP + p_at[:, None] + rank[None, :], live[:, None] & (rank < R)[None, :], 0.0)
        raw = tl.dot(r, w, input_precision="ieee", out_dtype=bias.dtype) + bias[None, :]
        b_at = p_at[:, None] + R + n[None, :]
        c_at = b_at + N
    else:
        r = tl.load(STEP + x_at, mask, 0.0).to(bias.dtype)
        raw = r + bias[None, :]
        b_at = p_at[:, None] + n[None, :] * length
        c_at = b_at
    b = tl.load(B + b_at, n_mask, 0.0).to(bias.dtype)
    c = tl.load(C + c_at, n_mask, 0.0).to(bias.dtype)
    d = raw
    if SOFTPLUS:
        d = softplus_tile(raw)
    return u, r, raw, tl.where(mask, d, 0.0), b, c


@triton_jit
def _scan_forward(
    U,
    STEP,
    B,
    C,
    W,
    BIAS,
    A,
    SKIP,
    Z,
    STARTS,
    Y,
    BORDERS,
    LAST,
    groups,
    rows,
    length,
    height,
    width,
    batch,
    splits,
    each,
    segments,
    N: tl.constexpr,
    R: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMN: tl.constexpr,
    BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    NP: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    SEGMENT_STEPS: tl.constexpr,
):
    split = tl.program_id(1)
    lanes = 2 if PIXELS else groups
    image = (tl.program_id(2) // lanes).to(tl.int64)
    pair = tl.program_id(2) % lanes
    column = (pair == 1) & COLUMN
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_live = row < rows
    n = tl.arange(0, NP)
    first = split * each
    count = tl.minimum(segments - first, each)
    for direction in tl.static_range(DIRECTIONS):
        g = pair + 2 * direction
        channel = g * rows + row
        state_at = channel[:, None] * N + n[None, :]
        state_live = row_live[:, None] & (n < N)[None, :]
        state = groups * rows * N
        a = tl.load(A + state_at, state_live, 0.0)
        bias = tl.load(BIAS + channel, row_live, 0.0)
        skip = tl.load(SKIP + channel, row_live, 0.0)
        w = bias
        if PIXELS:
            rank = tl.arange(0, RP)
            w = tl.load(W + channel[None, :] * R + rank[:, None], row_live[None, :] & (rank < R)[:, None], 0.0)
        h = tl.load(STARTS + (image * splits + split) * state + state_at, state_live, 0.0)
        for i in range(count):
            segment = first + ((count - 1 - i) if BACK and direction == 1 else i)
            tl.store(BORDERS + (image * segments + segment) * state + state_at, h, state_live)
            tiles = tl.cdiv(tl.minimum(length - segment * SEGMENT_STEPS, SEGMENT_STEPS), STEPS)
            for j in range(tiles):
                q = (
                    segment * SEGMENT_STEPS
                    + ((tiles - 1 - j) if BACK and direction == 1 else j) * STEPS
                    + tl.arange(0, STEPS)
                )
                live = q < length
                x_at, p_at = _places(image, g, q, row, n, column, groups, rows, length, height, width, N, R, PIXELS)
                u, _, _, d, b, c = _tile(
                    U, STEP, B, C, w, bias, x_at, p_at, live, row_live, n, length, N, R, PIXELS, RP, SOFTPLUS
                )
                inner = (d * u)[:, :, None] * b[:, None, :]
                states, h = scan_tile(tl.exp(d[:, :, None] * a[None]), inner, h, STEPS, BACK and direction == 1)
                y = tl.sum(states * c[:, None, :], 2) + skip[None, :] * u
                mask = live[:, None] & row_live[None, :]
                if HAS_Z:
                    z = tl.load(Z + x_at, mask, 0.0).to(bias.dtype)
                    y *= z * sigmoid(z)
                if PIXELS:
                    x_at += pair.to(tl.int64) * batch * length * rows
                if direction == 1:
                    y += tl.load(Y + x_at, mask, 0.0)
                tl.store(Y + x_at, y.to(Y.dtype.element_ty), mask)
        if split == splits - 1:
            tl.store(LAST + image * state + state_at, h, state_live)
        tl.debug_barrier()  # the opposite direction adds to what this one wrote


@triton_jit
def _scan_ends(
    U,
    STEP,
    B,
    C,
    W,
    BIAS,
    A,
    Z,
    DY,
    ENDS,
    DECAYS,
    groups,
    rows,
    length,
    height,
    width,
    splits,
    each,
    segments,
    first_group,
    group_count,
    N: tl.constexpr,
    R: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    NP: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    SEGMENT_STEPS: tl.constexpr,
):
    split = tl.program_id(1)
    image = (tl.program_id(2) // group_count).to(tl.int64)
    g = first_group + tl.program_id(2) % group_count
    column = (g % 2 == 1) & COLUMN
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_live = row < rows
    n = tl.arange(0, NP)
    channel = g * rows + row
    state_at = channel[:, None] * N + n[None, :]
    state_live = row_live[:, None] & (n < N)[None, :]
    a = tl.load(A + state_at, state_live, 0.0)
    bias = tl.load(BIAS + channel, row_live, 0.0)
    w = bias
    if PIXELS:
        rank = tl.arange(0, RP)
        w = tl.load(W + channel[None, :] * R + rank[:, None], row_live[None, :] & (rank < R)[:, None], 0.0)
    h = tl.zeros_like(a)
    total = tl.zeros_like(bias)
    begin = split * each * SEGMENT_STEPS
    tiles = tl.cdiv(tl.minimum(length - begin, each * SEGMENT_STEPS), STEPS)
    for j in range(tiles):
        q = begin + ((tiles - 1 - j) if REVERSE else j) * STEPS + tl.arange(0, STEPS)
        live = q < length
        x_at, p_at = _places(image, g, q, row, n, column, groups, rows, length, height, width, N, R, PIXELS)
        u, _, _, d, b, c = _tile(
            U, STEP, B, C, w, bias, x_at, p_at, live, row_live, n, length, N, R, PIXELS, RP, SOFTPLUS
        )
        decay = tl.exp(d[:, :, None] * a[None])
        if ADJOINT:
            mask = live[:, None] & row_live[None, :]
            dy = tl.load(DY + x_at, mask, 0.0).to(bias.dtype)
            if HAS_Z:
                z = tl.load(Z + x_at, mask, 0.0).to(bias.dtype)
                dy *= z * sigmoid(z)
            inner = decay * (dy[:, :, None] * c[:, None, :])
        else:
            inner = (d * u)[:, :, None] * b[:, None, :]
        _, h = scan_tile(decay, inner, h, STEPS, REVERSE)
        total += tl.sum(d, 0)
    at = (image * splits + split) * groups * rows * N + state_at
    tl.store(ENDS + at, h, state_live)
    tl.store(DECAYS + at, tl.exp(total[:, None] * a), state_live)


@triton_jit
def _scan_carry(
    ENDS,
    DECAYS,
    INIT,
    groups,
    size,
    splits,
    TURNED: tl.constexpr,
    ADJOINT: tl.constexpr,
    HAS_INIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(1) // groups).to(tl.int64)
    g = tl.program_id(1) % groups
    reverse = ((g >= 2) & TURNED) != ADJOINT
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    at += g * size
    h = tl.zeros([BLOCK], ENDS.dtype.element_ty)
    if HAS_INIT:
        h = tl.load(INIT + image * groups * size + at, live, 0.0)
    for i in range(splits):
        split = tl.where(reverse, splits - 1 - i, i)
        place = (image * splits + split) * groups * size + at
        end = tl.load(ENDS + place, live, 0.0)
        decay = tl.load(DECAYS + place, live, 0.0)
        tl.store(ENDS + place, h, live)
        h = decay * h + end


@triton_jit
def _scan_backward(
    U,
    STEP,
    B,
    C,
    W,
    BIAS,
    A,
    SKIP,
    Z,
    DY,
    STARTS,
    BORDERS,
    SCRATCH,
    DU,
    DSTEP,
    DB,
    DC,
    DZ,
    DW,
    DBIAS,
    DA,
    DSKIP,
    groups,
    rows,
    length,
    height,
    width,
    batch,
    slots,
    splits,
    each,
    segments,
    N: tl.constexpr,
    R: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMN: tl.constexpr,
    BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    NP: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    SEGMENT_STEPS: tl.constexpr,
):
    slot = tl.program_id(0)
    split = tl.program_id(1)
    lanes = 2 if PIXELS else groups
    image = (tl.program_id(2) // lanes).to(tl.int64)
    pair = tl.program_id(2) % lanes
    column = (pair == 1) & COLUMN
    n = tl.arange(0, NP)
    rank = tl.arange(0, RP)
    state = groups * rows * N
    first = split * each
    count = tl.minimum(segments - first, each)
    part = image * splits + split
    program = ((tl.program_id(2) * splits + split) * slots + slot).to(tl.int64)
    scratch = SCRATCH + program * ((SEGMENT_STEPS // STEPS) * BLOCK * NP)
    scratch += tl.arange(0, BLOCK)[:, None] * NP + n[None, :]
    if PIXELS:
        slot_at = slot.to(tl.int64) * batch * length * groups * (R + 2 * N)
    else:
        slot_at = slot.to(tl.int64) * batch * length * groups * N
    for block in range(slot, tl.cdiv(rows, BLOCK), slots):
        row = block * BLOCK + tl.arange(0, BLOCK)
        row_live = row < rows
        state_live = row_live[:, None] & (n < N)[None, :]
        for direction in tl.static_range(DIRECTIONS):
            g = pair + 2 * direction
            channel = g * rows + row
            state_at = channel[:, None] * N + n[None, :]
            a = tl.load(A + state_at, state_live, 0.0)
            bias = tl.load(BIAS + channel, row_live, 0.0)
            skip = tl.load(SKIP + channel, row_live, 0.0)
            w = bias
            dw = bias
            if PIXELS:
                w_at = channel[None, :] * R + rank[:, None]
                w_live = row_live[None, :] & (rank < R)[:, None]
                w = tl.load(W + w_at, w_live, 0.0)
                dw = tl.zeros_like(w)
            da = tl.zeros_like(a)
            dbias = tl.zeros_like(bias)
            dskip = tl.zeros_like(bias)
            carry = tl.load(STARTS + part * state + state_at, state_live, 0.0)
            for i in range(count):
                segment = first + (i if BACK and direction == 1 else (count - 1 - i))
                tiles = tl.cdiv(tl.minimum(length - segment * SEGMENT_STEPS, SEGMENT_STEPS), STEPS)
                # the first state of each tile of the segment
                h = tl.load(BORDERS + (image * segments + segment) * state + state_at, state_live, 0.0)
                for j in range(tiles - 1):
                    tile = (tiles - 1 - j) if BACK and direction == 1 else j
                    tl.store(scratch + tile * (BLOCK * NP), h)
                    q = segment * SEGMENT_STEPS + tile * STEPS + tl.arange(0, STEPS)
                    live = q < length
                    x_at, p_at = _places(image, g, q, row, n, column, groups, rows, length, height, width, N, R, PIXELS)
                    u, _, _, d, b, _ = _tile(
                        U, STEP, B, C, w, bias, x_at, p_at, live, row_live, n, length, N, R, PIXELS, RP, SOFTPLUS
                    )
                    inner = (d * u)[:, :, None] * b[:, None, :]
                    _, h = scan_tile(tl.exp(d[:, :, None] * a[None]), inner, h, STEPS, BACK and direction == 1)
                tl.store(scratch + (0 if BACK and direction == 1 else (tiles - 1)) * (BLOCK * NP), h)
                tl.debug_barrier()
                for j in range(tiles):
                    tile = j if BACK and direction == 1 else (tiles - 1 - j)
                    h = tl.load(scratch + tile * (BLOCK * NP))
                    q = segment * SEGMENT_STEPS + tile * STEPS + tl.arange(0, STEPS)
                    live = q < length
                    mask = live[:, None] & row_live[None, :]
                    x_at, p_at = _places(image, g, q, row, n, column, groups, rows, length, height, width, N, R, PIXELS)
                    u, r, raw, d, b, c = _tile(
                        U, STEP, B, C, w, bias, x_at, p_at, live, row_live, n, length, N, R, PIXELS, RP, SOFTPLUS
                    )
                    dy = tl.load(DY + x_at, mask, 0.0).to(bias.dtype)
                    decay = tl.exp(d[:, :, None] * a[None])
                    inner = (d * u)[:, :, None] * b[:, None, :]
                    states, previous, _ = scan_tile_with_previous(decay, inner, h, STEPS, BACK and direction == 1)
                    if HAS_Z:
                        z = tl.load(Z + x_at, mask, 0.0).to(bias.dtype)
                        gate = sigmoid(z)
                        y = tl.sum(states * c[:, None, :], 2) + skip[None, :] * u
                        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                        tl.store(DZ + x_at, dz.to(DZ.dtype.element_ty), mask)
                        dy *= z * gate
                    dc = tl.sum(states * dy[:, :, None], 1)
                    direct = dy[:, :, None] * c[:, None, :]
                    carries, after, carry = scan_tile_with_previous(
                        decay, decay * direct, carry, STEPS, not (BACK and direction == 1)
                    )
                    grad = direct + after
                    db = tl.sum(grad * (d * u)[:, :, None], 1)
                    dv = tl.sum(grad * b[:, None, :], 2)
                    through = carries * previous  # gradient of d A
                    da += tl.sum(through * d[:, :, None], 0)
                    draw = dv * u + tl.sum(through * a[None], 2)
                    if SOFTPLUS:
                        draw *= softplus_slope(raw)
                    draw = tl.where(mask, draw, 0.0)
                    dskip += tl.sum(dy * u, 0)
                    dbias += tl.sum(draw, 0)
                    du = dv * d + skip[None, :] * dy
                    n_mask = live[:, None] & (n < N)[None, :]
                    if PIXELS:
                        dw += tl.dot(tl.trans(r), draw, input_precision="ieee", out_dtype=bias.dtype)
                        dr = tl.dot(draw, tl.trans(w), input_precision="ieee", out_dtype=bias.dtype)
                        r_at = slot_at + p_at[:, None] + rank[None, :]
                        r_mask = live[:, None] & (rank < R)[None, :]
                        b_at = slot_at + p_at[:, None] + R + n[None, :]
                        c_at = b_at + N
                        du_at = x_at + pair.to(tl.int64) * batch * length * rows
                        if direction == 1:
                            du += tl.load(DU + du_at, mask, 0.0)
                        tl.store(DU + du_at, du, mask)
                        if block > slot:  # sums over the rows that this program has had before
                            dr += tl.load(DSTEP + r_at, r_mask, 0.0)
                        tl.store(DSTEP + r_at, dr, r_mask)
                    else:
                        b_at = slot_at + p_at[:, None] + n[None, :] * length
                        c_at = b_at
                        tl.store(DU + x_at, du.to(DU.dtype.element_ty), mask)
                        tl.store(DSTEP + x_at, draw.to(DSTEP.dtype.element_ty), mask)
                    if block > slot:
                        db += tl.load(DB + b_at, n_mask, 0.0)
                        dc += tl.load(DC + c_at, n_mask, 0.0)
                    tl.store(DB + b_at, db, n_mask)
                    tl.store(DC + c_at, dc, n_mask)
                tl.debug_barrier()
            tl.store(DA + part * state + state_at, da, state_live)
            tl.store(DBIAS + part * (groups * rows) + channel, dbias, row_live)
            tl.store(DSKIP + part * (groups * rows) + channel, dskip, row_live)
            if PIXELS:
                tl.store(DW + part * (groups * rows * R) + w_at, dw, w_live)
