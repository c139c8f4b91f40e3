"""The door of sat.attention: the formulas, the checks, the choice of the backend."""

import functools
import math

import pytest
import torch

import sat.attention as attention
from sat.attention import block_csr, blocks, dropout, kernels, selection

B, H, N, D, BLOCK = 3, 2, 64, 8, 16


def make_inputs(dtype=torch.float64, shape=(B, H, N, D), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def make_mask(num_blocks=N // BLOCK):
    """An empty row, a full one and random ones."""
    mask = torch.rand(num_blocks, num_blocks, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0], mask[1] = False, True
    return mask


LENGTHS = torch.tensor([N, 21, 0])


def naive(q, k, v, element_mask, lengths, denominator):
    """The formula of the paper, one row at a time, in Python loops over the sums."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(int(lengths[b])):
                selected = element_mask[i].nonzero().flatten().tolist()
                real = [j for j in selected if j < lengths[b]]
                if not real:
                    continue
                exponentials = {
                    j: math.exp(float(q[b, h, i] @ k[b, h, j]) / math.sqrt(q.shape[3]))
                    for j in real
                }
                total = sum(exponentials.values())
                lse[b, h, i] = math.log(total)
                if denominator == "zero_logits":
                    total += q.shape[2] - len(selected)
                out[b, h, i] = sum(exponentials[j] / total * v[b, h, j] for j in real)
    return out, lse


@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
def test_reference_is_the_formula_of_the_paper(denominator):
    q, k, v = make_inputs()
    mask = make_mask()
    elements = mask.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    o, lse = attention.block_sparse_attention(
        q,
        k,
        v,
        mask,
        block_size=BLOCK,
        lengths=LENGTHS,
        denominator=denominator,
        return_lse=True,
        backend="reference",
    )
    expected, expected_lse = naive(q, k, v, elements, LENGTHS, denominator)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert not o[:, :, :BLOCK].any()  # the empty row
    assert not o[1, :, 21:].any() and not o[2].any()  # padding


def test_zero_logits_over_the_full_matrix_of_scores():
    """Without padding it is the softmax of a matrix in which unselected scores are 0, times 0."""
    q, k, v = make_inputs()
    mask = make_mask().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    scores = torch.where(mask, q @ k.mT / math.sqrt(D), 0)
    expected = (scores.softmax(-1) * mask) @ v
    o = attention.block_sparse_attention(q, k, v, make_mask(), block_size=BLOCK)
    torch.testing.assert_close(o, expected)


def test_zero_logits_is_renormalised_attention_behind_a_gate():
    q, k, v = make_inputs()
    mask = make_mask()
    options = {"block_size": BLOCK, "lengths": LENGTHS}
    o = attention.block_sparse_attention(q, k, v, mask, **options)
    r, lse = attention.block_sparse_attention(
        q, k, v, mask, **options, denominator="renormalised", return_lse=True
    )
    unselected = (N - BLOCK * mask.sum(1)).repeat_interleave(BLOCK)
    gate = torch.where(lse.isinf(), 0, lse.exp() / (lse.exp() + unselected))
    torch.testing.assert_close(o, r * gate[..., None])


def test_all_blocks_is_dense_attention():
    q, k, v = make_inputs()
    mask = torch.ones(N // BLOCK, N // BLOCK, dtype=torch.bool)
    sparse = attention.block_sparse_attention(
        q, k, v, mask, block_size=BLOCK, lengths=LENGTHS, backend="reference"
    )
    dense = attention.dense_attention(q, k, v, lengths=LENGTHS, backend="reference")
    torch.testing.assert_close(sparse, dense)


def test_dense_reference_and_map_are_softmax():
    q, k, v = make_inputs()
    weights = (q @ k.mT / math.sqrt(D)).softmax(-1)
    o, mean_map = attention.dense_attention(q, k, v, return_map=True)
    torch.testing.assert_close(o, weights @ v)
    torch.testing.assert_close(mean_map, weights.mean((0, 1)).float())
    assert mean_map.dtype == torch.float32 and not mean_map.requires_grad


@pytest.mark.parametrize("padded_queries", ["zero", "attend"])
def test_padded_queries(padded_queries):
    q, k, v = make_inputs()
    real = torch.arange(N) < LENGTHS[:, None]
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~real[:, None, None], -math.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    if padded_queries == "zero":
        weights = weights * real[:, None, :, None]
    o, mean_map = attention.dense_attention(
        q, k, v, lengths=LENGTHS, padded_queries=padded_queries, return_map=True
    )
    torch.testing.assert_close(o, weights @ v)
    torch.testing.assert_close(mean_map, weights.mean((0, 1)).float())
    assert o[1, :, 21:].any() == (padded_queries == "attend")


@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
def test_gradcheck_of_block_sparse(denominator):
    q, k, v = (x.requires_grad_() for x in make_inputs(shape=(2, 1, 12, 3)))
    mask = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention.block_sparse_attention(
            q, k, v, mask, block_size=4, lengths=torch.tensor([12, 5]), denominator=denominator
        ),
        (q, k, v),
    )


def test_gradcheck_of_dense():
    q, k, v = (x.requires_grad_() for x in make_inputs(shape=(2, 1, 7, 3)))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention.dense_attention(q, k, v, lengths=torch.tensor([7, 4])), (q, k, v)
    )


def test_reference_keeps_nothing_of_the_size_of_all_scores():
    q, k, v = (x.requires_grad_() for x in make_inputs())
    sizes = []

    def note(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        o, _ = attention.dense_attention(q, k, v, return_map=True, backend="reference")
    assert sizes and max(sizes) < B * H * N * N


def test_dropout_keeps_the_mean_and_follows_the_seed():
    q, k, v = make_inputs()
    for call in (
        lambda: attention.dense_attention(q, k, torch.ones_like(v), dropout_p=0.5),
        lambda: attention.block_sparse_attention(
            q,
            k,
            torch.ones_like(v),
            torch.ones(4, 4, dtype=torch.bool),
            block_size=BLOCK,
            dropout_p=0.5,
        ),
    ):
        torch.manual_seed(3)
        first = call()
        torch.manual_seed(3)
        assert torch.equal(first, call())
        assert not torch.equal(first, call())
        assert abs(first.mean().item() - 1) < 0.05


def test_dropout_of_the_backward_is_that_of_the_forward():
    q, k, v = make_inputs()
    v.requires_grad_()
    d_o = torch.randn_like(v)
    torch.manual_seed(5)
    o = attention.dense_attention(q, k, v, dropout_p=0.5)
    (dv,) = torch.autograd.grad(o, v, d_o)
    # o is linear in v, with the weights that were drawn
    torch.testing.assert_close((o * d_o).sum(), (v * dv).sum())


def test_parts_of_a_batch_drop_what_the_whole_batch_drops():
    inputs = make_inputs(torch.float32)
    whole, state = [], torch.get_rng_state()
    mask = torch.ones(4, 4, dtype=torch.bool)
    for backend in ("reference", "auto"):
        for call in (
            functools.partial(attention.dense_attention, backend=backend, dropout_p=0.4),
            functools.partial(
                attention.block_sparse_attention,
                block_mask=mask,
                block_size=BLOCK,
                backend=backend,
                dropout_p=0.4,
            ),
        ):
            parts = []
            for first, last in ((0, B), (0, 1), (1, B)):
                torch.set_rng_state(state)
                with dropout.sequences_from(first):
                    parts.append(call(*(x[first:last] for x in inputs)))
            torch.testing.assert_close(torch.cat(parts[1:]), parts[0])
            whole.append(parts[0])
    torch.testing.assert_close(whole[0], whole[2])


def definition_of_dropout(seed, place, column, threshold):
    """csrc/sat_kernels.h with Python's integers; place: (batch * heads + head) * length + row."""
    word, long = 2**32 - 1, 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (place + 1)) & long
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & long
    z = (z ^ z >> 27) * 0x94D049BB133111EB & long
    z ^= z >> 31
    x = (z + 0x9E3779B9 * column) & word
    x = (x ^ x >> 16) * 0x7FEB352D & word
    x = ((x ^ x >> 15) + (z >> 32)) * 0x846CA68B & word
    x ^= x >> 16
    return 0.0 if x >> 8 < threshold else 2**24 / (2**24 - threshold)


def test_factors_of_dropout_are_those_of_the_definition():
    seed, length = 2**63 - 12345, 40
    pairs = torch.arange(3)[:, None, None]
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    got = dropout.factors(torch.tensor(seed), 0.25, pairs, rows, columns, length)
    for pair, row, column in [(0, 0, 0), (2, 39, 39), (1, 7, 30), (2, 0, 1)]:
        expected = definition_of_dropout(seed, pair * length + row, column, 2**22)
        assert got[pair, row, column].item() == pytest.approx(expected, rel=1e-7)
    assert got.shape == (3, length, length) and (got == 0).any() and (got != 0).any()


@pytest.mark.parametrize("dropout_p", [0.02, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_without_a_pattern(dropout_p):
    size = 256
    index = torch.arange(size)
    pairs = torch.arange(4)[:, None, None]
    kept = dropout.factors(torch.tensor(5), dropout_p, pairs, index[:, None], index, size) != 0
    share = (dropout_p * (1 - dropout_p)) ** 0.5  # standard deviation of one
    assert abs((~kept).double().mean() - dropout_p) < 4 * share / kept.numel() ** 0.5
    noise = (kept.double() - (1 - dropout_p)) / share
    for neighbour in (noise.roll(1, 2), noise.roll(1, 1), noise.roll(1, 0), noise.mT):
        correlation = (noise * neighbour).mean().abs()
        assert correlation < 5 / kept.numel() ** 0.5
    for dim in (1, 2):  # rows and columns
        assert (noise.mean(dim).abs() < 5 / size**0.5).all()


def test_csr_of_a_mask_and_of_its_transpose():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    row_ptr, col_idx, col_ptr, row_idx = (x.tolist() for x in block_csr(mask))
    assert (row_ptr, col_idx) == ([0, 2, 2, 3], [1, 2, 0])
    assert (col_ptr, row_idx) == ([0, 1, 2, 3], [2, 0, 0])


def test_csr_is_kept_until_the_mask_changes():
    mask = torch.eye(3, dtype=torch.bool)
    first = block_csr(mask)
    assert block_csr(mask) is first
    mask[0, 1] = True
    assert block_csr(mask)[1].tolist() == [0, 1, 1, 2]
    for _ in range(2 * blocks.CACHE_SIZE):
        block_csr(torch.eye(3, dtype=torch.bool))
    assert len(blocks._cache) <= blocks.CACHE_SIZE


GOOD = {"block_size": BLOCK}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, GOOD, "q: expected floating point \\[B, H, N, D\\]"),
        ({"q": torch.zeros(B, H, N, D, dtype=torch.int64)}, GOOD, "q: expected floating point"),
        ({"k": torch.zeros(B, H, N, D + 1)}, GOOD, "k: expected torch.float32 \\[3, 2, 64, 8\\]"),
        ({"v": torch.zeros(B, H, N, D, dtype=torch.float64)}, GOOD, "v: expected torch.float32"),
        ({"v": torch.zeros(B, H, N, D, device="meta")}, GOOD, "on meta"),
        (
            {"q": torch.zeros(0, H, N, D)},
            GOOD,
            "q: expected .*none of them 0, got .*\\[0, 2, 64, 8",
        ),
        ({"q": torch.zeros(B, H, N, D).numpy()}, GOOD, "q: expected a tensor, got ndarray"),
        ({"mask": None}, GOOD, "block_mask: expected a tensor, got NoneType"),
        ({}, {"block_size": 32.0}, "block_size: expected a divisor of the length 64, got 32.0"),
        ({}, GOOD | {"lengths": [64, 3, 2]}, "lengths: expected a tensor, got list"),
        ({}, GOOD | {"lengths": torch.ones(3, dtype=torch.bool)}, "lengths: expected integers"),
        ({}, GOOD | {"dropout_p": 1 - 1e-9}, "dropout_p: expected a number in \\[0, 1\\)"),
        ({}, GOOD | {"seed": 5}, "seed: expected a tensor, got int"),
        ({}, GOOD | {"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected int64 \\[\\]"),
        ({}, {"block_size": 24}, "block_size: expected a divisor of the length 64, got 24"),
        ({}, {"block_size": 0}, "block_size: expected a divisor"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, GOOD, "block_mask: expected torch.bool"),
        ({"mask": torch.ones(4, 4)}, GOOD, "block_mask: expected torch.bool \\[4, 4\\]"),
        ({}, GOOD | {"lengths": torch.tensor([1, 2])}, "lengths: expected integers \\[3\\]"),
        ({}, GOOD | {"lengths": torch.tensor([1.0, 2, 3])}, "lengths: expected integers"),
        ({}, GOOD | {"lengths": torch.tensor([1, 65, 2])}, "in \\[0, 64\\], got 1 to 65"),
        ({}, GOOD | {"lengths": torch.tensor([-1, 6, 2])}, "in \\[0, 64\\], got -1 to 6"),
        ({}, GOOD | {"denominator": "one"}, "denominator: expected one of zero_logits"),
        ({}, GOOD | {"dropout_p": 1.0}, "dropout_p: expected a number in \\[0, 1\\)"),
        (
            {},
            GOOD | {"backend": "gpu"},
            "backend: expected one of auto, cuda, cpu, flex, reference",
        ),
        ({}, GOOD | {"backend": "cuda"}, "backend 'cuda' cannot be used: the tensors are on cpu"),
        ({}, {"block_size": 8, "backend": "cpu"}, "block size 8 is not one of"),
    ],
)
def test_a_wrong_argument_is_named(change, options, message):
    q, k, v = make_inputs(torch.float32)
    mask = torch.ones(N // (int(options["block_size"]) or 1), 1).expand(-1, 4).bool()
    if options["block_size"] == 8:
        mask = torch.ones(8, 8, dtype=torch.bool)
    arguments = {"q": q, "k": k, "v": v, "mask": mask} | change
    with pytest.raises(ValueError, match=message):
        attention.block_sparse_attention(*arguments.values(), **options)


def test_a_wrong_argument_of_dense_is_named():
    q, k, v = make_inputs(torch.float32)
    with pytest.raises(ValueError, match="padded_queries: expected zero or attend"):
        attention.dense_attention(q, k, v, padded_queries="drop")
    with pytest.raises(ValueError, match="it takes torch.float32, got torch.float64"):
        attention.dense_attention(q.double(), k.double(), v.double(), backend="cpu")


@pytest.fixture
def forget_choices():
    """The choice of a backend and the libraries are remembered for the process; forget them."""
    for function in (selection._choose, kernels.load_library):
        function.cache_clear()
    yield
    for function in (selection._choose, kernels.load_library):
        function.cache_clear()


def test_without_a_library_reference_is_used_with_a_warning(
    tmp_path, monkeypatch, caplog, forget_choices
):
    monkeypatch.delenv("SAT_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "PROJECT", tmp_path)
    q, k, v = make_inputs(torch.float32)
    for _ in range(2):
        o = attention.dense_attention(q, k, v)
    assert torch.equal(o, attention.dense_attention(q, k, v, backend="reference"))
    assert attention.selected_backend("cpu") == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "snakemake --cores 1 kernels" in caplog.text
    with pytest.raises(ValueError, match="snakemake --cores 1 kernels"):
        attention.dense_attention(q, k, v, backend="cpu")


def test_a_backend_that_gives_other_numbers_is_not_used(monkeypatch, caplog, forget_choices):
    monkeypatch.setattr(selection, "unavailable", lambda backend: None)
    monkeypatch.setattr(selection, "largest_error", lambda backend, dtype: 1e-3)
    assert attention.selected_backend("cpu") == "reference"
    assert "differ from reference by 1.0e-03" in caplog.text


def test_double_precision_goes_through_reference(monkeypatch):
    monkeypatch.setattr(selection, "_choose", lambda device_type: ("cpu", "reference"))
    q, _, _ = make_inputs()
    assert selection.resolve("auto", q, BLOCK) == "reference"
    assert selection.resolve("auto", q.float(), BLOCK) == "cpu"
    assert selection.resolve("auto", q.float(), 4) == "reference"
    assert selection.resolve("auto", q.float()[..., :6], BLOCK) == "reference"
