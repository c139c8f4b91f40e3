"""The efficient attentions: against their formulas, padding, independence of the batch, training, own classes."""

import json
import math

import pytest
import torch
from processed import repeated_symbol, write_processed
from test_training import history, settings_of

from sat import config, training
from sat.config import EFFICIENT, ConfigError
from sat.efficient import gaussian, make_attention, pseudo_inverse

NAMES = sorted(EFFICIENT)
S = 64


def model_of(attention, **changes):
    small = {"landmarks": 16, "projection": 24, "features": 32, "bucket_size": 8}
    model = {"max_seq_len": S, "block_size": 16, "attention": attention} | small | changes
    settings = config.resolve(
        config.load("demo"), "listops", "softmax", 1, changes={"model": model}
    )
    return config.RunConfig.from_dict(settings).model


def qkv_of(model, B=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, B, model.num_head, S, model.head_dim)
    q, k, v = torch.randn(shape, generator=generator, requires_grad=True)
    return (q, q, v) if model.attention == "reformer" else (q, k, v)


def made(attention, **changes):
    torch.manual_seed(0)
    model = model_of(attention, **changes)
    return model, make_attention(model)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_and_gets_no_gradient(name):
    model, attention = made(name)
    lengths = torch.tensor([S, 40, 7])
    padding = (torch.arange(S) >= lengths[:, None])[:, None, :, None]
    q, k, v = qkv_of(model)
    o = attention(q, k, v, lengths)
    assert o.shape == q.shape and o.isfinite().all()
    others = [x.detach().masked_fill(padding, 9.0) for x in (q, k, v)]
    real = ~padding.expand_as(o)
    torch.testing.assert_close(attention(*others, lengths)[real], o[real])
    inputs = [q, v] if q is k else [q, k, v]
    for gradient in torch.autograd.grad(o[real].square().sum(), inputs):
        assert gradient.isfinite().all() and gradient[real].abs().max() > 0
        assert gradient[~real].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(name):
    """Else the size of a micro-batch would change the losses."""
    model, attention = made(name)
    lengths = torch.tensor([S, 40, 7])
    q, k, v = (
        x.detach() * torch.tensor([1.0, 2.0, 0.5])[:, None, None, None] for x in qkv_of(model)
    )
    together = attention(q, k, v, lengths)
    for b in range(3):
        part = slice(b, b + 1)
        alone = attention(q[part], k[part], v[part], lengths[part])
        torch.testing.assert_close(
            alone[..., : lengths[b], :], together[part, :, : lengths[b]], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_full_lengths_are_no_lengths(name):
    model, attention = made(name)
    q, k, v = qkv_of(model)
    torch.testing.assert_close(attention(q, k, v, None), attention(q, k, v, torch.tensor([S] * 3)))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_sequence_gives_numbers(name):
    model, attention = made(name)
    q, k, v = qkv_of(model)
    o = attention(q, k, v, torch.tensor([0, 1, S]))
    assert o.isfinite().all()
    assert torch.autograd.grad(o.sum(), v)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_not_random_once_it_is_made(name):
    model, attention = made(name)
    q, k, v = qkv_of(model)
    state = torch.get_rng_state()
    assert torch.equal(attention(q, k, v, None), attention(q, k, v, None))
    assert torch.equal(torch.get_rng_state(), state)


def softmax_attention(q, k, v, length):
    scores = (q @ k.mT / math.sqrt(q.shape[-1]))[..., :length]
    return scores.softmax(-1) @ v[..., :length, :]


def test_pseudo_inverse():
    a = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    a = a + 0.5 * torch.eye(8)
    torch.testing.assert_close(pseudo_inverse(a, 20), torch.linalg.pinv(a), rtol=1e-3, atol=1e-4)
    a[:, 5:], a[:, :, 5:] = 0, 0  # unused landmarks
    expected = torch.zeros_like(a)
    expected[:, :5, :5] = torch.linalg.inv(a[:, :5, :5])
    torch.testing.assert_close(pseudo_inverse(a, 20), expected, rtol=1e-3, atol=1e-4)


def test_nystromformer_with_a_landmark_a_position_is_softmax():
    """Then the landmarks are the positions, the three matrices one, and A A^+ A = A."""
    model, attention = made("nystromformer", landmarks=S)
    attention.convolution.weight.data.zero_()
    q, k, v = (x.detach() / 3 for x in qkv_of(model))
    k = q + 0.1 * k  # a matrix far from singular, for the iteration to converge
    found = attention(6 * q, k, v, torch.tensor([S, S, 30]))
    torch.testing.assert_close(
        found[2, :, :30], softmax_attention(6 * q, k, v, 30)[2, :, :30], rtol=0.05, atol=0.05
    )


def test_nystromformer_against_the_equations():
    model, attention = made("nystromformer")
    q, k, v = (x.detach()[:1] for x in qkv_of(model))
    q_m, k_m = (x.view(1, 2, 16, 4, 32).mean(3) for x in (q, k))
    first = (q @ k_m.mT / 32**0.5).softmax(-1)
    middle = (q_m @ k_m.mT / 32**0.5).softmax(-1)
    last = (q_m @ k.mT / 32**0.5).softmax(-1)
    kernel = attention.convolution.weight[:, 0, :, 0]  # [H, taps]
    padded = torch.nn.functional.pad(v, (0, 0, 17, 17))
    residual = sum(kernel[:, t, None, None] * padded[:, :, t : t + S] for t in range(35))
    expected = first @ pseudo_inverse(middle) @ last @ v + residual
    torch.testing.assert_close(attention(q, k, v, None), expected, rtol=1e-4, atol=1e-5)


def test_linformer_with_an_identity_is_softmax():
    model, attention = made("linformer", projection=S)
    attention.projection.data.copy_(torch.eye(S))
    q, k, v = qkv_of(model)
    torch.testing.assert_close(attention(q, k, v, None), softmax_attention(q, k, v, S))


def test_performer_comes_near_softmax():
    model, attention = made("performer", features=4096)
    q, k, v = (x.detach() / 2 for x in qkv_of(model))
    lengths = torch.tensor([S, 40, 20])
    found = attention(q, k, v, lengths)
    for b, length in enumerate(lengths.tolist()):
        expected = softmax_attention(q, k, v, length)[b, :, :length]
        error = (found[b, :, :length] - expected).square().mean().sqrt()
        assert error < 0.1 * expected.square().mean().sqrt()


def test_reformer_with_one_pair_of_buckets_is_softmax_over_the_others():
    """Chunks that reach over the whole sequence: every position sees every other, keys of unit length."""
    model, attention = made("reformer", bucket_size=S // 2, hashes=1)
    q, _, v = (x.detach() for x in qkv_of(model))
    k = torch.nn.functional.normalize(q, dim=-1)
    for length in (S, 40):
        scores = (q @ k.mT / math.sqrt(32)).masked_fill(torch.eye(S, dtype=torch.bool), -5e4)
        expected = scores[..., :length].softmax(-1) @ v[..., :length, :]
        found = attention(q, q, v, torch.tensor([length] * 3))
        torch.testing.assert_close(
            found[:, :, :length], expected[:, :, :length], rtol=1e-4, atol=1e-5
        )


def test_skyformer_against_the_formula():
    model, attention = made("skyformer")
    q, k, v = (x.detach().double() for x in qkv_of(model))
    length = 40
    rows = (attention.places.double() * length).long()
    q_s, k_s = q / 32**0.25, k / 32**0.25
    z = torch.cat([q_s[:, :, rows[0]], k_s[:, :, rows[1]]], dim=2)
    middle = gaussian(z, z) + 0.1 * torch.eye(16)
    expected = gaussian(q_s, z) @ torch.linalg.inv(middle) @ gaussian(z, k_s[:, :, :length])
    expected = expected @ v[:, :, :length]
    found = attention(*(x.float() for x in (q, k, v)), torch.tensor([length] * 3)).double()
    # The paper's six iterations are near the inverse, not at it.
    error = (found - expected)[:, :, :length].square().mean().sqrt()
    assert error < 0.1 * expected[:, :, :length].square().mean().sqrt()


def test_gaussian_kernel():
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    torch.testing.assert_close(gaussian(x, y), torch.exp(-torch.cdist(x, y).square() / 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processed")
    sizes = {"train": 128, "dev": 30, "test": 40}
    write_processed(folder / "listops", "listops", repeated_symbol("listops", sizes, 64))
    return folder / "listops"


def few_steps(attention, **blocks):
    changes = {
        "model": {"landmarks": 16, "projection": 16, "features": 32, "bucket_size": 16},
        "training": {"num_train_steps": 8, "num_dense_train_steps": None, "eval_frequency": 8},
    }
    return settings_of(attention=attention, **config.merge(changes, blocks))


@pytest.mark.parametrize("attention", [*NAMES, "local", "bigbird", "random", "spion"])
def test_every_row_trains_and_micro_batches_change_nothing(
    folder, tmp_path, kernels_dir, attention
):
    losses = {}
    for size in (None, 5):
        settings = few_steps(
            attention,
            model={"dropout_prob": 0.0, "batch_size": size},
            training={"num_dense_train_steps": 4 if attention == "spion" else None, "warmup": 2},
        )
        run = tmp_path / str(size)
        metrics = training.train(settings, folder, run, device="cpu", threads=1)
        losses[size] = [line["loss"] for line in history(run) if line["event"] == "train"]
    assert all(map(math.isfinite, losses[5])) and losses[5][-1] < losses[5][0]
    assert losses[5] == pytest.approx(losses[None], rel=2e-4)
    if attention in NAMES:
        assert metrics["pattern"] is None and metrics["backend"] == attention
    elif attention != "spion":
        assert metrics["transition"] == {"step": 0, "reason": "start"}
        assert metrics["phases"]["dense"] is None and metrics["phases"]["sparse"]["steps"] == 8


def test_a_run_that_begins_sparse_follows_the_whole_schedule(folder, tmp_path, kernels_dir):
    rates = {}
    for attention in ("softmax", "local"):
        training.train(few_steps(attention), folder, tmp_path / attention, device="cpu", threads=1)
        rates[attention] = [
            line["learning_rate"]
            for line in history(tmp_path / attention)
            if line["event"] == "train"
        ]
    assert rates["local"] == rates["softmax"]


OWN = '''
import torch

class Average(torch.nn.Module):
    """Every position gets the mean of the real values, times a learned factor a head."""

    def __init__(self, model, start):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((model.num_head, 1, 1), start))

    def forward(self, q, k, v, lengths):
        real = torch.arange(v.shape[2]) < lengths[:, None]
        return self.factor * ((v * real[:, None, :, None]).sum(2) / lengths[:, None, None])[:, :, None].expand_as(v)
'''


def test_an_attention_of_ones_own(folder, tmp_path, monkeypatch):
    (tmp_path / "my_attention.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"attention": "my_attention:Average", "attention_arguments": {"start": 0.5}}
    metrics = training.train(
        few_steps("softmax", model=own), folder, tmp_path / "run", device="cpu", threads=1
    )
    assert math.isfinite(metrics["test"]["loss"])
    for change, words in (
        ({"attention": "my_attention:Averag"}, "has no Averag"),
        ({"attention": "my_atention:Average"}, "cannot import my_atention .*PYTHONPATH"),
        ({"attention_arguments": {"begin": 1.0}}, "begin"),
    ):
        settings = config.RunConfig.from_dict(few_steps("softmax", model=own | change))
        with pytest.raises(ConfigError, match=words):
            make_attention(settings.model)


@pytest.mark.parametrize(
    ("attention", "model", "words"),
    [
        ("softmax", {"attention": "nystromfromer"}, "did you mean 'nystromformer'"),
        ("softmax", {"attention_arguments": {"x": 1}}, "attention of your own"),
        ("nystromformer", {"landmarks": 48}, "landmarks 48 must divide the padded length 64"),
        ("reformer", {"bucket_size": 64}, "bucket_size 64 must, doubled, divide"),
        ("linformer", {"projection": 128}, "projection 128 must be at most"),
        ("skyformer", {"landmarks": 15}, "landmarks 15 must be even"),
        ("performer", {"attention_dropout": 0.1}, "attention_dropout"),
        ("sat", {"attention": "linformer"}, "rule must be never"),
    ],
)
def test_what_does_not_go_together_is_refused(attention, model, words):
    with pytest.raises(ConfigError, match=words):
        settings_of(attention=attention, model=model)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"transition": {"rule": "start"}}, "learned in a dense phase"),
        ({"transition": {"rule": "never"}}, "does not go with"),
    ],
)
def test_a_learned_pattern_needs_a_dense_phase(blocks, words):
    with pytest.raises(ConfigError, match=words):
        settings_of(attention="sat", **blocks)


def test_every_preset_is_in_the_comparison():
    compared = config.load("comparison")
    assert compared["run"] == "lra"
    assert sorted(compared["attentions"]) == config.known("attentions")
    demo = config.complete(
        config.merge(
            config.read_yaml(config.ROOT / "config/config.yaml"),
            config.read_yaml(config.ROOT / "config/demo.yaml"),
            {"attentions": compared["attentions"]},
        )
    )
    assert json.dumps(demo)  # every attention of every task has settings that fit
