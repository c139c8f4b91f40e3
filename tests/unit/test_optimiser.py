"""The schedule against torch's own OneCycleLR, and what each phase optimises."""

import dataclasses

import pytest
import torch

from sat import config, optimiser
from sat.model import Classifier


def run_config(**training):
    settings = config.resolve(config.load("demo"), "listops", "sat", 1)
    settings["training"] |= training
    return config.RunConfig.from_dict(settings)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 40), (2, 7), (40, 40), (175, 10000)])
def test_dense_schedule_is_one_cycle(warmup, steps):
    training = run_config(warmup=warmup, num_train_steps=steps, learning_rate=2e-3).training
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        adam, max_lr=2e-3, total_steps=steps, pct_start=warmup / steps, anneal_strategy="linear"
    )
    for step in range(steps):
        group = adam.param_groups[0]
        assert optimiser.learning_rate(training, step) == pytest.approx(
            group["lr"], rel=1e-9, abs=1e-12
        )
        assert optimiser.beta1(training, step) == pytest.approx(group["betas"][0], rel=1e-9)
        adam.step()
        if step + 1 < steps:
            reference.step()


def test_constant_decay_and_fixed_beta1():
    training = run_config(warmup=10, lr_decay="constant", cycle_beta1=False).training
    rates = [optimiser.learning_rate(training, step) for step in range(300)]
    assert rates[0] == pytest.approx(training.learning_rate / 25)
    assert set(rates[9:]) == {training.learning_rate}
    assert {optimiser.beta1(training, step) for step in range(300)} == {0.9}


def test_no_warmup_starts_at_the_peak():
    training = run_config(warmup=0).training
    assert optimiser.learning_rate(training, 0) == training.learning_rate


@pytest.mark.parametrize("mode", ["constant", "continue"])
def test_sparse_phase_has_a_new_optimiser_without_the_pattern(mode):
    settings = config.resolve(config.load("demo"), "listops", "sat", 1)
    settings["transition"]["learning_rate"] = mode
    run = config.RunConfig.from_dict(settings)
    model = Classifier(run.model, 1, learned_pattern=True)
    pattern = set(map(id, model.pattern.parameters()))
    dense = optimiser.make_optimiser(model, run, "dense")
    assert pattern <= {id(p) for group in dense.param_groups for p in group["params"]}

    sparse = optimiser.make_optimiser(model, run, "sparse")
    optimised = {id(p) for group in sparse.param_groups for p in group["params"]}
    assert not optimised & pattern
    assert optimised | pattern == {id(p) for p in model.parameters()}
    assert not any(p.requires_grad for p in model.pattern)
    assert not sparse.state  # moments start anew

    step = 200
    rate = optimiser.set_schedule(sparse, run, "sparse", step)
    peak = run.training.learning_rate
    expected = peak / 2 if mode == "constant" else optimiser.learning_rate(run.training, step) / 2
    group = sparse.param_groups[0]
    assert rate == group["lr"] == expected
    assert group["betas"] == (0.9, 0.999)
    assert group["eps"] == 1e-6
    assert dataclasses.asdict(run.training)["weight_decay"] == group["weight_decay"]


def test_a_sparse_step_is_adamw_as_written():
    """From zero moments: m = (1 - b1) g, v = (1 - b2) g^2, both corrected, so g / (|g| + eps), and decoupled decay."""
    settings = config.resolve(config.load("demo"), "listops", "sat", 1)
    settings["training"] |= {"weight_decay": 0.1, "learning_rate": 0.02}
    run = config.RunConfig.from_dict(settings)
    model = Classifier(run.model, 1, learned_pattern=True)
    dense = optimiser.make_optimiser(model, run, "dense")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    dense.step()  # its moments must not reach the sparse phase
    sparse = optimiser.make_optimiser(model, run, "sparse")
    optimiser.set_schedule(sparse, run, "sparse", 7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = [torch.randn_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient.clone()
    sparse.step()
    rate = 0.02 / 2
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        expected = before[name] * (1 - rate * 0.1) - rate * g / (g.abs() + 1e-6)
        if name.startswith("pattern"):
            expected = before[name]  # frozen and left out
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_dense_step_uses_the_beta1_of_the_cycle():
    """Two steps by hand with torch's defaults written out: m and v with the beta1 of each step."""
    run = run_config(warmup=10, num_train_steps=40, learning_rate=0.02)
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    model = torch.nn.ParameterList([p])
    adam = optimiser.make_optimiser(model, run, "dense")
    m = v = torch.zeros(2, dtype=torch.float64)
    value = p.detach().double()
    for step, g in enumerate(([0.5, -0.1], [-0.2, 0.3])):
        rate = optimiser.set_schedule(adam, run, "dense", step)
        first = optimiser.beta1(run.training, step)
        g = torch.tensor(g, dtype=torch.float64)
        m, v = first * m + (1 - first) * g, 0.999 * v + 0.001 * g**2
        corrected = m / (1 - first ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        value = value - rate * corrected[0] / (corrected[1].sqrt() + 1e-6)
        p.grad = g.float()
        adam.step()
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-7)
