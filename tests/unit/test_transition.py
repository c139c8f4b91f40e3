"""Statistics, the rule, the pattern: against numpy and hand-made cases."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat import config, transition
from sat.transition import MapStatistics, StepStatistics, select_blocks, wants_sparse


def random_map(seed, size=300):
    return torch.softmax(
        3 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def numpy_skewness(a):
    a = a.double().numpy()
    return (((a - a.mean()) / a.std()) ** 3).mean()


def test_moments_agree_with_numpy():
    a, b = random_map(0), random_map(1)
    skewness, distance = transition.moments(a, b)
    assert float(skewness) == pytest.approx(numpy_skewness(a), rel=1e-10)
    assert float(distance) == pytest.approx(np.linalg.norm(a.double() - b.double()), rel=1e-12)
    assert math.isnan(transition.moments(a)[1])


def test_a_constant_map_has_no_skewness():
    assert math.isnan(transition.moments(torch.full((32, 32), 0.25))[0])


def test_statistics_follow_the_steps():
    maps = [random_map(seed) for seed in range(3)]
    statistics = MapStatistics()
    first = statistics.update([maps[0], maps[1]])
    second = statistics.update([maps[1], maps[1]])
    third = statistics.update([maps[2], maps[0]])
    assert first.distance is None and first.change is None
    assert second.change is None
    d1 = np.linalg.norm((maps[1] - maps[0]).double())
    d2 = np.linalg.norm((maps[2] - maps[1]).double())
    assert second.distance == pytest.approx([d1, 0])
    assert third.distance == pytest.approx([d2, d1])
    assert third.change[0] == pytest.approx(100 * abs(d2 - d1) / d1)
    assert math.isnan(third.change[1])  # from a distance of 0: no relative change


@pytest.mark.parametrize(
    ("rule", "skewness", "change", "sparse"),
    [
        ("settled", [2.0, 1.7], [1.0, 1.2], True),
        ("settled", [2.0, 1.6], [1.0, 1.2], False),  # one layer not skewed enough
        ("settled", [2.0, 1.7], [1.0, 1.3], False),  # one still moving
        ("settled", [math.nan, 2.0], [1.0, 1.0], False),
        ("settled", [2.0, 2.0], [math.nan, 1.0], False),
        ("settled", [2.0, 2.0], None, False),
        ("documented", [2.0, 1.8], [1.4, 9.0], True),
        ("documented", [2.0, 1.8], [1.3, 9.0], False),
        ("documented", [2.0, math.nan], [1.4, 9.0], False),
        ("never", [9.0, 9.0], [0.0, 0.0], False),
    ],
)
def test_rules(rule, skewness, change, sparse):
    statistics = StepStatistics(skewness, None, change)
    assert wants_sparse(rule, statistics, skewness=1.7, distance=1.3) is sparse


def test_limits_of_the_transition():
    settings = config.resolve(config.load("demo"), "listops", "sat", 1)
    settings["training"] |= {"num_init_steps": 5, "num_dense_train_steps": 9}
    run = config.RunConfig.from_dict(settings)
    settled = StepStatistics([9.0], [1.0], [0.0])
    moving = StepStatistics([0.0], [1.0], [99.0])
    assert transition.transition_reason(run, 4, settled) is None
    assert transition.transition_reason(run, 5, settled) == "rule"
    assert transition.transition_reason(run, 8, moving) is None
    assert transition.transition_reason(run, 9, moving) == "limit"
    unlimited = dataclasses.replace(run.training, num_dense_train_steps=None, num_init_steps=None)
    run = dataclasses.replace(run, training=unlimited)
    assert transition.transition_reason(run, 10**6, moving) is None
    assert transition.transition_reason(run, 3, settled) == "rule"


def test_pool_is_the_mean_of_each_tile():
    a = random_map(0, 64)
    pooled = transition.pool(a, 16)
    assert pooled.shape == (4, 4)
    assert float(pooled[1, 2]) == pytest.approx(float(a[16:32, 32:48].mean()))


def test_pattern_loss_has_the_gradient_of_sat():
    """SAT averages (P P^T - pooled map)^2 over samples and heads; here that is written out."""
    generator = torch.Generator().manual_seed(0)
    per_head = torch.rand(6, 8, 8, generator=generator, dtype=torch.float64)
    P = torch.rand(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((P @ P.T - per_head).square().mean(), P)
    (found,) = torch.autograd.grad(transition.pattern_loss(P, per_head.mean(0)), P)
    torch.testing.assert_close(found, expected)
    G = P @ P.T - per_head.mean(0)
    torch.testing.assert_close(found, 2 * (G + G.T) @ P / 64)


@given(st.integers(2, 12), st.floats(0.01, 1.0), st.integers(0, 2), st.integers(0, 2**31))
def test_selection(n, density, min_per_row, seed):
    score = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    mask = select_blocks(score, density, min_per_row)
    floor = max(1, math.floor(n * n * density + 1e-9))
    assert mask.sum() == max(floor, n * min_per_row)
    assert (mask.sum(1) >= min_per_row).all()
    if not min_per_row:
        assert score[mask].min() >= score[~mask].max() if (~mask).any() else True


def test_selection_breaks_ties_by_position():
    mask = select_blocks(torch.ones(3, 3), 0.34)
    assert mask.flatten().nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("n", "density", "count"), [(32, 0.05, 51), (32, 0.04, 40), (64, 0.021, 86), (10, 0.29, 29)]
)
def test_number_of_blocks_is_the_floor(n, density, count):
    assert select_blocks(torch.rand(n, n), density).sum() == count
