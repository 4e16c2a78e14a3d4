"""The kernels of the scans against their definitions, wherever tiles, blocks, segments and parts end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import test_channel_scan as channel_case
from tests.kernels import test_scan2d as map_case
from tests.kernels import test_selective_scan as sequence_case
from zoo.kernels import channel_scan as channel_module
from zoo.kernels import scan_tiles, use_backend
from zoo.kernels.channel_scan import channel_scan
from zoo.kernels.scan2d import reference as scan2d_reference
from zoo.kernels.scan2d import scan2d
from zoo.kernels.selective_scan import reference, selective_scan

CASES = {
    "selective_scan": (sequence_case, reference, selective_scan),
    "scan2d": (map_case, scan2d_reference, scan2d),
    "channel_scan": (channel_case, channel_module.reference, channel_scan),
}


@pytest.fixture
def tiny(monkeypatch):
    """Segments of two tiles, and as many programs as there can be: parts, slots, borders in small inputs."""
    monkeypatch.setattr(scan_tiles, "SEGMENT", 32)

    def programs(count):
        monkeypatch.setattr(scan_tiles, "PROGRAMS", count)
        monkeypatch.setattr(channel_module, "PROGRAMS", count)

    return programs


def moved(tensors, device):
    if isinstance(tensors, dict):
        return {n: t if t is None else t.to(device) for n, t in tensors.items()}
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def assert_equal(kind, tensors, precise, **options):
    case, definition, operator = CASES[kind]
    expected = case.gradients(definition, tensors, **options)
    for name, value in case.gradients(operator, tensors, **options).items():
        largest = float(expected[name].detach().abs().max()) if expected[name].numel() else 0.0
        bar = (1e-10 if precise == torch.float64 else 1e-4) * max(1.0, largest)
        torch.testing.assert_close(value, expected[name], rtol=0, atol=bar, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("shape", "programs"),
    [
        ((1, 2, 1, 3, 1), 512),  # one step
        ((2, 40, 2, 5, 37), 1),  # two blocks of rows in one slot, three tiles in one part
        ((1, 34, 1, 16, 40), 10**6),  # three blocks in three slots, two parts
        ((1, 3, 3, 64, 17), 512),  # four rows a block
    ],
)
def test_sequences(shape, programs, tiny, device, precise):
    tiny(programs)
    assert_equal(
        "selective_scan", moved(sequence_case.arguments(*shape, dtype=precise), device), precise, softplus=True
    )


@pytest.mark.parametrize("absent", [("D", "z"), ("dt_bias",)])
def test_optional_parts_and_step_sizes_as_they_are(absent, device, precise):
    tensors = sequence_case.arguments(1, 4, 2, 3, 20, dtype=precise, **dict.fromkeys(absent))
    tensors["dt"] = tensors["dt"].abs() + 3
    assert_equal("selective_scan", moved(tensors, device), precise, softplus=False)


@given(
    b=st.integers(0, 2),
    rows=st.integers(1, 18),
    groups=st.integers(1, 2),
    states=st.integers(1, 16),
    length=st.integers(1, 40),
    strided=st.booleans(),
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_any_sequence(b, rows, groups, states, length, strided):
    device, precise = ("cuda", torch.float32) if torch.cuda.is_available() else ("cpu", torch.float64)
    tensors = moved(sequence_case.arguments(b, rows * groups, groups, states, length, dtype=precise), device)
    if strided:
        tensors = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in tensors.items()}
    with use_backend("triton"):
        assert_equal("selective_scan", tensors, precise, softplus=True)


@pytest.mark.parametrize(
    ("size", "dim", "rank", "states", "mode", "programs"),
    [
        ((1, 1), 3, 1, 2, "cross", 512),
        ((5, 7), 20, 3, 5, "cross", 1),
        ((9, 4), 18, 17, 4, "cross", 10**6),
        ((3, 7), 4, 2, 4, "bidirectional", 512),
        ((3, 7), 4, 2, 4, "unidirectional", 10**6),
    ],
)
def test_maps(size, dim, rank, states, mode, programs, tiny, device, precise):
    tiny(programs)
    tensors = map_case.arguments(*size, 1, dim, rank, states, dtype=precise)
    assert_equal("scan2d", moved(tensors, device), precise, mode=mode)


def test_a_batch_of_maps_in_another_layout_and_an_empty_one(device, precise):
    x, *weights = moved(map_case.arguments(3, 4, 2, dtype=precise), device)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(scan2d(strided, *weights), scan2d(x, *weights), rtol=0, atol=0)
    empty = x[:0].requires_grad_()
    scan2d(empty, *weights).sum().backward()
    assert empty.grad.shape == (0, 3, 4, 6)


@pytest.mark.parametrize(
    ("pixels", "width", "expand", "taps", "programs"),
    [((1,), 1, 1, 1, 512), ((2, 19), 18, 3, 3, 1), ((35,), 6, 2, 5, 512), ((3,), 2, 2, 7, 512), ((0,), 4, 2, 3, 512)],
)
def test_channels(pixels, width, expand, taps, programs, tiny, device, precise):
    tiny(programs)
    tensors = channel_case.arguments(pixels, width, expand, 4, taps, dtype=precise)
    assert_equal("channel_scan", moved(tensors, device), precise)


def small(kind, dtype):
    if kind == "selective_scan":
        return list(sequence_case.arguments(1, 6, 1, 4, 40, dtype=dtype).values())
    if kind == "scan2d":
        return map_case.arguments(4, 5, 1, dtype=dtype)
    return channel_case.arguments((5,), 20, 2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CASES)
def test_half_precision_is_as_good_as_plain_torch(kind, dtype, device):
    """The error is that of plain torch, which computes in float32, but for the last bit of the result."""
    torch.manual_seed(0)
    tensors = moved(small(kind, dtype), device)
    _, definition, operator = CASES[kind]
    options = {"softplus": True} if kind == "selective_scan" else {}
    exact = definition(*(t.double() if isinstance(t, torch.Tensor) else t for t in tensors), **options)
    got = operator(*tensors, **options)
    with use_backend("torch"):
        plain = operator(*tensors, **options)
    assert got.dtype == plain.dtype == dtype
    error, allowed = ((y.double() - exact).abs().max() for y in (got, plain))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", CASES)
def test_gradients_are_the_same_bits_in_every_run(kind, tiny, device):
    tiny(4)
    case, _, operator = CASES[kind]
    torch.manual_seed(0)
    tensors = moved(small(kind, torch.float32), device)
    if kind == "selective_scan":
        tensors = dict(zip(sequence_case.arguments(1, 2, 1, 2, 2), tensors))
    options = {"softplus": True} if kind == "selective_scan" else {}
    first, second = (case.gradients(operator, tensors, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_that_underflow_or_pass_the_threshold(device, precise):
    tensors = moved(sequence_case.arguments(1, 4, 1, 8, 30, dtype=precise), device)
    tensors["dt"] = tensors["dt"] * 60
    assert_equal("selective_scan", tensors, precise, softplus=True)


@pytest.mark.parametrize("kind", CASES)
def test_operators_pass_torchs_checks(kind, device):
    tensors = [
        t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in moved(small(kind, torch.float32), device)
    ]
    options = {"selective_scan": [True], "scan2d": ["cross"], "channel_scan": []}[kind]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.zoo, kind + "_triton"), [*tensors, *options], test_utils=tests)


def test_a_mixer_compiles_without_graph_breaks(device):
    from zoo.vim2_blocks import MixerBlock, TokenMixer

    mixer = MixerBlock(4, TokenMixer(4, d_state=2), True).to(device)
    x = torch.randn(1, 3, 4, 4, device=device)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    with use_backend("torch"):
        torch.testing.assert_close(mixer(x), compiled(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("states", "rank", "message"), [(17, 2, "17 states"), (4, 129, "rank 129")])
def test_what_the_kernels_cannot_do_is_said(states, rank, message, device):
    with pytest.raises(ValueError, match=message):
        scan2d(*moved(map_case.arguments(2, 2, 1, 3, rank, states, dtype=torch.float32), device))
