"""The model: parameter counts of SAT, pooling, padding, and what each key changes."""

import pytest
import torch

from sat import config
from sat.attention import dropout
from sat.data import Batch
from sat.model import Classifier, Draws, Encoder, num_parameters, sinusoids


def model_config(task="listops", **changes):
    settings = config.resolve(config.load("lra"), task, "sat", 1)
    settings["model"] |= changes
    settings["dataset"]["max_length"] = min(settings["model"]["max_seq_len"], 1024)
    return config.RunConfig.from_dict(settings).model


def small(**changes):
    sizes = {"max_seq_len": 64, "block_size": 16, "num_layers": 2, "dropout_prob": 0.0}
    settings = config.resolve(config.load("lra"), "listops", "sat", 1)
    settings["dataset"]["max_length"] = 48
    settings["model"] |= sizes | changes
    return config.RunConfig.from_dict(settings).model


def batch_of(lengths, S=64, seed=0, vocabulary=16):
    ids = torch.randint(
        1, vocabulary, (len(lengths), S), generator=torch.Generator().manual_seed(seed)
    )
    lengths = torch.tensor(lengths)
    ids[torch.arange(S) >= lengths[:, None]] = 0
    return Batch([ids], [lengths], torch.zeros(len(lengths), dtype=torch.int64))


def build(model, seed=0, **arguments):
    torch.manual_seed(seed)
    return Classifier(model, 1, **arguments).eval()


@pytest.mark.parametrize(
    ("task", "num_inputs", "count"),
    [("image", 1, 160_650), ("listops", 1, 280_842), ("retrieval", 2, 399_234)],
)
def test_parameter_counts_of_sat(task, num_inputs, count):
    assert num_parameters(Classifier(model_config(task), num_inputs, learned_pattern=True)) == count


def test_dense_model_has_no_pattern_parameters():
    assert num_parameters(Classifier(model_config("image"), 1)) == 160_650 - 2 * 32 * 32


def test_initial_values():
    model = build(model_config("image"), learned_pattern=True).requires_grad_(False)
    assert float(model.encoder.embedding.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.encoder.position.std()) == pytest.approx(0.02, rel=0.05)
    P = torch.stack(list(model.pattern))
    assert 0 <= float(P.min()) and float(P.max()) < 1
    assert float(P.mean()) == pytest.approx(0.5, abs=0.05)


def independent_forward(model, ids, length, pooled=None):
    """One sequence through plain PyTorch operations, written from the description of the model.

    length: keys that attention sees; pooled: bool [S], positions that are pooled, the same when not given.
    """
    cfg, encoder = model.config, model.encoder
    S, H, d = cfg.sequence_length, cfg.num_head, cfg.head_dim
    x = encoder.embedding.weight[ids] + encoder.position
    for layer in encoder.layers:
        y = torch.nn.functional.layer_norm(
            x, x.shape[-1:], layer.attention_norm.weight, layer.attention_norm.bias, 1e-5
        )
        q, k, v = (y @ layer.attention.qkv.weight.T + layer.attention.qkv.bias).split(H * d, dim=1)
        heads = []
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            scores = q[:, part] @ k[:length, part].T / d**0.5
            heads.append(scores.softmax(dim=1) @ v[:length, part])
        o = torch.cat(heads, dim=1)
        x = x + o @ layer.attention.out.weight.T + layer.attention.out.bias
        y = torch.nn.functional.layer_norm(
            x, x.shape[-1:], layer.mlp_norm.weight, layer.mlp_norm.bias, 1e-5
        )
        first, second = layer.mlp[0], layer.mlp[3]
        y = torch.nn.functional.gelu(y @ first.weight.T + first.bias)
        x = x + y @ second.weight.T + second.bias
    h = torch.nn.functional.layer_norm(
        x, x.shape[-1:], encoder.norm.weight, encoder.norm.bias, 1e-5
    )
    pooled = torch.arange(S) < length if pooled is None else pooled
    hidden = torch.relu(h[pooled].sum(0) / S @ model.head[0].weight.T + model.head[0].bias)
    return hidden @ model.head[2].weight.T + model.head[2].bias


def test_dense_forward_against_an_independent_one():
    model = build(small())
    batch = batch_of([48, 17, 1])
    logits, _ = model(batch)
    for row, length in enumerate(batch.lengths[0].tolist()):
        torch.testing.assert_close(
            logits[row], independent_forward(model, batch.ids[0][row], length), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("left_out", [False, True])
def test_black_pixels_are_seen_by_attention_and_left_out_of_the_pooling_alone(left_out):
    model = build(
        model_config("image", max_seq_len=64, block_size=16, zero_pixel_is_padding=left_out)
    )
    ids = torch.randint(0, 3, (2, 64), generator=torch.Generator().manual_seed(0))
    logits, _ = model(Batch([ids], [None], torch.zeros(2, dtype=torch.int64)))
    for row in range(2):
        pooled = ids[row] != 0 if left_out else None
        expected = independent_forward(model, ids[row], 64, pooled)
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
@pytest.mark.parametrize("sparse", [False, True])
def test_what_stands_in_the_padding_changes_nothing(pooling, sparse):
    cfg = small(pooling_mode=pooling)
    model = build(cfg)
    masks = [torch.rand(cfg.num_blocks, cfg.num_blocks) < 0.6 for _ in range(2)] if sparse else None
    batch, other = (
        batch_of([40, 20], S=cfg.sequence_length),
        batch_of([40, 20], S=cfg.sequence_length),
    )
    padding = torch.arange(cfg.sequence_length) >= other.lengths[0][:, None]
    other.ids[0][padding] = 7
    torch.testing.assert_close(model(batch, masks)[0], model(other, masks)[0])


def test_maps_are_distributions_and_count_padded_queries():
    batch = batch_of([32, 16])
    for rule, full_rows in (("counted", 64), ("ignored", None)):
        model = build(small(), padded_queries=rule)
        _, (maps,) = model(batch, want_maps=True)
        assert len(maps) == 2 and maps[0].shape == (64, 64)
        sums = maps[0].sum(1)
        if full_rows:
            torch.testing.assert_close(sums, torch.ones(64))
        else:  # rows 16-31 are real in one of two sequences, rows behind in none
            torch.testing.assert_close(sums, torch.tensor([1.0] * 16 + [0.5] * 16 + [0.0] * 32))
        assert float(maps[0][:, 32:].abs().max()) == 0


def test_padded_queries_do_not_change_the_logits():
    batch = batch_of([32, 16])
    logits = [build(small(), padded_queries=rule)(batch)[0] for rule in ("counted", "ignored")]
    torch.testing.assert_close(*logits)


def test_full_mask_is_dense_attention():
    cfg = small()
    model = build(cfg)
    masks = [torch.ones(cfg.num_blocks, cfg.num_blocks, dtype=torch.bool)] * 2
    batch = batch_of([64, 64])
    torch.testing.assert_close(model(batch, masks)[0], model(batch)[0], rtol=1e-4, atol=1e-5)


def test_two_inputs_share_the_encoder():
    settings = model_config("retrieval", max_seq_len=64, block_size=16, num_layers=1)
    model = Classifier(settings, 2).eval()
    one, two = batch_of([20]), batch_of([30], seed=1)
    pair = Batch(one.ids + two.ids, one.lengths + two.lengths, one.labels)
    x, y = (model.encoder(b.ids[0], b.lengths[0]).pooled_BD for b in (one, two))
    expected = model.head(torch.cat([x, y, x * y, x - y], dim=1))
    torch.testing.assert_close(model(pair)[0], expected)


@pytest.mark.parametrize(
    "change",
    [
        {"learn_pos_emb": False},
        {"tied_weights": True},
        {"embedding_dim": 32},
        {"transformer_dim": 32},
        {"transformer_hidden_dim": 64},
        {"head_dim": 16},
        {"num_head": 4},
        {"num_layers": 3},
        {"vocab_size": 20},
        {"pooling_mode": "CLS"},
    ],
)
def test_keys_that_change_the_model(change):
    plain, changed = build(small()), build(small(**change))
    different = num_parameters(plain) != num_parameters(changed)
    if not different:
        batch = batch_of([64] * 4)
        changed.load_state_dict(plain.state_dict())
        different = not torch.equal(plain(batch)[0], changed(batch)[0])
    assert different


def test_dropout_is_for_training_only():
    batch = batch_of([64])
    for change in ({"dropout_prob": 0.5}, {"attention_dropout": 0.5}):
        model = build(small(**change))
        assert torch.equal(model(batch)[0], model(batch)[0])
        model.train()
        assert not torch.equal(model(batch)[0], model(batch)[0])


def test_tied_layers_are_one_layer():
    model = build(small(tied_weights=True, num_layers=4))
    assert num_parameters(model) == num_parameters(build(small(num_layers=1)))


def test_sinusoids():
    table = sinusoids(10, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert float(table[3, 0]) == pytest.approx(0.14112, abs=1e-5)  # sin 3
    assert float(table[3, 1]) == pytest.approx(-0.98999, abs=1e-5)  # cos 3


@pytest.mark.parametrize("sparse", [False, True])
def test_a_cut_batch_meets_the_dropout_of_the_whole(sparse):
    cfg = small(dropout_prob=0.3, attention_dropout=0.2)
    model = build(cfg).train()
    masks = [torch.rand(cfg.num_blocks, cfg.num_blocks) < 0.6 for _ in range(2)] if sparse else None
    whole = batch_of([64, 40, 20, 50, 9])

    def logits(start, stop, seed=5):
        torch.manual_seed(seed)
        with dropout.sequences_from(start):
            return model(whole.slice(start, stop), masks)[0]

    expected = logits(0, 5)
    torch.testing.assert_close(torch.cat([logits(0, 2), logits(2, 4), logits(4, 5)]), expected)
    torch.testing.assert_close(logits(3, 4), expected[3:4])
    assert not torch.allclose(logits(0, 5, seed=6), expected)


def test_every_place_drops_by_its_own_factors():
    seeds = {
        int(Draws(torch.tensor(1), 64, first).at(site)) for first in (0, 9) for site in range(9)
    }
    assert len(seeds) == 18


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
@pytest.mark.parametrize("kind", ["sparse", "dense", "maps"])
def test_trimming_changes_nothing(pooling, kind, monkeypatch):
    cfg = small(dropout_prob=0.3, attention_dropout=0.2, pooling_mode=pooling)
    masks = None
    if kind == "sparse":
        masks = [torch.rand(cfg.num_blocks, cfg.num_blocks) < 0.6 for _ in range(2)]
    model = build(cfg, padded_queries="ignored" if kind == "maps" else "counted").train()
    batch = batch_of([27, 5, 17])
    assert model.encoder.trimmed_length(batch.lengths[0], masks, kind == "maps") == 32

    def results():
        torch.manual_seed(1)
        model.zero_grad()
        logits, (maps,) = model(batch, masks, kind == "maps")
        logits.square().sum().backward()
        return [logits, *maps, *(p.grad for p in model.parameters())]

    trimmed = results()
    monkeypatch.setattr(Encoder, "trimmed_length", lambda *_: cfg.sequence_length)
    for one, two in zip(trimmed, results(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_map_that_counts_padded_queries_is_not_trimmed():
    model, lengths = build(small()), torch.tensor([5])
    assert model.encoder.trimmed_length(lengths, None, True) == 64
    assert model.encoder.trimmed_length(lengths, None, False) == 16
    assert model.encoder.trimmed_length(None, None, False) == 64
