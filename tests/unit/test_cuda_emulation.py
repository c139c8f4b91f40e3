"""The CUDA kernels on the CPU: csrc/cuda as plain C++ over tests/emulation, against `reference`.

The emulated library stands in for that of the CPU, so the same operators call it. Every case runs
with the threads in forward and in reversed order, and on a GPU where there is one:

    snakemake --cores 2 kernels && python -m pytest tests/unit/test_cuda_emulation.py -k gpu
"""

import ctypes
import math

import pytest
import torch
from attention_cases import check, random, random_mask, run
from cuda_emulation import SOURCE, compile_emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.attention import kernels, selection

ORDERS = ("forward", "reversed")
BACKENDS = {"forward": "cpu", "reversed": "cpu", "gpu": "cuda"}  # what the library stands in for


class Emulated:
    """The emulated library with the calls of the CPU's: those bring no scratch for delta."""

    def __init__(self, library):
        self.library = library
        for name, arguments in kernels._SIGNATURES.items():
            getattr(library, name).argtypes = arguments

    def __getattr__(self, name):
        function = getattr(self.library, name)
        if not name.endswith("_backward"):
            return function

        def with_scratch(problem, *arguments):
            batch, heads, length, *_ = kernels._PROBLEM.unpack(problem)
            scratch = (ctypes.c_float * (batch * heads * length))()
            assert arguments[-2] is None
            return function(problem, *arguments[:-2], ctypes.addressof(scratch), arguments[-1])

        return with_scratch


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "libsat_cuda_emulated.so"
    compile_emulated([SOURCE], path, "-shared", "-fPIC", "-fvisibility=hidden")
    return Emulated(ctypes.CDLL(str(path)))


@pytest.fixture(autouse=True, scope="module")
def emulated(library):
    real = kernels.load_library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "load_library", lambda name: library if name == "cpu" else real(name)
        )
        yield


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The backend that runs the CUDA kernels: emulated in one of two orders, or on a GPU."""
    if request.param == "gpu" and (reason := selection.unavailable("cuda")):
        pytest.skip(reason)
    monkeypatch.setenv("SAT_EMULATION_ORDER", request.param)
    return BACKENDS[request.param]


def sparse(mask, block_size, lengths=None, denominator="zero_logits", dropout_p=0.0):
    def call(backend, q, k, v):
        torch.manual_seed(11)  # the seed of the dropout is drawn from it
        place = None if lengths is None else lengths.to(q.device)
        return selection.run_block_sparse(
            backend, q, k, v, mask.to(q.device), block_size, place, denominator, dropout_p
        )

    return call


def dense(lengths=None, padded_queries="zero", dropout_p=0.0):
    def call(backend, q, k, v):
        torch.manual_seed(11)
        place = None if lengths is None else lengths.to(q.device)
        return selection.run_dense(backend, q, k, v, place, padded_queries, True, dropout_p)

    return call


@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
@pytest.mark.parametrize("block_size", kernels.BLOCK_SIZES)
@pytest.mark.parametrize("width", [8, 32, 64])
def test_block_sparse(backend, width, block_size, denominator):
    length = 4 * block_size
    lengths = torch.tensor([length, length - block_size - 3, 0], dtype=torch.int32)
    call = sparse(random_mask(4), block_size, lengths, denominator)
    check(call, backend, random((3, 2, length, width)))


@pytest.mark.parametrize("width", [72, 128, 200, 256])
def test_wide_heads(backend, width):
    check(sparse(random_mask(3), 32), backend, random((1, 2, 96, width)))


@pytest.mark.parametrize("kind", ["none", "one", "all"])
def test_masks(backend, kind):
    lengths = torch.tensor([96, 1], dtype=torch.int32)
    check(sparse(random_mask(3, kind), 32, lengths), backend, random((2, 1, 96, 32)))


@pytest.mark.parametrize("padded_queries", ["zero", "attend"])
@pytest.mark.parametrize(("length", "width"), [(100, 32), (65, 64), (1, 8), (40, 136)])
def test_dense_with_the_map(backend, length, width, padded_queries):
    lengths = torch.tensor([length, length // 2, 0], dtype=torch.int32)
    check(dense(lengths, padded_queries), backend, random((3, 2, length, width)))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_is_that_of_the_reference(backend, dropout_p):
    check(sparse(random_mask(4), 32, dropout_p=dropout_p), backend, random((2, 2, 128, 32)))
    check(dense(dropout_p=dropout_p), backend, random((2, 2, 70, 32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_types(backend, dtype):
    check(sparse(random_mask(4), 32, dropout_p=0.1), backend, random((2, 2, 128, 64)), dtype)
    check(dense(), backend, random((2, 2, 70, 32)), dtype)


@pytest.mark.parametrize(
    ("length", "width", "block_size"), [(64, 32, 16), (128, 64, 32), (128, 40, 64), (64, 128, 32)]
)
def test_products_in_tf32(backend, monkeypatch, length, width, block_size):
    """On tensor cores: within TF32's error, and not in float32."""
    monkeypatch.setattr(kernels, "uses_tf32", lambda x: x.dtype == torch.float32)
    inputs = random((2, 2, length, width))
    lengths = torch.tensor([length, length - 19], dtype=torch.int32)
    call = sparse(random_mask(length // block_size), block_size, lengths, dropout_p=0.1)
    check(call, backend, inputs, factor=None, share=selection.TF32_TOLERANCE)
    check(dense(lengths), backend, inputs, factor=None, share=selection.TF32_TOLERANCE)
    with pytest.raises(AssertionError, match=" > "):
        check(call, backend, inputs, rounding=0)


def test_tf32_gives_the_bits_of_rounded_factors(monkeypatch):
    """Scores of small integers are exact in TF32, so that nothing but the weights is rounded."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randint(-2, 3, (1, 1, 64, 64), generator=generator).float() for _ in range(3))
    outputs = []
    for tf32 in (False, True):
        monkeypatch.setattr(kernels, "uses_tf32", lambda x, tf32=tf32: tf32)
        outputs.append(dense()("cpu", q, k, v))
    assert torch.equal(outputs[0][1], outputs[1][1])  # the map
    assert not torch.equal(outputs[0][0], outputs[1][0])


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
def test_scores_of_ten_thousand(backend, scale, denominator):
    inputs = random((1, 2, 128, 32), scale=scale)
    # Scores are scaled in another order than PyTorch's, one rounding more where roundings count.
    check(sparse(random_mask(4), 32, None, denominator), backend, inputs, factor=3)
    check(dense(), backend, inputs, factor=3)


@pytest.mark.parametrize("dtype", [torch.float32, *selection.HALF_TOLERANCES], ids=str)
def test_the_check_of_the_first_use_passes(monkeypatch, dtype):
    monkeypatch.setitem(selection.KERNELS, "cpu", selection.KERNELS["cuda"])
    tolerance = selection.HALF_TOLERANCES.get(dtype, selection.TOLERANCE)
    error = selection.largest_error("cpu", dtype)
    assert tolerance / 1000 < error < tolerance / 2


def test_odd_strides_and_views_into_packed_qkv(backend):
    """Rows that begin anywhere, and rows of 3 tensors in one: read as they lie."""
    d_o = random((2, 2, 64, 32))[3]
    packed = torch.randn(2, 64, 2, 3, 33, generator=torch.Generator().manual_seed(3))
    q, k, v = (packed[..., i, :32].transpose(1, 2) for i in range(3))
    assert q.stride() == (64 * 198, 99, 198, 1)
    check(sparse(random_mask(2), 32), backend, [q, k, v, d_o])


def test_the_orders_give_the_same_bits(monkeypatch):
    results = []
    for order in ORDERS:
        monkeypatch.setenv("SAT_EMULATION_ORDER", order)
        results.append(
            run(sparse(random_mask(4), 32), "cpu", torch.float32, random((2, 2, 128, 32)))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("which", range(3))
def test_nan_in_gives_nan_out(backend, which):
    q, k, v, _ = random((1, 1, 96, 32))
    (q, k, v)[which][0, 0, 40, 3] = math.nan
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    o, *_ = run(sparse(mask, 32), backend, torch.float32, [q, k, v, torch.ones_like(q)])
    expected = torch.zeros(96, dtype=torch.bool)
    if which == 0:
        expected[40] = True
    else:
        expected[32:] = True  # the rows that see key 40
    assert torch.equal(o[0, 0].isnan().any(-1), expected)


def test_nan_in_a_value_of_weight_zero(backend):
    """Scores of -10⁴ against zero logits: the weights are 0, and 0 times NaN is NaN."""
    q, k, v, d_o = random((1, 1, 64, 32))
    q, k = torch.full_like(q, 1e3), torch.full_like(k, -1e2)
    v[0, 0, 5, 2] = math.nan
    o, *_ = run(sparse(random_mask(2, "one"), 32), backend, torch.float32, [q, k, v, d_o])
    assert o[0, 0, 32:, 2].isnan().all() and not o[0, 0, :, 3].any()


def test_nan_in_padding_is_not_read(backend):
    inputs = random((1, 2, 64, 32))
    for x in inputs:
        x[:, :, 50:] = math.nan
    lengths = torch.tensor([50], dtype=torch.int32)
    for x in run(sparse(random_mask(2, "all"), 32, lengths), backend, torch.float32, inputs):
        assert not x.isnan().any()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    block_size = draw(st.sampled_from(kernels.BLOCK_SIZES), "block size")
    num_blocks = draw(st.integers(1, 4), "blocks")
    length, batch = block_size * num_blocks, draw(st.integers(1, 2), "batch")
    shape = (
        batch,
        draw(st.integers(1, 2), "heads"),
        length,
        8 * draw(st.integers(1, 9), "width / 8"),
    )
    mask = torch.tensor(
        draw(st.lists(st.booleans(), min_size=num_blocks**2, max_size=num_blocks**2), label="mask")
    ).reshape(num_blocks, num_blocks)
    lengths = [draw(st.integers(0, length), "length") for _ in range(batch)]
    denominator = draw(st.sampled_from(kernels.DENOMINATORS), "denominator")
    dropout_p = draw(st.sampled_from([0.0, 0.2]), "dropout")
    lengths = torch.tensor(lengths, dtype=torch.int32)
    check(sparse(mask, block_size, lengths, denominator, dropout_p), "cpu", random(shape))


def problem_of(**changes):
    values = {"batch": 1, "heads": 1, "length": 64, "width": 32, "key_lengths": 0}
    values |= {"query_lengths": 0, "scale": 1.0, "denominator": 0, "dtype": 0, "dropout_p": 0.0}
    return kernels._PROBLEM.pack(*(values | {"seed": 0} | changes).values())


@pytest.mark.parametrize(
    ("changes", "block_size", "status"),
    [
        ({"width": 12}, 32, -1),
        ({"width": 264}, 32, -3),
        ({"length": 65}, 32, -1),
        ({"dtype": 4}, 32, -1),
        ({"denominator": 2}, 32, -1),
        ({"dropout_p": 1.0}, 32, -1),
        ({"batch": -1}, 32, -1),
        ({"batch": 2**31}, 32, -3),
        ({}, 8, -1),
        ({}, 0, -1),
        ({"batch": 0}, 32, 0),
    ],
)
def test_what_the_library_refuses(library, changes, block_size, status):
    blocks, tensor = kernels._BLOCKS.pack(block_size, 0, 0, 0, 0), kernels._TENSOR.pack(0, 0, 0, 0)
    arguments = [problem_of(**changes), blocks, *[tensor] * 4, None, None, None]
    assert library.sat_block_sparse_forward(*arguments) == status


def test_the_library_says_what_it_is(library):
    assert library.sat_abi_version() == kernels.ABI_VERSION
    library.sat_instruction_set.restype = ctypes.c_char_p
    assert library.sat_instruction_set() == b"cuda"
