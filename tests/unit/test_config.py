"""The configuration: layers, defaults, caps, refusals; schema, files and dataclasses agree."""

import dataclasses
import json
import re
import shutil

import pytest

from sat import config


@pytest.fixture(scope="module")
def lra():
    return config.load("lra")


@pytest.mark.parametrize("run", ["lra", "demo"])
def test_the_configurations_of_the_repository_are_valid(run):
    loaded = config.load(run)
    assert loaded["run"] == run
    assert loaded["tasks"] == ["listops", "text", "retrieval", "image", "pathfinder"]
    for task in loaded["tasks"]:
        for attention in loaded["attentions"]:
            config.RunConfig.from_dict(config.resolve(loaded, task, attention, 1001))


@pytest.mark.parametrize(
    ("block", "cls"),
    [
        ("model", config.Model),
        ("training", config.Training),
        ("transition", config.Transition),
        ("pattern", config.Pattern),
    ],
)
def test_schema_and_dataclass_have_the_same_keys(block, cls):
    keys = set(config.schema()["$defs"][block]["properties"])
    assert keys == {field.name for field in dataclasses.fields(cls)}


def test_every_key_of_a_task_is_described():
    definitions = config.schema()["$defs"]
    for block in config.BLOCKS:
        for key, definition in definitions[block]["properties"].items():
            assert definition.get("description"), f"{block}.{key} has no description"


def test_later_layers_win(lra):
    changed = config.merge(
        lra,
        {"settings": {"cifar10": {"training": {"learning_rate": 0.5}, "model": {"density": 1}}}},
    )
    changed = config.complete(changed)
    resolved = config.resolve(
        changed, "image", "sat", 3, changes={"training": {"learning_rate": 0.25}}
    )
    assert resolved["training"]["learning_rate"] == 0.25
    assert resolved["model"]["density"] == 1
    assert resolved["model"]["block_size"] == 32  # config/tasks/image.yaml
    assert resolved["transition"]["rule"] == "settled"  # config/attentions/sat.yaml
    assert resolved["training"]["weight_decay"] == 0  # the schema's default


@pytest.mark.parametrize(
    ("everywhere", "here", "cap"),
    [(None, None, None), (9, None, 9), (None, 4, 4), (9, 4, 4), (4, 9, 4)],
)
def test_the_smaller_cap_holds(lra, everywhere, here, cap):
    changed = config.merge(
        lra, {"caps": {"train": everywhere}, "settings": {"text": {"dataset": {"train": here}}}}
    )
    dataset = config.resolve_dataset(config.complete(changed), "text")
    assert dataset["caps"] == {"train": cap, "dev": None, "test": None}
    assert dataset["options"] == {"dev_split": "holdout"}
    assert dataset["max_length"] == 4000


def test_preprocessing_does_not_depend_on_the_training(lra):
    changed = config.merge(lra, {"settings": {"listops": {"training": {"learning_rate": 0.1}}}})
    assert config.resolve_dataset(lra, "listops") == config.resolve_dataset(changed, "listops")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sedes": [1]}, ["sedes", "did you mean 'seeds'", "allowed"]),
        ({"seeds": ["one"]}, ["seeds.0", "'one'", "integer"]),
        ({"seeds": 1001}, ["seeds", "1001", "array"]),
        ({"tasks": ["listop"]}, ["listop", "did you mean 'listops'"]),
        ({"tasks": ["image", "cifar10"]}, ["twice"]),
        ({"attentions": ["sta"]}, ["sta", "did you mean 'sat'"]),
        (
            {"settings": {"listops": {"training": {"learning_rat": 1}}}},
            ["learning_rat", "learning_rate"],
        ),
        (
            {"settings": {"listops": {"training": {"learning_rate": "fast"}}}},
            ["learning_rate", "number"],
        ),
        ({"settings": {"listops": {"training": {"learning_rate": -1}}}}, ["learning_rate"]),
        (
            {"settings": {"listops": {"model": {"pooling_mode": "MAX"}}}},
            ["pooling_mode", "MEAN, CLS"],
        ),
        (
            {"settings": {"listops": {"dataset": {"level": "curv_baseline"}}}},
            ["dataset.level", "brackets"],
        ),
        (
            {"settings": {"listops": {"dataset": {"max_length": 4000}}}},
            ["max_length", "max_seq_len"],
        ),
        ({"settings": {"text": {"training": {"warmup": 10**6}}}}, ["warmup", "num_train_steps"]),
        ({"settings": {"text": {"pattern": {"min_per_row": 65}}}}, ["min_per_row", "64 blocks"]),
        ({"run": "../elsewhere"}, ["run"]),
        ({"data": "generated"}, ["demo"]),
        ({"caps": {"train": 0}}, ["caps.train"]),
        (
            {
                "sources": {
                    "x": {"file": "f", "urls": ["ftp://h/f"], "licence": "", "provenance": ""}
                }
            },
            ["urls"],
        ),
    ],
)
def test_what_is_wrong_is_named(lra, change, words):
    with pytest.raises(config.ConfigError) as caught:
        config.complete(config.merge(lra, change))
    for word in words:
        assert word in str(caught.value)


def test_a_dense_run_has_no_pattern(lra):
    change = {"settings": {"text": {"pattern": {"source": "pooled"}}}}
    with pytest.raises(config.ConfigError, match=r"softmax.*rule.*never"):
        config.complete(config.merge(lra, change))


def test_values_from_the_command_line_get_their_types():
    text = {
        "seeds": ["1", "2"],
        "caps": {"train": "null"},
        "run": "x",
        "settings": {"a": {"b": "1.5e-3"}},
    }
    assert config.typed(text) == {
        "seeds": [1, 2],
        "caps": {"train": None},
        "run": "x",
        "settings": {"a": {"b": 1.5e-3}},
    }


LEVELS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    "text, words",
    [
        ("a0: &a0 x\n" + LEVELS, "values once its aliases"),
        ("a: &a [*a]\n", "an alias (*name) stands inside what it repeats"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: b # " + "x" * 2**20, "more than 1 MiB"),
    ],
    ids=["bomb", "circle", "deep", "large"],
)
def test_a_hostile_file_is_refused(tmp_path, text, words):
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=f"hostile.yaml: .*{re.escape(words)}"):
        config.read_yaml(path)


def test_a_configuration_that_another_program_read_is_bounded_too(lra):
    bomb = ["listops"]
    for _ in range(30):
        bomb = [bomb] * 10
    with pytest.raises(config.ConfigError, match="values once its aliases"):
        config.complete(lra | {"tasks": bomb})


def test_unknown_run_set():
    with pytest.raises(config.ConfigError, match="config/nowhere.yaml"):
        config.load("nowhere")


def test_broken_yaml_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("run: [")
    with pytest.raises(config.ConfigError, match="broken.yaml"):
        config.read_yaml(path)


@pytest.mark.parametrize("name", ["cifar10", "lra-cifar10", "lra-image", "image"])
def test_aliases(name):
    assert config.canonical_task(name) == "image"


@pytest.mark.parametrize(
    ("max_seq_len", "pooling", "length"),
    [(1024, "MEAN", 1024), (1024, "CLS", 2048), (1000, "MEAN", 1024), (1023, "CLS", 1024)],
)
def test_padded_length(lra, max_seq_len, pooling, length):
    settings = config.resolve(lra, "image", "sat", 1)
    settings["dataset"]["max_length"] = 1000
    settings["model"] |= {"max_seq_len": max_seq_len, "pooling_mode": pooling}
    assert config.RunConfig.from_dict(settings).model.sequence_length == length


def test_digest_follows_content_not_order():
    assert config.digest({"a": 1, "b": 2}) == config.digest(json.loads('{"b": 2, "a": 1}'))
    assert config.digest({"a": 1}) != config.digest({"a": 2})


@pytest.mark.parametrize(
    ("name", "task"), [("news1", "agnews"), ("lra-agnews", "agnews"), ("yelp1", "yelp")]
)
def test_extra_tasks_are_used_when_they_are_named(lra, name, task):
    changed = config.complete(config.merge(lra, {"tasks": [name]}))
    assert changed["tasks"] == [task]
    dataset = config.resolve_dataset(changed, task)
    assert dataset["options"] == {"dev_split": "holdout"}
    for attention in changed["attentions"]:
        config.RunConfig.from_dict(config.resolve(changed, task, attention, 1001))


def test_the_usual_source_is_not_named(lra):
    assert "source" not in config.resolve_dataset(lra, "pathfinder")
    changed = config.merge(lra, {"read_from": {"pathfinder": "pathfinder_tfds"}})
    changed = config.complete(changed)
    assert config.resolve_dataset(changed, "pathfinder")["source"] == "pathfinder_tfds"
    assert "source" not in config.resolve_dataset(changed, "listops")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tasks": ["yelp"]}, "none of for yelp"),
        ({"read_from": {"retrieval": "aan_mirror"}}, "aan"),
    ],
)
def test_what_is_not_generated_is_named(change, word):
    with pytest.raises(config.ConfigError, match=word):
        config.complete(config.merge(config.load("demo"), change))


@pytest.mark.parametrize("key", ["run", "tasks", "attentions"])
@pytest.mark.parametrize("name", ["a; rm -rf x", "../other", "$(id)", "listops\n", "-f", ""])
def test_a_name_that_a_shell_or_a_path_could_read_otherwise_is_refused(key, name, lra, tmp_path):
    root = tmp_path / "project"
    for part in ("config", "workflow/schemas"):
        shutil.copytree(config.ROOT / part, root / part)
    for kind in ("tasks", "attentions"):
        if name not in ("", "../other"):  # a file of that name makes it no better
            (root / f"config/{kind}/{name}.yaml").write_text("model: {}\n")
    with pytest.raises(config.ConfigError, match=key):
        config.complete(lra | {key: name if key == "run" else [name]}, root=root)


def test_a_task_of_one_s_own(tmp_path):
    """One YAML: its files reach the preprocessing, beside generated data too, and no task of ours takes such keys."""
    for part in ("config", "workflow/schemas"):
        shutil.copytree(config.ROOT / part, tmp_path / part)
    text = (config.ROOT / "config/tasks/text.yaml").read_text()
    own = "{files: {train: a.csv, test: b.csv}, text_column: body, label_column: topic, max_length: 64}"
    lines = [f"dataset: {own}" if x.startswith("dataset:") else x for x in text.splitlines()]
    (tmp_path / "config/tasks/tickets.yaml").write_text("\n".join(lines))
    overlay = config.read_yaml(config.ROOT / "config/demo.yaml") | {"tasks": ["tickets"]}
    base = config.read_yaml(config.ROOT / "config/config.yaml")
    whole = config.complete(config.merge(base, overlay), root=tmp_path)
    options = config.resolve_dataset(whole, "tickets", tmp_path)["options"]
    files = {"train": "a.csv", "test": "b.csv"}
    assert options == {"files": files, "text_column": "body", "label_column": "topic"}
    changes = {"settings": {"text": {"dataset": {"files": files}}}}
    with pytest.raises(config.ConfigError, match="task text has no option 'dataset.files'"):
        config.resolve(config.merge(base, changes), "text", "sat", 1, tmp_path)
