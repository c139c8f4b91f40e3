"""Every key of a training's settings has an effect that can be seen, or is refused with the reason.

A new key of the schema needs a row here: EFFECTS says which change shows in what, REFUSALS what is not taken.
"""

import ast
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
from processed import repeated_symbol, write_processed
from test_efficient import OWN
from test_training import history

from sat import config, runtime, training
from sat.model import Classifier

SIZES = {"train": 64, "dev": 24, "test": 24}
BASE = {
    "dataset": {"max_length": 64},
    "model": {"num_layers": 2, "max_seq_len": 64, "block_size": 16, "density": 0.3}
    | {"dropout_prob": 0, "landmarks": 16, "projection": 16, "features": 32, "bucket_size": 16},
    "training": {"batch_size": 8, "learning_rate": 3e-3, "warmup": 3, "num_train_steps": 8}
    | {"num_dense_train_steps": 5, "eval_frequency": 4, "skewness": 1e9, "patience": None},
}
# The rule is met in the first step in which it can be, the third, and nothing else makes the switch.
MET = {"training": {"skewness": -1e9, "distance": 1e9, "num_dense_train_steps": None}}
LIMIT = {"training": {"num_dense_train_steps": 3}}  # a long sparse phase
OWN_CLASS = {"model": {"attention": "keys_own:Average", "attention_arguments": {"start": 0.5}}}

# (block, key) -> (value, what changes, and, where the usual run would not show it: attention, changes to the run).
EFFECTS = {
    ("model", "learn_pos_emb"): (False, "num_parameters"),
    ("model", "tied_weights"): (True, "num_parameters"),
    ("model", "embedding_dim"): (32, "num_parameters"),
    ("model", "transformer_dim"): (32, "num_parameters"),
    ("model", "transformer_hidden_dim"): (64, "num_parameters"),
    ("model", "head_dim"): (16, "num_parameters"),
    ("model", "num_head"): (1, "num_parameters"),
    ("model", "num_layers"): (1, "num_parameters"),
    ("model", "vocab_size"): (40, "num_parameters"),
    ("model", "max_seq_len"): (128, "num_parameters"),
    ("model", "dropout_prob"): (0.3, "losses"),
    ("model", "attention_dropout"): (0.3, "losses"),
    ("model", "pooling_mode"): ("CLS", "losses"),
    ("model", "block_size"): (32, "pattern"),
    ("model", "batch_size"): (3, "largest_batch"),
    ("model", "density"): (0.6, "pattern"),
    ("model", "denominator"): ("renormalised", "sparse_losses"),
    ("model", "zero_pixel_is_padding"): (True, "losses", "softmax", {"task": "pathfinder"}),
    ("model", "attention"): ("linformer", "num_parameters", "softmax"),
    ("model", "landmarks"): (32, "losses", "nystromformer"),
    ("model", "projection"): (32, "num_parameters", "linformer"),
    ("model", "features"): (48, "losses", "performer"),
    ("model", "hashes"): (1, "losses", "reformer"),
    ("model", "bucket_size"): (8, "losses", "reformer"),
    ("model", "attention_arguments"): ({"start": 2.0}, "losses", "softmax", OWN_CLASS),
    ("training", "batch_size"): (16, "largest_batch"),
    ("training", "learning_rate"): (1e-3, "losses"),
    ("training", "warmup"): (2, "learning_rates"),
    ("training", "lr_decay"): ("constant", "learning_rates"),
    ("training", "cycle_beta1"): (False, "losses"),
    ("training", "weight_decay"): (0.5, "losses"),
    ("training", "eval_frequency"): (2, "evaluations"),
    ("training", "num_train_steps"): (6, "num_steps"),
    ("training", "num_init_steps"): (5, "transition", "sat", MET),
    ("training", "num_eval_steps"): (1, "dev_examples"),
    ("training", "num_dense_train_steps"): (4, "transition"),
    ("training", "attn_loss_scale"): (0, "pattern_parameters"),
    ("training", "skewness"): (1e9, "transition", "sat", MET),
    ("training", "distance"): (0, "transition", "sat", MET),
    ("training", "patience"): (
        1,
        "num_steps",
        "softmax",
        {"training": {"learning_rate": 1e-12, "eval_frequency": 2}},
    ),
    ("transition", "rule"): ("documented", "transition", "sat", MET),
    ("transition", "ema"): (0.9, "change"),
    ("transition", "padded_queries"): ("ignored", "skewness"),
    ("transition", "learning_rate"): ("continue", "learning_rates", "sat", LIMIT),
    ("pattern", "source"): ("pooled", "num_parameters"),
    ("pattern", "min_per_row"): (2, "pattern"),
}
# Keys that another part of the program obeys: the tests that show it.
SHOWN_ELSEWHERE = {
    ("dataset", "train"): "test_preprocess.py::test_cap_keeps_order_and_does_not_depend_on_it",
    ("dataset", "dev"): "test_preprocess.py::test_cap_is_a_stratified_subset_of_its_size",
    ("dataset", "test"): "test_preprocess.py::test_cap_is_a_stratified_subset_of_its_size",
    ("dataset", "max_length"): "test_preprocess.py::test_text_decodes_to_what_was_encoded",
    ("dataset", "dev_split"): "test_preprocess.py::test_texts_of_tfds",
    ("dataset", "brackets"): "test_preprocess.py::test_lossy_form_of_listops_is_labelled",
    ("dataset", "level"): "test_training.py::test_option_labels",
    ("dataset", "image_size"): "test_preprocess.py::test_pathfinder_image_size_must_fit_max_length",
    ("dataset", "files"): "test_preprocess_own.py::test_every_kind_of_file",
    ("dataset", "text_column"): "test_preprocess_own.py::test_a_wrong_setting_is_named",
    ("dataset", "label_column"): "test_preprocess_own.py::test_a_wrong_setting_is_named",
    ("model", "memory_limit_gb"): "test_memory.py::test_a_limit_is_kept_by_smaller_parts",
    ("model", "num_classes"): "test_training.py::test_model_and_data_must_fit",
    (
        "training",
        "precision",
    ): "test_devices.py::test_bf16_trains_nearly_alike_and_attends_in_float32",
    ("training", "compile"): "test_devices.py::test_a_compiled_model_has_the_same_losses",
    ("training", "checkpoint_seconds"): "test_checkpoint.py::test_checkpoints_keep_their_distance",
}
# (task, attention, changes, words of the error)
REFUSALS = [
    ("image", "sat", {"dataset": {"brackets": True}}, "image has no option 'dataset.brackets'"),
    ("listops", "sat", {"dataset": {"level": "curv_baseline"}}, "no option 'dataset.level'"),
    ("listops", "sat", {"dataset": {"dev_split": "lra"}}, "no option 'dataset.dev_split'"),
    ("image", "sat", {"dataset": {"image_size": 32}}, "no option 'dataset.image_size'"),
    ("listops", "sat", {"model": {"zero_pixel_is_padding": True}}, "for pixels: image, pathfinder"),
    (
        "image",
        "sat",
        {"model": {"zero_pixel_is_padding": True, "pooling_mode": "CLS"}},
        "about MEAN pooling",
    ),
    ("listops", "performer", {"model": {"attention_dropout": 0.1}}, "only softmax has"),
    ("listops", "linformer", {"transition": {"rule": "settled"}}, "rule 'settled'"),
    ("listops", "softmax", {"pattern": {"source": "local"}}, "a dense run has rule never"),
    ("listops", "sat", {"transition": {"rule": "start"}}, "is learned in a dense phase"),
    ("listops", "sat", {"pattern": {"min_per_row": 5}}, "more than the 4 blocks of a row"),
    ("listops", "sat", {"training": {"warmup": 9}}, "more than training.num_train_steps"),
    ("listops", "sat", {"training": {"num_init_steps": 6}}, "more than training.num_dense"),
    ("listops", "sat", {"transition": {"ema": 1}}, "transition.ema"),
]


def test_every_key_of_the_schema_has_a_row():
    definitions = config.schema()["$defs"]
    keys = {(block, key) for block in config.BLOCKS for key in definitions[block]["properties"]}
    rows = EFFECTS.keys() | SHOWN_ELSEWHERE.keys()
    assert sorted(keys - rows) == [], "a new key needs a row in EFFECTS: what does it change?"
    assert sorted(rows - keys) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processed")
    for task in ("listops", "pathfinder"):
        width = 64 if task == "pathfinder" else -1
        splits = repeated_symbol(task, SIZES, 64)
        for rows, *_ in splits.values():
            for row in rows if task == "pathfinder" else ():
                row[:20] = [0] * 20  # black pixels
        write_processed(folder / task, task, splits, width=width)
    (folder / "keys_own.py").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def observed(folder, kernels_dir, tmp_path_factory):
    """Function: settings -> what can be seen of a run with them; equal settings run once."""
    known = {}

    def observe(settings, monkeypatch):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = run(settings, folder, tmp_path_factory.mktemp("run"), monkeypatch)
        return known[key]

    return observe


def run(settings, folder, output, monkeypatch):
    batches = []
    forward = Classifier.forward

    def counted(self, batch, *arguments):
        if self.training:
            batches.append(len(batch))
        return forward(self, batch, *arguments)

    monkeypatch.setattr(Classifier, "forward", counted)
    # Half of such a short run is the collection of garbage before memory is measured, which is not looked at here.
    monkeypatch.setattr(runtime, "reset_peak_memory", lambda device: None)
    monkeypatch.syspath_prepend(folder)
    metrics = training.train(settings, folder / settings["task"], output, device="cpu", threads=1)
    lines = history(output)
    steps = [line for line in lines if line["event"] == "train"]
    weights = safetensors.torch.load_file(str(output / "model.safetensors"))
    assert all(math.isfinite(line["loss"]) for line in steps)
    return {
        "losses": [line["loss"] for line in steps],
        "sparse_losses": [line["loss"] for line in steps if line["phase"] == "sparse"],
        "learning_rates": [line["learning_rate"] for line in steps],
        "skewness": [line["skewness"] for line in steps],
        "change": [line["change"] for line in steps],
        "evaluations": [line["step"] for line in lines if line["event"] == "eval"],
        "largest_batch": max(batches),
        "num_parameters": metrics["num_parameters"],
        "num_steps": metrics["num_steps"],
        "transition": metrics["transition"],
        "pattern": metrics["pattern"],
        "pattern_parameters": [
            weight.tolist() for name, weight in sorted(weights.items()) if "pattern" in name
        ],
        "dev_examples": metrics["dev"]["examples"],
    }


def settings_of(task, attention, *changes):
    image = {"dataset": {"image_size": 8}} if task == "pathfinder" else {}
    changes = config.merge(BASE, image, *changes)
    return config.resolve(config.load("demo"), task, attention, 3, changes=changes)


@pytest.mark.parametrize(("block", "key"), EFFECTS, ids=map(".".join, EFFECTS))
def test_a_key_has_an_effect(observed, monkeypatch, block, key):
    value, shows_in, *usual = EFFECTS[block, key]
    attention = usual[0] if usual else "sat"
    about = dict(usual[1]) if len(usual) > 1 else {}
    task = about.pop("task", "listops")
    changed = settings_of(task, attention, about, {block: {key: value}})
    plain = settings_of(task, attention, about)
    assert changed[block][key] != plain[block][key]
    before, after = observed(plain, monkeypatch), observed(changed, monkeypatch)
    assert before[shows_in], f"{shows_in} is empty: the usual run does not show it"
    assert before[shows_in] != after[shows_in]


@pytest.mark.parametrize(
    "source", ["parameter", "pooled", "floodfill", "local", "bigbird", "random"]
)
@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_every_source_goes_with_every_model(observed, monkeypatch, source, pooling):
    model = {"tied_weights": True, "learn_pos_emb": False, "attention_dropout": 0.2}
    model |= {"pooling_mode": pooling}
    seen = observed(
        settings_of("listops", "sat", {"pattern": {"source": source}, "model": model}), monkeypatch
    )
    assert seen["transition"] == {"step": 5, "reason": "limit"}
    blocks = 64 // 16 if pooling == "MEAN" else 128 // 16
    assert seen["pattern"]["selected"] == [math.floor(0.3 * blocks**2)] * 2


@pytest.mark.parametrize(("block", "key"), SHOWN_ELSEWHERE, ids=map(".".join, SHOWN_ELSEWHERE))
def test_the_test_that_shows_the_effect_is_there(block, key):
    name, function = SHOWN_ELSEWHERE[block, key].split("::")
    tree = ast.parse((Path(__file__).parent / name).read_text())
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own = ("files", "text_column", "label_column")  # test_config.py::test_a_task_of_one_s_own
    if block == "dataset" and key not in own:  # and its value reaches the preprocessing
        task = {"dev_split": "text", "brackets": "listops", "max_length": "text"}
        value = {"dev_split": "lra", "brackets": False, "level": "curv_baseline"}
        task, value = task.get(key, "pathfinder"), value.get(key, 12)
        plain = config.load("demo")
        changes = {"settings": {task: {"dataset": {key: value}}}}
        changed = config.complete(config.merge(plain, changes))
        assert config.resolve_dataset(plain, task) != config.resolve_dataset(changed, task)


@pytest.mark.parametrize(("task", "attention", "changes", "words"), REFUSALS)
def test_what_would_have_no_effect_is_refused(task, attention, changes, words):
    with pytest.raises(config.ConfigError, match=words):
        settings_of(task, attention, changes)
