"""The sources of patterns: how many blocks, which, and what is said of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat import config, pattern


def test_pool_is_the_mean_of_each_tile():
    a = torch.rand(64, 64)
    pooled = pattern.pool(a, 16)
    assert pooled.shape == (4, 4)
    assert float(pooled[1, 2]) == pytest.approx(float(a[16:32, 32:48].mean()))


@given(st.integers(2, 12), st.floats(0.01, 1.0), st.integers(0, 2), st.integers(0, 2**31))
def test_selection(n, density, min_per_row, seed):
    score = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    mask = pattern.select_blocks(score, density, min_per_row)
    floor = max(1, math.floor(n * n * density + 1e-9))
    assert mask.sum() == max(floor, n * min_per_row)
    assert (mask.sum(1) >= min_per_row).all()
    if not min_per_row:
        assert score[mask].min() >= score[~mask].max() if (~mask).any() else True


def test_selection_breaks_ties_by_position():
    mask = pattern.select_blocks(torch.ones(3, 3), 0.34)
    assert mask.flatten().nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("n", "density", "count"), [(32, 0.05, 51), (32, 0.04, 40), (64, 0.021, 86), (10, 0.29, 29)]
)
def test_number_of_blocks_is_the_floor(n, density, count):
    assert pattern.select_blocks(torch.rand(n, n), density).sum() == count


@pytest.mark.parametrize("source", config.STATIC_PATTERNS)
@pytest.mark.parametrize(("n", "density"), [(32, 0.04), (64, 0.021), (32, 0.3), (8, 0.02)])
def test_static_patterns_have_as_many_blocks_as_sat(source, n, density):
    def mask(seed, layer):
        return pattern.select_blocks(pattern.static_score(source, n, density, seed, layer), density)

    assert mask(1, 0).sum() == max(1, math.floor(n * n * density))
    assert torch.equal(mask(1, 0), mask(1, 0))
    assert torch.equal(mask(1, 0), mask(2, 0)) == torch.equal(mask(1, 0), mask(1, 1))
    # A single block may be the same one by chance; a window has no chance in it.
    if n * n * density > 2:
        assert torch.equal(mask(1, 0), mask(2, 0)) == (source == "local")
        rows = pattern.select_blocks(pattern.static_score(source, n, density, 1, 0), density, 1)
        assert rows.any(dim=1).all()


def test_a_window_is_the_diagonal_and_then_the_next_band_evenly():
    n = 32
    mask = pattern.select_blocks(pattern.local_score(n), (n + 16) / n**2)
    assert mask.diagonal().all()
    row, column = mask.nonzero().T
    assert (row - column).abs().max() == 1
    beside = row[row != column]
    halves = (beside < n // 2).sum(), (beside >= n // 2).sum()
    assert abs(int(halves[0] - halves[1])) <= 4  # along the whole sequence, not at its start


def test_bigbird_is_window_global_and_random():
    n, density = 32, 0.25  # 256 blocks: 96 window, 64 global, 96 random
    mask = pattern.select_blocks(pattern.bigbird_score(n, density, seed=3, layer=0), density)
    window = pattern.select_blocks(pattern.local_score(n), 96 / n**2)
    assert (mask & window).sum() == 96
    assert mask[0].all() and mask[:, 0].all()
    other = pattern.select_blocks(pattern.bigbird_score(n, density, seed=4, layer=0), density)
    same = (mask & other).sum()
    assert 96 + 64 <= same < 256 - 40  # the random ones are others


def test_the_diagonal_filter_is_a_convolution():
    a = torch.rand(48, 48)
    kernel = torch.eye(31)[None, None]
    expected = torch.nn.functional.conv2d(a[None, None], kernel, padding=15)[0, 0]
    torch.testing.assert_close(pattern.along_diagonal(a), expected)


def test_flood_filling_follows_the_largest_neighbour():
    pooled = torch.tensor(
        [
            [9.0, 1.0, 0.0, 0.0],
            [8.0, 2.0, 0.0, 0.0],
            [1.0, 7.0, 6.0, 5.0],
            [0.0, 0.0, 1.0, 4.0],
        ]
    )
    # From (0, 0) down to (1, 0), diagonally to (2, 1), right to (2, 2), on to (2, 3), where the map ends; the others
    # run into that path: (0, 1) over (1, 1), (0, 2) over (1, 3) and so on.
    expected = {(1, 0), (2, 1), (2, 2), (2, 3), (1, 1), (1, 3)}
    found = {tuple(at) for at in pattern.filled(pooled).nonzero().tolist()}
    assert found == expected


def test_flood_filling_finds_a_stripe():
    """A map with a stripe 16 positions beside the diagonal, in noise: its blocks and the diagonal are kept."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(128, 128, generator=generator) / 4
    index = torch.arange(112)
    a[index, index + 16] = 4
    score = pattern.floodfill_score(a, 16)
    mask = pattern.select_blocks(score, 15 / 64)
    expected = torch.eye(8, dtype=torch.bool) | torch.eye(8).roll(1, 1).triu().bool()
    assert torch.equal(mask, expected)


def test_the_report_of_a_pattern():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    tile = torch.tensor([[4.0, 1, 0], [5, 0, 0], [2, 3, 1]])
    a = tile.repeat_interleave(16, 0).repeat_interleave(16, 1)
    report = pattern.describe([mask], 16, [a])
    assert report["selected"] == [3] and report["empty_rows"] == [1]
    assert report["density"] == [pytest.approx(1 / 3)]
    assert report["symmetry"] == [
        pytest.approx(1 / 3)
    ]  # of three blocks the diagonal one has its mirror image
    assert report["mass"] == [pytest.approx(7 / 16)]
    assert report["best_mass"] == [pytest.approx(12 / 16)]
    assert report["random_mass"] == [pytest.approx(1 / 3)]
    assert pattern.describe([mask], 16)["mass"] is None
