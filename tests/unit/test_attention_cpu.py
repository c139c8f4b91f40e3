"""The CPU kernels against `reference` in float64: values and gradients, padding, extremes, threads."""

import platform

import attention_cases
import pytest
import torch
from attention_cases import random, random_mask, run
from hypothesis import given, settings
from hypothesis import strategies as st

import sat.attention as attention
from sat import backends, benchmark
from sat.attention import kernels, selection

pytestmark = pytest.mark.usefixtures("kernels_dir")


ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(params=["neon"] if ARM else ["baseline", "avx2", "avx512"])
def instruction_set(request, kernels_dir):
    """Every instruction set of the library that this machine has."""
    library = kernels.load_library("cpu")
    if library.sat_use_instruction_set(request.param.encode()) != 0:
        pytest.skip(f"no {request.param} here")
    yield request.param
    library.sat_use_instruction_set(None)


def check(call, inputs, **options):
    attention_cases.check(call, "cpu", inputs, **options)


def sparse(mask, block_size, **options):
    return lambda backend, q, k, v: attention.block_sparse_attention(
        q, k, v, mask, block_size=block_size, return_lse=True, backend=backend, **options
    )


def dense(**options):
    return lambda backend, q, k, v: attention.dense_attention(
        q, k, v, return_map=True, backend=backend, **options
    )


@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
@pytest.mark.parametrize("width", [8, 32, 40, 64])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_block_sparse(instruction_set, block_size, width, denominator):
    length = 4 * block_size
    lengths = torch.tensor([length, length // 2 + 5, 1, 0])
    function = sparse(random_mask(4), block_size, lengths=lengths, denominator=denominator)
    check(function, random((4, 2, length, width)))


@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
@pytest.mark.parametrize("kind", ["none", "one", "all"])
def test_extreme_masks(kind, denominator):
    check(sparse(random_mask(3, kind), 32, denominator=denominator), random((1, 1, 96, 32)))


@pytest.mark.parametrize("padded_queries", ["zero", "attend"])
@pytest.mark.parametrize("shape", [(4, 2, 64, 32), (4, 1, 37, 8), (4, 2, 130, 64)])
def test_dense_with_map(instruction_set, shape, padded_queries):
    lengths = torch.tensor([shape[2], shape[2] // 2 + 3, 1, 0])
    check(dense(lengths=lengths, padded_queries=padded_queries), random(shape))


@pytest.mark.parametrize("scale", [30.0, 1e4])
@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
def test_large_scores_stay_finite(instruction_set, denominator, scale):
    inputs = random((2, 1, 64, 32), scale=scale)
    # The scale is folded into q, one rounding more of scores whose roundings count.
    check(sparse(random_mask(2, "all"), 32, denominator=denominator), inputs, factor=3)
    mask = torch.eye(4, dtype=torch.bool)
    check(sparse(mask, 16, denominator=denominator), inputs, factor=3)
    check(dense(), inputs, factor=3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
def test_all_scores_of_a_row_at_one_end(denominator, sign):
    q, k, v, d_o = random((1, 1, 64, 32))
    q, k = sign * 100 * q.abs(), 10 * k.abs()  # every score is far above or far below 0
    assert (q @ k.mT / 32**0.5).abs().min() > 1e3
    function = sparse(torch.eye(2, dtype=torch.bool), 32, denominator=denominator)
    check(function, [q, k, v, d_o], factor=3)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([16, 32, 64]),
    st.integers(1, 4),
    st.sampled_from([8, 16, 24, 32, 64]),
    st.integers(0, 2**16 - 1),
    st.data(),
)
def test_any_shape_and_mask(batch, heads, block_size, num_blocks, width, bits, data):
    length = num_blocks * block_size
    mask = torch.tensor(
        [[bool(bits >> (4 * i + j) & 1) for j in range(num_blocks)] for i in range(num_blocks)]
    )
    lengths = torch.tensor([data.draw(st.integers(0, length)) for _ in range(batch)])
    dropout_p = data.draw(st.sampled_from([0.0, 0.1, 0.5]))

    def call(backend, q, k, v):
        torch.manual_seed(bits)  # the seed of the dropout is drawn from it
        attend = sparse(mask, block_size, lengths=lengths, dropout_p=dropout_p)
        return attend(backend, q, k, v)

    check(call, random((batch, heads, length, width), seed=bits))


def test_views_into_a_packed_qkv():
    packed = torch.randn(2, 64, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    copies = [x.contiguous() for x in views]
    mask = random_mask(4)
    for call in (sparse(mask, 16), dense()):
        for first, second in zip(call("cpu", *views), call("cpu", *copies), strict=True):
            assert torch.equal(first, second)


def test_gradients_reach_a_packed_qkv():
    packed = torch.randn(2, 64, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for backend in ("reference", "cpu"):
        leaf = packed.clone().requires_grad_()
        q, k, v = (x.transpose(1, 2) for x in leaf.unbind(2))
        o = attention.block_sparse_attention(
            q, k, v, random_mask(2), block_size=32, backend=backend
        )
        # sum() gives an expanded gradient, whose strides are 0
        gradients.append(torch.autograd.grad(o.sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("call", "returned"),
    [(sparse(torch.ones(128, 128, dtype=torch.bool), 32), 0), (dense(), 4 * 4096**2)],
    ids=["sparse", "dense"],
)
def test_nothing_of_the_size_of_the_scores_is_held(call, returned):
    *qkv, d_o = random((1, 2, 4096, 32))
    leaves = [x.requires_grad_() for x in qkv]

    def forward_and_backward():
        return torch.autograd.grad(call("cpu", *leaves)[0], leaves, d_o)

    forward_and_backward()  # loads what stays
    extra = benchmark.extra_bytes(forward_and_backward)
    if extra is None:
        pytest.skip("the most memory that a call holds is known on Linux only")
    # Output, gradients and the map, if any; the scores would be 64 MiB a head.
    assert extra < 4 * d_o.nbytes + returned + 2**23


def test_odd_strides():
    big = torch.randn(3, 4, 80, 96, generator=torch.Generator().manual_seed(0))
    q, k = big[1:, ::2, 3:67, 5:37], big[:2, 1::2, 16:, 64:]
    v = big[1:, :2, :64, ::3]  # the last dimension is not contiguous
    mask = random_mask(4)
    o = sparse(mask, 16)("cpu", q, k, v)[0]
    assert torch.equal(o, sparse(mask, 16)("cpu", *(x.contiguous() for x in (q, k, v)))[0])


def test_the_number_of_threads_changes_no_bit(instruction_set):
    inputs = random((2, 2, 128, 32))
    lengths = torch.tensor([128, 70])
    functions = [sparse(random_mask(4), 32, lengths=lengths), dense(lengths=lengths)]
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 7):  # 7 > batch * heads: the backward in two passes
            torch.set_num_threads(num_threads)
            results.append([run(f, "cpu", torch.float32, inputs) for f in functions])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(sum(results[0], []), sum(other, []), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_in_nan_out(instruction_set, which):
    inputs = random((1, 1, 64, 32))
    inputs[which][0, 0, 40, 3] = float("nan")
    mask = torch.eye(2, dtype=torch.bool)
    o = sparse(mask, 32)("cpu", *inputs[:3])[0]
    dense = attention.dense_attention(*inputs[:3], backend="cpu")
    assert not o[:, :, :32].isnan().any()  # rows that do not see it
    if which == 0:
        assert o[0, 0, 40].isnan().all() and dense[0, 0, 40].isnan().all()
    elif which == 1:
        assert o[0, 0, 32:].isnan().all() and dense.isnan().all()
    else:
        assert o[0, 0, 32:, 3].isnan().all() and dense[..., 3].isnan().all()
    gradients = run(sparse(mask, 32), "cpu", torch.float32, inputs)[2:]
    assert all(x.isnan().any() for x in gradients[:2])


def test_nan_in_padding_is_not_read():
    inputs = random((1, 1, 64, 32))
    for x in inputs:
        x[:, :, 40:] = float("nan")
    for backend in ("reference", "cpu"):
        function = sparse(random_mask(2, "all"), 32, lengths=torch.tensor([40]))
        o, lse, *gradients = run(
            function, backend, torch.float32, [*inputs[:3], torch.ones(inputs[0].shape)]
        )
        assert all(torch.isfinite(x).all() for x in (o, lse[..., :40], *gradients))
        assert not any(x[:, :, 40:].any() for x in (o, *gradients))


@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_dropout(instruction_set, kind, dropout_p):
    """Values, gradients and map for the factors that `reference` draws, in padded sequences too."""
    lengths = torch.tensor([128, 77])

    def function(backend, q, k, v):
        torch.manual_seed(11)
        options = {"lengths": lengths, "dropout_p": dropout_p}
        call = sparse(random_mask(4), 32, **options) if kind == "sparse" else dense(**options)
        return call(backend, q, k, v)

    check(function, random((2, 2, 128, 32)))
    check(function, random((2, 2, 128, 8), scale=100.0))


def test_dropout_has_the_same_bits_for_any_number_of_threads(instruction_set):
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3, 7):
            torch.set_num_threads(num_threads)
            torch.manual_seed(2)
            function = sparse(random_mask(4), 32, dropout_p=0.3)
            results.append(run(function, "cpu", torch.float32, random((2, 2, 128, 32))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_layer_gives_the_same_numbers(kernels_dir, compiler):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.mask = torch.nn.Linear(16, 48), random_mask(2)

        def forward(self, x, lengths):
            q, k, v = self.qkv(x).view(2, 64, 3, 2, 8).permute(2, 0, 3, 1, 4)
            o = attention.block_sparse_attention(q, k, v, self.mask, block_size=32, lengths=lengths)
            p, mean_map = attention.dense_attention(q, k, v, lengths=lengths, return_map=True)
            return o + p, mean_map

    torch.manual_seed(0)
    layer, x, lengths = Layer(), torch.randn(2, 64, 16), torch.tensor([64, 50])
    assert attention.selected_backend("cpu") == "cpu"
    results = []
    for function in (layer, torch.compile(layer, backend=compiler, fullgraph=True)):
        layer.zero_grad()
        o, mean_map = function(x, lengths)
        o.square().sum().backward()
        results.append([o.detach(), mean_map, layer.qkv.weight.grad.clone()])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_second_derivative_is_refused():
    q, k, v, _ = random((1, 1, 32, 8))
    q.requires_grad_()
    o = attention.dense_attention(q, k, v, backend="cpu")
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_half_precision_is_not_for_the_cpu_library():
    q, k, v, _ = random((1, 1, 32, 8))
    with pytest.raises(RuntimeError, match="not supported"):
        kernels.dense(q.half(), k.half(), v.half(), None, None, None, 0.0, False)


def test_operators_pass_opcheck():
    q, k, v, _ = random((1, 2, 64, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    lengths = torch.tensor([50], dtype=torch.int32)
    for seed, dropout_p in ((None, 0.0), (torch.tensor(3), 0.2)):
        sparse_options = lengths, seed, 16, "zero_logits", dropout_p
        torch.library.opcheck(
            kernels.block_sparse_operator, (*leaves, random_mask(4), *sparse_options)
        )
        torch.library.opcheck(
            kernels.dense_operator, (*leaves, lengths, None, seed, dropout_p, True)
        )


def test_auto_takes_the_kernels_and_the_table_says_so(kernels_dir, capsys):
    assert selection._choose.__wrapped__("cpu") == ("cpu", "reference")
    assert selection.largest_error("cpu") < 4e-6
    backends.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["backend", "available", "correct", "speed"]
    assert any(line.startswith("cpu") and "yes" in line for line in lines)
