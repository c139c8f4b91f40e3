"""Statistics, the rule, the pattern: against numpy and hand-made cases."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from sat import config, transition
from sat.transition import MapStatistics, StepStatistics, wants_sparse


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


def test_running_averages():
    """transition.ema: skewness and distance are averaged, the change is that of the averaged distance."""
    maps = [random_map(seed, 32) for seed in range(6)]
    plain, averaged = MapStatistics(), MapStatistics(ema=0.75)
    skewness = distance = before = None
    for a in maps:
        new, smooth = plain.update([a]), averaged.update([a])
        value = new.skewness[0]
        skewness = value if skewness is None else 0.75 * skewness + 0.25 * value
        assert smooth.skewness == pytest.approx([skewness])
        if new.distance is not None:
            before, value = distance, new.distance[0]
            distance = value if distance is None else 0.75 * distance + 0.25 * value
            assert smooth.distance == pytest.approx([distance])
        if before is not None:
            assert smooth.change == pytest.approx([100 * abs(distance - before) / before])


def test_a_value_that_is_not_a_number_does_not_stay_in_the_average():
    statistics = MapStatistics(ema=0.9)
    statistics.update([random_map(0, 32)])
    constant = torch.full((32, 32), 1 / 32)
    assert math.isnan(statistics.update([constant]).skewness[0])
    assert statistics.update([random_map(1, 32)]).skewness[0] == pytest.approx(
        numpy_skewness(random_map(1, 32))
    )


def test_what_is_not_a_number_is_said_once(caplog):
    statistics = MapStatistics()
    for seed in (0, 1, 1, 1):
        statistics.update([random_map(2, 32), random_map(seed, 32)])
        if seed == 0:
            assert not caplog.records
    (record,) = caplog.records
    assert "change" in record.message and "layer 0" in record.message


def test_the_state_of_the_statistics_is_their_attributes():
    one, other = MapStatistics(0.5), MapStatistics(0.5)
    for seed in range(3):
        one.update([random_map(seed, 32)])
    vars(other).update(vars(one))
    assert one.update([random_map(3, 32)]) == other.update([random_map(3, 32)])
