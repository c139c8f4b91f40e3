"""A whole training on small data: phases, files, reproducibility, refusals."""

import dataclasses
import itertools
import json
import math
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from processed import repeated_symbol, write_processed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sat import (
    checkpoint,
    config,
    data,
    devices,
    evaluation,
    failure,
    folder_lock,
    memory,
    runtime,
    training,
    transition,
)

SIZES = {"train": 256, "dev": 60, "test": 70}


@pytest.fixture(scope="module", autouse=True)
def kernels(kernels_dir):
    """The compiled kernels, as in a real run."""


def settings_of(task="listops", attention="sat", seed=3, **blocks):
    changes = {
        "dataset": {"max_length": 64},
        "model": {"num_layers": 2, "max_seq_len": 64, "block_size": 16, "density": 0.3},
        "training": {
            "batch_size": 16,
            "learning_rate": 3e-3,
            "warmup": 5,
            "num_train_steps": 24,
            "num_dense_train_steps": 12,
            "eval_frequency": 6,
            "skewness": 1e9,
        },
    }
    if task == "pathfinder":
        changes["dataset"]["image_size"] = 8
    return config.resolve(
        config.load("demo"), task, attention, seed, changes=config.merge(changes, blocks)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processed")
    for task in ("listops", "retrieval", "pathfinder"):
        width = 64 if task == "pathfinder" else -1
        write_processed(folder / task, task, repeated_symbol(task, SIZES, 64), width=width)
    return folder


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def without_volatile(metrics):
    metrics = json.loads(json.dumps(metrics))
    for phase in metrics["phases"].values():
        if phase:
            for key in ("ms_per_step", "seconds", "cpu_seconds", "peak_memory_bytes"):
                del phase[key]
    for key in ("training_seconds", "content_sha256"):
        del metrics[key]
    del metrics["files"]["history.jsonl"]  # times again
    return metrics


@pytest.mark.parametrize("task", ["listops", "retrieval", "pathfinder"])
def test_a_run_goes_sparse_and_is_scored(folder, tmp_path, task):
    metrics = training.train(settings_of(task), folder / task, tmp_path, device="cpu", threads=1)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["transition"] == {"step": 12, "reason": "limit"}
    assert metrics["phases"]["dense"]["steps"] == metrics["phases"]["sparse"]["steps"] == 12
    assert metrics["phases"]["sparse"]["peak_memory_bytes"] > 2**20
    assert metrics["pattern"]["selected"] == [math.floor(16 * 0.3)] * 2
    assert metrics["test"]["examples"] == SIZES["test"]
    assert metrics["dev"]["phase"] == "sparse" and metrics["dev"]["step"] in (18, 24)
    assert metrics["num_steps"] == 24
    assert metrics["backend"] == "cpu"

    steps = history(tmp_path)
    assert [line["step"] for line in steps if line["event"] == "train"] == list(range(1, 25))
    assert [line["step"] for line in steps if line["event"] == "eval"] == [6, 12, 18, 24]
    assert [line["step"] for line in steps if line["event"] == "transition"] == [12]
    trains = [line for line in steps if line["event"] == "train"]
    assert all(len(line["skewness"]) == 2 for line in trains[:12])
    assert all(line["skewness"] is None for line in trains[12:])
    assert trains[0]["distance"] is None and trains[1]["change"] is None
    assert trains[2]["change"] is not None
    assert {line["learning_rate"] for line in trains[12:]} == {1.5e-3}

    masks = safetensors.torch.load_file(str(tmp_path / "pattern.safetensors"))
    assert sorted(masks) == ["layer_0", "layer_1", "pooled_layer_0", "pooled_layer_1"]
    for layer, mass in enumerate(metrics["pattern"]["mass"]):
        pooled = masks[f"pooled_layer_{layer}"]
        held = (pooled * masks[f"layer_{layer}"]).sum() / pooled.sum()
        assert float(held) == pytest.approx(mass, rel=1e-4)
    assert json.loads((tmp_path / "config.json").read_text()) == settings_of(task)
    assert not list(tmp_path.glob("*.partial"))
    assert list((tmp_path / "tensorboard").glob("events.*"))

    again = evaluation.evaluate_run(tmp_path, folder / task, device="cpu", threads=1)
    assert again["phase"] == "sparse"
    assert again["accuracy"] == metrics["test"]["accuracy"]
    assert again["loss"] == pytest.approx(metrics["test"]["loss"], rel=1e-6)
    confusion = torch.tensor(again["confusion"])
    assert confusion.sum() == SIZES["test"]
    assert confusion.trace() == round(again["accuracy"] * SIZES["test"])


def test_equal_runs_are_equal_and_seeds_differ(folder, tmp_path):
    results = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        results[name] = training.train(
            settings_of(seed=seed), folder / "listops", tmp_path / name, device="cpu", threads=2
        )
    assert without_volatile(results["a"]) == without_volatile(results["b"])
    for name in ("model.safetensors", "pattern.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("attention", ["softmax", "sat"])
def test_micro_batches_give_the_same_losses(folder, tmp_path, attention):
    losses = []
    for size in (None, 5):
        model = {"dropout_prob": 0.0, "batch_size": size}
        settings = settings_of(attention=attention, model=model)
        training.train(settings, folder / "listops", tmp_path / str(size), device="cpu", threads=1)
        losses.append(
            [line["loss"] for line in history(tmp_path / str(size)) if line["event"] == "train"]
        )
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_it_learns(folder, tmp_path):
    changes = {
        "training": {"num_train_steps": 120, "num_dense_train_steps": 60, "eval_frequency": 30}
    }
    metrics = training.train(
        settings_of(**changes), folder / "listops", tmp_path, device="cpu", threads=2
    )
    assert metrics["test"]["accuracy"] > 3 * metrics["test"]["chance"]
    assert metrics["dev"]["accuracy"] == max(
        line["accuracy"]
        for line in history(tmp_path)
        if line["event"] == "eval" and line["phase"] == "sparse"
    )


def test_softmax_stays_dense(folder, tmp_path):
    metrics = training.train(
        settings_of(attention="softmax"), folder / "listops", tmp_path, device="cpu", threads=1
    )
    assert metrics["transition"] == {"step": None, "reason": None}
    assert metrics["pattern"] is None and metrics["phases"]["sparse"] is None
    assert safetensors.torch.load_file(str(tmp_path / "pattern.safetensors")) == {}
    assert evaluation.evaluate_run(tmp_path, folder / "listops", device="cpu")["phase"] == "dense"


def test_a_sat_run_that_never_switches_ends_dense(folder, tmp_path):
    settings = settings_of(training={"num_dense_train_steps": None})
    metrics = training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    assert metrics["transition"] == {"step": None, "reason": None}
    assert metrics["dev"]["phase"] == "dense"


def test_the_rule_can_switch(folder, tmp_path):
    settings = settings_of(
        training={"skewness": -1e9, "distance": 1e9, "num_dense_train_steps": None}
    )
    metrics = training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    assert metrics["transition"] == {"step": 3, "reason": "rule"}


def test_pooled_pattern_keeps_the_best_blocks_of_the_mean_map(folder, tmp_path):
    settings = settings_of(pattern={"source": "pooled", "min_per_row": 1})
    metrics = training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    assert metrics["pattern"]["empty_rows"] == [0, 0]
    assert metrics["num_parameters"] == settings_count(settings) - 2 * 4 * 32


def settings_count(settings):
    from sat.model import Classifier, num_parameters

    run = config.RunConfig.from_dict(settings)
    return num_parameters(Classifier(run.model, 1, learned_pattern=True))


def test_patience_stops_the_run(folder, tmp_path):
    changes = {"training": {"learning_rate": 1e-9, "patience": 1, "num_dense_train_steps": None}}
    metrics = training.train(
        settings_of(**changes), folder / "listops", tmp_path, device="cpu", threads=1
    )
    assert metrics["num_steps"] == 12  # the second evaluation is no better than the first


def test_patience_does_not_wait_for_a_switch_that_cannot_come(folder, tmp_path):
    """Its limit lies at the last step or behind it."""
    changes = {"training": {"learning_rate": 1e-9, "patience": 1, "num_dense_train_steps": 24}}
    metrics = training.train(
        settings_of(**changes), folder / "listops", tmp_path, device="cpu", threads=1
    )
    assert metrics["num_steps"] == 12 and metrics["transition"]["step"] is None


def test_num_eval_steps_limits_dev(folder, tmp_path):
    changes = {"training": {"num_eval_steps": 2}}
    metrics = training.train(
        settings_of(**changes), folder / "listops", tmp_path, device="cpu", threads=1
    )
    assert metrics["dev"]["examples"] == 32


def test_infinite_loss_stops_with_step_and_advice(folder, tmp_path):
    settings = settings_of(training={"learning_rate": 1e30})
    with pytest.raises(
        training.TrainingFailed, match=r"step \d+ .* finite are .*(encoder|head)\..*learning_rate"
    ):
        training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


def spoil_gradient_of(name, spoiled_steps, monkeypatch, value=math.inf):
    """After the backward of these steps (from 1) the gradient of the parameter is not finite, though the loss is."""
    real, steps = training.Training._pattern_step, itertools.count(1)

    def spoiled(self, maps):
        real(self, maps)
        if next(steps) in spoiled_steps:
            self.model.get_parameter(name).grad.view(-1)[0] = value

    monkeypatch.setattr(training.Training, "_pattern_step", spoiled)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_reaches_no_weight(folder, tmp_path, monkeypatch, value):
    spoil_gradient_of("head.0.weight", [8], monkeypatch, value)
    settings = settings_of(training={"checkpoint_seconds": 0})
    words = r"the gradient is not finite in step 8 .* that of head\.0\.weight\. .*learning_rate"
    with pytest.raises(training.TrainingFailed, match=words) as caught:
        training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    assert failure.kind_of(caught.value) == "loss not finite"
    tensors, record = checkpoint.read(tmp_path / "checkpoint")
    assert record["step"] == 7
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(("split", "step"), [("dev", 6), ("test", 24)])
def test_an_evaluation_that_is_not_finite_stops_the_run(folder, tmp_path, monkeypatch, split, step):
    real = training.evaluate

    def evaluate(model, rows, *arguments, **keywords):
        result = real(model, rows, *arguments, **keywords)
        return result | {"loss": math.nan} if len(rows) == SIZES[split] else result

    monkeypatch.setattr(training, "evaluate", evaluate)
    words = rf"the loss is nan on {split} in step {step} .* in the loss itself"
    with pytest.raises(training.TrainingFailed, match=words):
        training.train(settings_of(), folder / "listops", tmp_path, device="cpu", threads=1)
    assert not (tmp_path / "metrics.json").exists()


def test_an_evaluation_names_the_layer_that_is_not_finite(folder):
    state, _ = step_of(settings_of(), folder)
    _, splits = data.load(folder / "listops")
    state.model.head[0].register_forward_hook(lambda *seen: torch.full_like(seen[-1], math.nan))
    with pytest.raises(training.TrainingFailed, match=r"those that head\.0 gives"):
        state.check_scored({"loss": math.nan}, splits["dev"], "dev", None, 1)


def test_what_another_process_found_is_named_too(folder, monkeypatch):
    """The share of this one is finite; the first module in the model's order counts."""
    state, _ = step_of(settings_of(), folder)
    names = [name for name, _ in state.model.named_modules() if name]
    elsewhere = names.index("encoder.layers.1.mlp")
    monkeypatch.setattr(devices, "largest", lambda _, value: max(value, -elsewhere))
    _, splits = data.load(folder / "listops")
    batch = splits["train"].batch(np.arange(16), 64)
    before = runtime.random_state(torch.device("cpu"))
    with pytest.raises(training.TrainingFailed, match=r"those that encoder\.layers\.1\.mlp gives"):
        state._check_finite(0, math.nan, batch, before)


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch):
    real = training.Training._take_step

    def spoiled(self, index):
        taken = real(self, index)
        if index == 7:
            with torch.no_grad():
                self.model.get_parameter("head.0.bias")[0] = math.nan
        return taken

    monkeypatch.setattr(training.Training, "_take_step", spoiled)
    settings = settings_of(training={"checkpoint_seconds": 0})
    with pytest.raises(training.TrainingFailed, match=r"weights are not finite .* head\.0\.bias"):
        training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    assert checkpoint.read(tmp_path / "checkpoint")[1]["step"] == 7


def with_scaler(monkeypatch, scale):
    """Trainings scale their loss as in fp16 on a GPU."""
    direct = runtime.make_accelerator

    def scaled(*arguments):
        accelerator = direct(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(runtime, "make_accelerator", scaled)


def test_steps_that_overflow_in_half_precision_are_counted(folder, tmp_path, monkeypatch):
    spoil_gradient_of("head.0.weight", [2, 5], monkeypatch)
    with_scaler(monkeypatch, 1024.0)
    metrics = training.train(settings_of(), folder / "listops", tmp_path, device="cpu", threads=1)
    assert metrics["skipped_steps"] == 2
    steps = [line for line in history(tmp_path) if line["event"] == "train"]
    assert [line["step"] for line in steps if line["skipped"]] == [2, 5]


def test_gradients_that_no_scale_mends_stop_the_run(folder, tmp_path, monkeypatch):
    spoil_gradient_of("head.0.weight", range(100), monkeypatch)
    with_scaler(monkeypatch, 2 * training.SMALLEST_SCALE)
    with pytest.raises(training.TrainingFailed, match="gradient is not finite in step 3 "):
        training.train(settings_of(), folder / "listops", tmp_path, device="cpu", threads=1)


def test_a_pattern_from_the_start_is_drawn(folder, tmp_path):
    settings = settings_of(attention="local", training={"num_train_steps": 6})
    training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    drawn = [tag for tag in events.Tags()["images"] if tag.startswith("pattern/")]
    assert drawn == ["pattern/layer_0", "pattern/layer_1"]
    assert [image.step for image in events.Images(drawn[0])] == [0]


def test_memory_that_runs_out_beside_the_model_is_told(folder, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(training.devices, "take_step", no_memory)
    words = "out of memory in step 1, outside of .*lower model.max_seq_len"
    with pytest.raises(training.TrainingFailed, match=words) as caught:
        training.train(settings_of(), folder / "listops", tmp_path, device="cpu", threads=1)
    assert failure.kind_of(caught.value) == "out of memory"


def test_a_run_that_is_refused_leaves_what_is_there(folder, tmp_path):
    """A finished run outlives settings that are refused late, and a second training in its folder."""
    training.train(settings_of(), folder / "listops", tmp_path, device="cpu", threads=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert "metrics.json" in before and folder_lock.FILE not in before
    late = [
        (settings_of(training={"precision": "fp16"}), config.ConfigError, "needs a GPU"),
        (settings_of(model={"memory_limit_gb": 0.01}), memory.OutOfMemory, "one sequence at"),
    ]
    for settings, error, words in late:
        with pytest.raises(error, match=words):
            training.train(settings, folder / "listops", tmp_path, device="cpu", threads=1)
    with (
        folder_lock.held(tmp_path, print),
        pytest.raises(config.ConfigError, match=f"process {os.getpid()} is training there"),
    ):
        training.train(settings_of(), folder / "listops", tmp_path, device="cpu", threads=1)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert before == after


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 10}, "vocab_size is 10, the data need 16"),
        ({"num_classes": 4}, "num_classes is 4"),
    ],
)
def test_model_and_data_must_fit(folder, tmp_path, change, words):
    with pytest.raises(config.ConfigError, match=words):
        training.train(settings_of(model=change), folder / "listops", tmp_path)


def test_data_of_another_task_are_refused(folder, tmp_path):
    with pytest.raises(config.ConfigError, match="task retrieval"):
        training.train(settings_of(), folder / "retrieval", tmp_path)


def step_of(settings, folder, steps=1):
    run = config.RunConfig.from_dict(settings)
    manifest, splits = data.load(folder / run.task)
    state = training.Training(run, manifest["num_inputs"], runtime.make_accelerator("cpu", 1))
    for index in range(steps):
        rows = data.training_rows(len(splits["train"]), run.training.batch_size, index, run.seed)
        line = state.step(index, splits["train"].batch(rows, 64))
    return state, line


def test_gradients_do_not_pile_up(folder):
    """Two steps with a learning rate of nearly 0 leave the gradient of the second batch, not the sum of both."""
    settings = settings_of(
        attention="softmax", model={"dropout_prob": 0.0}, training={"learning_rate": 1e-30}
    )
    state, _ = step_of(settings, folder, steps=2)
    run = config.RunConfig.from_dict(settings)
    _, splits = data.load(folder / "listops")
    fresh = training.Training(run, 1, runtime.make_accelerator("cpu", 1))
    rows = data.training_rows(len(splits["train"]), 16, 1, run.seed)
    fresh.step(1, splits["train"].batch(rows, 64))
    for one, two in zip(state.model.parameters(), fresh.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_gradients_are_clipped_by_value(folder, monkeypatch):
    """Each element by itself, to [-limit, limit]: not by the norm, and not what is inside."""
    gradients = {}
    for limit in (1e9, 1e-4):
        monkeypatch.setattr(training, "GRADIENT_LIMIT", limit)
        state, _ = step_of(settings_of(), folder)
        gradients[limit] = [p.grad for p in state.model.parameters()]
    assert max(float(g.abs().max()) for g in gradients[1e9]) > 1e-3
    for free, clipped in zip(gradients[1e9], gradients[1e-4], strict=True):
        assert torch.equal(clipped, free.clamp(-1e-4, 1e-4))


def test_pattern_gradient_reaches_the_pattern_alone(folder):
    """With and without the pattern loss all other gradients are the same."""
    grads = {}
    for scale in (0.0, 0.5):
        settings = settings_of(model={"dropout_prob": 0.0}, training={"attn_loss_scale": scale})
        state, _ = step_of(settings, folder)
        grads[scale] = {name: p.grad.clone() for name, p in state.model.named_parameters()}
    for name, gradient in grads[0.5].items():
        if name.startswith("pattern"):
            assert float(gradient.abs().max()) > 0 and float(grads[0.0][name].abs().max()) == 0
        else:
            assert torch.equal(gradient, grads[0.0][name])


@pytest.mark.parametrize("task", ["listops", "retrieval"])
def test_pattern_gradient_is_that_of_the_formula(folder, monkeypatch, task):
    """attn_loss_scale L sum_l mean((P P^T - T)^2), the mean of both towers: dP = scale L 2 (G + G^T) P / n^2."""
    scale, towers = 0.3, []
    real = training.Training._pattern_step

    def seen(self, maps):
        towers.extend([a.clone() for a in tower] for tower in maps)
        return real(self, maps)

    monkeypatch.setattr(training.Training, "_pattern_step", seen)
    monkeypatch.setattr(training, "GRADIENT_LIMIT", 1e9)
    settings = settings_of(task, training={"attn_loss_scale": scale, "learning_rate": 1e-30})
    state, _ = step_of(settings, folder)
    assert len(towers) == (2 if task == "retrieval" else 1)
    for layer, P in enumerate(state.model.pattern):
        value = P.detach().double()
        n = len(value)
        expected = torch.zeros_like(value)
        for tower in towers:
            tiles = tower[layer].double().view(n, 16, n, 16)
            G = value @ value.T - tiles.sum(dim=(1, 3)) / 16**2
            expected += scale * len(state.model.pattern) * 2 * (G + G.T) @ value / n**2
        torch.testing.assert_close(P.grad.double(), expected / len(towers), rtol=1e-5, atol=1e-7)


def test_the_new_phase_forgets_the_best_of_the_old(folder):
    settings = settings_of()
    state, _ = step_of(settings, folder, steps=3)
    state.best = {"accuracy": 1.0}
    state.go_sparse()
    assert state.best is None and state.phase == "sparse"
    assert all(mask.dtype == torch.bool and mask.shape == (4, 4) for mask in state.masks)


def test_option_labels():
    run = config.RunConfig.from_dict(settings_of())
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, zero_pixel_is_padding=True))
    manifest = {"options": {"dev_split": "lra", "brackets": False, "level": "curv_baseline"}}
    assert training.option_labels(run, manifest) == [
        "dev = test",
        "no brackets",
        "curv_baseline",
        "black pixels left out",
    ]
    manifest = {
        "options": {"dev_split": "holdout", "brackets": True, "level": "curv_contour_length_14"}
    }
    run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, zero_pixel_is_padding=False)
    )
    assert training.option_labels(run, manifest) == []


def test_padded_queries_can_be_left_out_of_the_map():
    """Two sequences of 4 and 2 real positions: rows 2 and 3 are means over one query, not two."""
    batch = data.Batch([torch.zeros(2, 8)], [torch.tensor([4, 2])], torch.zeros(2))
    zeroed = torch.zeros(8, 8)
    zeroed[:2, :4], zeroed[2:4, :4] = (
        0.25,
        0.125,
    )  # rows as the kernel gives them: sums over both, halved
    real = training.real_queries(batch, 8, class_tokens=0)
    assert real[0].tolist() == [2, 2, 1, 1, 0, 0, 0, 0]
    ((mended,),), size = training.over_real_queries([[zeroed]], real, 2)
    assert size == 4
    assert torch.equal(mended[:4, :4], torch.full((4, 4), 0.25))
    assert float(mended[4:].abs().max()) == 0
    skewness, _ = transition.moments(torch.arange(64.0).view(8, 8), size=4)
    corner = torch.arange(64.0).view(8, 8)[:4, :4].double()
    expected = (((corner - corner.mean()) / corner.std(correction=0)) ** 3).mean()
    assert float(skewness) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_the_map_of_real_queries_is_a_mean_of_softmax_rows(folder, pooling):
    """Rows sum to 1 up to the longest sequence, and the skewness is that of these rows and columns."""
    settings = settings_of(
        model={"pooling_mode": pooling}, transition={"padded_queries": "ignored"}
    )
    state, line = step_of(settings, folder)
    run = config.RunConfig.from_dict(settings)
    _, splits = data.load(folder / "listops")
    rows = data.training_rows(len(splits["train"]), run.training.batch_size, 0, run.seed)
    longest = int(splits["train"].batch(rows, 64).lengths[0].max()) + (pooling == "CLS")
    for a, skewness in zip(state.map_statistics.maps, line["skewness"], strict=True):
        sums = a.sum(dim=1)
        torch.testing.assert_close(sums[:longest], torch.ones(longest))
        assert not sums[longest:].any()
        corner = a[:longest, :longest].double().numpy()
        centred = (corner - corner.mean()) / corner.std()
        assert skewness == pytest.approx((centred**3).mean(), rel=1e-6)


def test_listops_baseline_answers_by_the_root_operator(tmp_path):
    rows, labels = [[1, 5], [1, 6], [1, 7], [2, 5], [2, 9]], [3, 3, 4, 8, 8]
    write_processed(
        tmp_path,
        "listops",
        {"train": (rows, labels), "dev": (rows[2:], labels[2:]), "test": (rows, labels)},
    )
    manifest, splits = data.load(tmp_path)
    assert evaluation.floors("listops", manifest, splits, "test") == {
        "chance": 0.4,
        "baseline": 0.8,
    }
    dev = evaluation.floors("listops", manifest, splits, "dev")
    assert dev == pytest.approx({"chance": 2 / 3, "baseline": 2 / 3})
    assert evaluation.baseline("text", splits, "test") is None


def test_patience_waits_for_a_switch_that_is_still_to_come(folder, tmp_path):
    changes = {"training": {"learning_rate": 1e-9, "patience": 1, "eval_frequency": 3}}
    metrics = training.train(
        settings_of(**changes), folder / "listops", tmp_path, device="cpu", threads=1
    )
    assert metrics["transition"] == {"step": 12, "reason": "limit"}
