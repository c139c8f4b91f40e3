"""The parts of a layer around attention: kernels against plain PyTorch in float64, dropout, threads, NaN."""

import platform

import pytest
import torch

from sat import layer, transition
from sat.attention import dropout, kernels

pytestmark = pytest.mark.usefixtures("kernels_dir")

ARM = platform.machine() in ("aarch64", "arm64")
SHAPES = [(3, 50, 64), (2, 33, 8), (1, 7, 24), (1, 1, 128)]
LENGTH = 64


@pytest.fixture(params=["neon"] if ARM else ["baseline", "avx2", "avx512"])
def instruction_set(request, kernels_dir):
    """Every instruction set of the library that this machine has."""
    library = kernels.load_library("cpu")
    if library.sat_use_instruction_set(request.param.encode()) != 0:
        pytest.skip(f"no {request.param} here")
    yield request.param
    library.sat_use_instruction_set(None)


def numbers(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 2 for shape in shapes]


def plain(name, inputs, p, seed):
    if name == "gelu":
        return layer.plain_gelu_dropout(*inputs, p, seed, LENGTH)
    if name == "embed":
        y, y_bias, weight, bias = inputs
        return layer.plain_add_norm(y, y_bias, None, weight, bias, p, seed, LENGTH)
    return layer.plain_add_norm(*inputs, p, seed, LENGTH)


def fused(name, inputs, p, seed):
    function = {
        "gelu": layer.gelu_dropout,
        "embed": layer.embed,
        "norm": layer.dropout_add_norm,
    }[name]
    return function(*inputs, p, seed, LENGTH)


def inputs_of(name, shape, seed=0):
    B, S, D = shape
    shapes = {
        "gelu": [shape, (D,)],
        "embed": [shape, (S, D), (D,), (D,)],
        "norm": [shape, (D,), shape, (D,), (D,)],
    }[name]
    return numbers(*shapes, seed=seed)


def values_and_gradients(function, name, inputs, p, seed, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(name, leaves, p, seed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    d_outputs = numbers(*[x.shape for x in outputs], seed=9)
    gradients = torch.autograd.grad(outputs, leaves, [d.to(dtype) for d in d_outputs])
    return [x.detach() for x in (*outputs, *gradients)]


def errors(name, shape, p, seed):
    """(largest error of the kernels, of plain PyTorch) against float64, by the largest value, of each result."""
    inputs = inputs_of(name, shape)
    exact = values_and_gradients(plain, name, inputs, p, seed, torch.float64)
    for function in (fused, plain):
        results = values_and_gradients(function, name, inputs, p, seed, torch.float32)
        yield [
            float((x - y).abs().max() / y.abs().max()) for x, y in zip(results, exact, strict=True)
        ]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gelu", "embed", "norm"])
def test_values_and_gradients(instruction_set, name, shape, p):
    ours, torchs = errors(name, shape, p, torch.tensor(7) if p else None)
    for our, their in zip(ours, torchs, strict=True):
        assert our <= max(2 * their, 1e-6)


def test_gelu_is_as_exact_as_plain_pytorch(instruction_set):
    x = torch.linspace(-12, 12, 8 * 20_001).view(1, -1, 8)
    zero = torch.zeros(8)
    exact = torch.nn.functional.gelu(x.double())
    theirs = (torch.nn.functional.gelu(x) - exact).abs().max()
    ours = (layer.gelu_dropout(x, zero, 0.0, None, x.shape[1]) - exact).abs().max()
    assert ours <= 2 * theirs
    extreme = torch.tensor([0.0, -0.0, 1e30, -1e30, 40.0, -40.0, 1e-30, -1e-30]).view(1, 1, 8)
    got = layer.gelu_dropout(extreme, zero, 0.0, None, 1)
    torch.testing.assert_close(got, torch.nn.functional.gelu(extreme))


def test_the_number_of_threads_changes_no_bit(instruction_set):
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(
                [
                    x
                    for name in ("gelu", "embed", "norm")
                    for x in values_and_gradients(
                        fused,
                        name,
                        inputs_of(name, (9, 50, 64)),
                        0.1,
                        torch.tensor(3),
                        torch.float32,
                    )
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_drops_the_same_wherever_its_batch_is_cut():
    inputs = inputs_of("norm", (4, 20, 16))
    torch.manual_seed(0)
    seed = dropout.draw_seed(0)
    whole = fused("norm", inputs, 0.5, dropout.seed_of(seed, 2, LENGTH))[0]
    with dropout.sequences_from(3):
        part = [x[3:] if x.dim() == 3 else x for x in inputs]
        last = fused("norm", part, 0.5, dropout.seed_of(seed, 2, LENGTH))[0]
    assert torch.equal(last, whole[3:])
    shorter = [x[:, :10] if x.dim() == 3 else x for x in inputs]
    cut = fused("norm", shorter, 0.5, dropout.seed_of(seed, 2, LENGTH))[0]
    assert torch.equal(cut, whole[:, :10])


def test_the_share_that_is_dropped():
    ones = torch.ones(4, 500, 64)
    zero = torch.zeros(64)
    x, _ = layer.dropout_add_norm(ones, zero, ones * 0, zero, zero, 0.25, torch.tensor(1), 500)
    assert float((x == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(x.max()) == pytest.approx(1 / 0.75)


def test_nan_in_nan_out(instruction_set):
    for name in ("gelu", "embed", "norm"):
        inputs = inputs_of(name, (1, 4, 16))
        inputs[0][0, 2, 5] = float("nan")
        outputs = fused(name, inputs, 0.0, None)
        out = outputs if name == "gelu" else outputs[1]
        assert out[0, 2, 5].isnan() and not out[0, [0, 1, 3]].isnan().any()


def test_only_one_of_two_outputs_used():
    inputs = inputs_of("norm", (1, 8, 16))
    for which in (0, 1):
        results = []
        for function in (fused, plain):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = function("norm", leaves, 0.0, None)[which]
            results.append(
                torch.autograd.grad(out.square().sum(), leaves[:3], materialize_grads=True)
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_half_precision_and_other_widths_are_plain_pytorch():
    inputs = [x.bfloat16() for x in inputs_of("norm", (1, 8, 16))]
    assert fused("norm", inputs, 0.1, torch.tensor(1))[0].dtype == torch.bfloat16
    inputs = inputs_of("norm", (1, 8, 12))
    expected = plain("norm", inputs, 0.1, torch.tensor(1))[0]
    assert torch.equal(fused("norm", inputs, 0.1, torch.tensor(1))[0], expected)


def test_operators_pass_opcheck():
    for p, seed in ((0.0, None), (0.2, torch.tensor(3))):
        leaves = [x.requires_grad_() for x in inputs_of("norm", (2, 9, 8))]
        torch.library.opcheck(layer.norm_operator, (*leaves, seed, p, LENGTH))
        leaves = [x.requires_grad_() for x in inputs_of("gelu", (2, 9, 8))]
        torch.library.opcheck(layer.gelu_operator, (*leaves, seed, p, LENGTH))


@pytest.mark.parametrize("size", [None, 45, 0])
def test_statistics_of_a_map(instruction_set, size, monkeypatch):
    a, other = (x.softmax(dim=1) for x in numbers((67, 67), (67, 67)))
    ours = transition.moments(a, other, size)
    monkeypatch.setattr(layer, "map_sums", lambda *_: None)
    for one, two in zip(ours, transition.moments(a, other, size), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=0, equal_nan=True)


def test_statistics_that_are_not_numbers(instruction_set):
    a = torch.full((40, 40), 1 / 40)
    assert all(x.isnan() for x in transition.moments(a))
    a[3, 4] = float("nan")
    assert all(x.isnan() for x in transition.moments(a, torch.zeros(40, 40)))
