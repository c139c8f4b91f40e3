"""Configuration: YAML files -> JSON schema -> the settings of one training.

The settings of a training are put together from four layers, each overriding the one before:
the defaults of workflow/schemas/config.schema.yaml, config/tasks/<task>.yaml,
config/attentions/<attention>.yaml and `settings: <task>:` of the run's configuration.
The Snakefile, the command line and the tests all go through this module; it imports neither torch nor TensorFlow.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "workflow/schemas/config.schema.yaml"
BLOCKS = ("dataset", "model", "training", "transition", "pattern")
ALIASES = {"cifar10": "image", "news1": "agnews", "yelp1": "yelp"}
# model.attention beside softmax: where its class is. One's own is given as package.module:Class.
EFFICIENT = {
    name: f"sat.efficient:{name.capitalize()}"
    for name in ("nystromformer", "linformer", "performer", "reformer", "skyformer")
}
PIXEL_TASKS = ("image", "pathfinder")
STATIC_PATTERNS = ("local", "bigbird", "random")
# Of a configuration; the largest ones of the repository have a few hundred values in 10 KB.
MAX_BYTES = 2**20
MAX_VALUES = 100_000


class ConfigError(ValueError):
    """What a user wrote into a configuration, or typed, cannot be used; the message says what can."""


# ---------------------------------------------------------------- schema


@cache
def schema(root: Path = ROOT) -> dict:
    return yaml.safe_load((root / SCHEMA).read_text())


def check(instance: Any, part: str | None, where: str, root: Path = ROOT) -> None:
    """Check `instance` against the schema, or against its `$defs` entry `part`.

    Raises ConfigError with the file (`where`), the key, what was found and what is allowed.
    """
    whole = schema(root)
    target = whole if part is None else {"$ref": f"#/$defs/{part}", "$defs": whole["$defs"]}
    errors = jsonschema.Draft202012Validator(target).iter_errors(instance)
    error = next(iter(sorted(errors, key=lambda e: (len(e.absolute_path), e.message))), None)
    if error is not None:
        raise ConfigError(f"{where}: {_explain(error)}")


def _explain(error: jsonschema.ValidationError) -> str:
    key = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        allowed = list(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(allowed))[0]
        name = f"{key}.{unknown}" if key else unknown
        return (
            f"unknown key '{name}'{nearest(unknown, allowed)}; allowed here: {', '.join(allowed)}"
        )
    if error.validator == "required":
        missing = [k for k in error.validator_value if k not in error.instance]
        return f"'{key or 'the configuration'}' lacks the key '{missing[0]}'"
    if error.validator == "type":
        wanted = error.validator_value
        wanted = " or ".join(wanted) if isinstance(wanted, list) else wanted
        return f"'{key}' is {error.instance!r}, expected {wanted}"
    if error.validator == "enum":
        return (
            f"'{key}' is {error.instance!r}, allowed: {', '.join(map(str, error.validator_value))}"
        )
    return f"'{key}': {error.message}"


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' when a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def with_defaults(instance: dict, definition: dict, definitions: dict) -> dict:
    """A copy of `instance` with the schema's defaults filled in, objects included."""
    if "$ref" in definition:
        definition = {**definitions[definition["$ref"].rsplit("/", 1)[1]], **definition}
    filled = copy.deepcopy(instance)
    for key, child in definition.get("properties", {}).items():
        if "$ref" in child:
            child = {**definitions[child["$ref"].rsplit("/", 1)[1]], **child}
        if key not in filled and "default" in child:
            filled[key] = copy.deepcopy(child["default"])
        if isinstance(filled.get(key), dict):
            filled[key] = with_defaults(filled[key], child, definitions)
    return filled


def merge(*layers: Mapping) -> dict:
    """Deep union of mappings, later ones win; anything but a mapping is replaced whole."""
    merged: dict = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def typed(value: Any) -> Any:
    """Snakemake hands over what stands inside brackets after --config as text; read it as YAML does ('1' -> 1)."""
    if isinstance(value, dict):
        return {key: typed(child) for key, child in value.items()}
    if isinstance(value, list):
        return [typed(child) for child in value]
    return yaml.safe_load(value) if isinstance(value, str) else value


# ---------------------------------------------------------------- the configuration of a run set


@cache
def _parsed(text: str) -> Any:
    """A plan of a thousand trainings reads the same files a hundred times."""
    return yaml.safe_load(text)


def read_yaml(path: Path) -> dict:
    """The mapping in a file. Raises ConfigError, also for a file too large to be a configuration."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ConfigError(
                f"{path}: more than {MAX_BYTES >> 20} MiB, which no configuration needs"
            )
        content = copy.deepcopy(_parsed(text))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(content).__name__}")
    check_size(content, str(path))
    return content


def check_size(content: Any, where: str) -> None:
    """Raises ConfigError for more than MAX_VALUES values, each counted as often as YAML's aliases (*name) repeat it."""
    counts: dict[int, int] = {}  # by identity; 0 while its parts are counted

    def count(value: Any) -> int:
        if not isinstance(value, (dict, list)):
            return 1
        if id(value) not in counts:
            counts[id(value)] = 0
            parts = value.values() if isinstance(value, dict) else value
            counts[id(value)] = 1 + sum(map(count, parts))
        elif counts[id(value)] == 0:
            raise ConfigError(f"{where}: an alias (*name) stands inside what it repeats")
        return counts[id(value)]

    try:
        too_many = count(content) > MAX_VALUES
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    if too_many:
        raise ConfigError(
            f"{where}: more than {MAX_VALUES} values once its aliases (*name) are written out"
        )


def load(run: str, root: Path = ROOT) -> dict:
    """The configuration of the run set `run`: config/config.yaml, and config/<run>.yaml over it where there is one.

    Raises ConfigError when no configuration has that name.
    """
    config = read_yaml(root / "config/config.yaml")
    if config.get("run") != run:
        overlay = root / "config" / f"{run}.yaml"
        if not overlay.is_file():
            raise ConfigError(f"unknown run set '{run}': there is no config/{run}.yaml")
        config = merge(config, read_yaml(overlay))
    return complete(config, where=f"configuration of run '{run}'", root=root)


def complete(config: Mapping, where: str = "configuration", root: Path = ROOT) -> dict:
    """Check a run set's configuration whole, its task and attention files included, and fill in the defaults.

    Raises ConfigError; nothing needs to run to find a wrong key of any task.
    """
    config = dict(config)
    check_size(config, where)
    check(config, None, where, root)
    config = with_defaults(config, schema(root), schema(root)["$defs"])
    _check_llama(config["llama"], where, root)
    config["tasks"] = [canonical_task(task, root) for task in config["tasks"]]
    if len(set(config["tasks"])) < len(config["tasks"]):
        raise ConfigError(f"{where}: 'tasks' names a task twice: {', '.join(config['tasks'])}")
    by_task: dict = {}
    for name, changes in config["settings"].items():  # under its own name and an alias: both count
        task = canonical_task(name, root)
        by_task[task] = merge(by_task.get(task, {}), changes)
    config["settings"] = by_task
    if config["data"] == "generated":
        if "demo" not in config:
            raise ConfigError(f"{where}: data is 'generated', which needs the key 'demo'")
        own = {task for task in config["tasks"] if _has_files(config, task, root)}
        if extra := sorted(set(config["tasks"]) - own - config["demo"].keys()):
            raise ConfigError(
                f"{where}: data is 'generated', which there is none of for {extra[0]}"
            )
        if others := sorted(set(config["read_from"].values()) - {"lra_release"}):
            raise ConfigError(
                f"{where}: data is 'generated', which has no source '{others[0]}' (read_from)"
            )
    for task in config["tasks"]:
        for attention in config["attentions"]:
            resolve(config, task, attention, config["seeds"][0], root)
    return config


def _check_llama(llama: Mapping, where: str, root: Path) -> None:
    """ConfigError when another version of llama.cpp keeps the default version's hashes: its source would be taken."""
    keys = schema(root)["properties"]["llama"]["properties"]
    if llama["version"] == keys["version"]["default"]:
        return
    if kept := [
        f"llama.{key}" for key in ("sha256", "commit") if llama[key] == keys[key]["default"]
    ]:
        raise ConfigError(
            f"{where}: 'llama.version' is '{llama['version']}', but {' and '.join(kept)} "
            f"{'is that' if len(kept) == 1 else 'are those'} of {keys['version']['default']}: "
            "give the version's own, or null to take what comes and record it"
        )


def _has_files(config: Mapping, task: str, root: Path) -> bool:
    """Whether the task is a user's own, with files of its own."""
    attention, seed = config["attentions"][0], config["seeds"][0]
    return bool(resolve(config, task, attention, seed, root)["dataset"].get("files"))


def known(kind: str, root: Path = ROOT) -> list[str]:
    """Names of the files in config/<kind>/ (kind: tasks or attentions)."""
    return sorted(path.stem for path in (root / "config" / kind).glob("*.yaml"))


def canonical_task(name: str, root: Path = ROOT) -> str:
    """The task that `name` means: itself, an alias (cifar10), or lra-<task>. Raises ConfigError."""
    bare = name.removeprefix("lra-")
    bare = ALIASES.get(bare, bare)
    tasks = known("tasks", root)
    if bare not in tasks:
        hint = nearest(bare, [*tasks, *ALIASES])
        raise ConfigError(f"unknown task '{name}'{hint}; tasks: {', '.join([*tasks, *ALIASES])}")
    return bare


def canonical_attention(name: str, root: Path = ROOT) -> str:
    attentions = known("attentions", root)
    if name not in attentions:
        hint = nearest(name, attentions)
        raise ConfigError(f"unknown attention '{name}'{hint}; attentions: {', '.join(attentions)}")
    return name


# ---------------------------------------------------------------- the settings of one training


def resolve(
    config: Mapping,
    task: str,
    attention: str,
    seed: int,
    root: Path = ROOT,
    changes: Mapping | None = None,
) -> dict:
    """Every setting of the training (task, attention, seed), as plain JSON values.

    `changes` are laid over all else (flags of the command line). Raises ConfigError.
    """
    task, attention = canonical_task(task, root), canonical_attention(attention, root)
    layers = [config.get("settings", {}).get(task, {}), changes or {}]
    for kind, name in (("attentions", attention), ("tasks", task)):
        path = root / "config" / kind / f"{name}.yaml"
        layers.insert(0, read_yaml(path))
        check(layers[0], "task", f"config/{kind}/{name}.yaml", root)
        if kind == "attentions" and "dataset" in layers[0]:
            raise ConfigError(
                f"config/attentions/{name}.yaml: 'dataset' belongs into config/tasks/: all attentions "
                "of a task read the same data"
            )
    task_options = layers[0].get("dataset", {})
    settings = merge(*layers)
    check(settings, "task", f"settings of {task} with {attention}", root)
    for key in settings.get("dataset", {}):
        if key not in task_options:
            raise ConfigError(
                f"task {task} has no option 'dataset.{key}'; it has: {', '.join(task_options)}"
            )
    settings = filled_in({block: {} for block in BLOCKS} | settings, root)
    settings["dataset"] = with_caps(settings["dataset"], config.get("caps", {}))
    resolved = {
        "run": config["run"],
        "task": task,
        "attention": attention,
        "seed": seed,
        **settings,
    }
    RunConfig.from_dict(resolved)
    return resolved


def checked_run(settings: Any, root: Path = ROOT) -> dict:
    """`resolve`'s dictionary as it comes back from a command line. Raises ConfigError."""
    keys = {"run": str, "task": str, "attention": str, "seed": int}
    if not isinstance(settings, dict):
        raise ConfigError("--settings: expected an object")
    for key, kind in keys.items():
        if not isinstance(settings.get(key), kind):
            raise ConfigError(
                f"--settings: '{key}' is {settings.get(key)!r}, expected {kind.__name__}"
            )
    blocks = {key: value for key, value in settings.items() if key not in keys}
    check(blocks, "task", "--settings", root)
    RunConfig.from_dict({block: {} for block in BLOCKS} | settings)
    return settings


def filled_in(settings: Mapping, root: Path = ROOT) -> dict:
    """The settings of a training with the defaults of the keys that it does not have."""
    definitions = schema(root)["$defs"]
    blocks = {key: value for key, value in settings.items() if key in BLOCKS}
    return {**settings, **with_defaults(blocks, definitions["task"], definitions)}


def with_caps(dataset: Mapping, caps: Mapping) -> dict:
    """The dataset block with the run's caps applied: of two limits the smaller one holds."""
    limited = dict(dataset)
    for split in ("train", "dev", "test"):
        limits = [n for n in (dataset.get(split), caps.get(split)) if n is not None]
        limited[split] = min(limits, default=None)
    return limited


def resolve_dataset(config: Mapping, task: str, root: Path = ROOT) -> dict:
    """What the preprocessing of a task depends on, and nothing else.

    {task, caps, max_length, options}, and {source} where it is not the task's only one or the usual one.
    """
    dataset = resolve(config, task, config["attentions"][0], config["seeds"][0], root)["dataset"]
    caps = {split: dataset.pop(split) for split in ("train", "dev", "test")}
    settings = {"task": task, "caps": caps, "max_length": dataset.pop("max_length")}
    source = config.get("read_from", {}).get(task, "lra_release")
    return settings | {"options": dataset} | ({"source": source} if source != "lra_release" else {})


@dataclasses.dataclass(frozen=True)
class Model:
    vocab_size: int
    max_seq_len: int
    num_classes: int
    learn_pos_emb: bool
    tied_weights: bool
    embedding_dim: int
    transformer_dim: int
    transformer_hidden_dim: int
    head_dim: int
    num_head: int
    num_layers: int
    dropout_prob: float
    attention_dropout: float
    pooling_mode: str
    block_size: int
    batch_size: int | None
    memory_limit_gb: float | None
    density: float
    denominator: str
    zero_pixel_is_padding: bool
    attention: str
    landmarks: int
    projection: int
    features: int
    hashes: int
    bucket_size: int
    attention_arguments: dict

    @property
    def sequence_length(self) -> int:
        """S: the next power of two that holds max_seq_len ids and, with CLS pooling, the class token."""
        longest = self.max_seq_len + (self.pooling_mode == "CLS")
        return 1 << (longest - 1).bit_length()

    @property
    def num_blocks(self) -> int:
        """nb: blocks along one side of the attention map."""
        return self.sequence_length // self.block_size


@dataclasses.dataclass(frozen=True)
class Training:
    batch_size: int
    learning_rate: float
    warmup: int
    lr_decay: str
    cycle_beta1: bool
    weight_decay: float
    eval_frequency: int
    num_train_steps: int
    num_init_steps: int | None
    num_eval_steps: int | None
    num_dense_train_steps: int | None
    attn_loss_scale: float
    skewness: float
    distance: float
    patience: int | None
    precision: str
    compile: bool
    checkpoint_seconds: float


@dataclasses.dataclass(frozen=True)
class Transition:
    rule: str
    ema: float
    padded_queries: str
    learning_rate: str


@dataclasses.dataclass(frozen=True)
class Pattern:
    source: str
    min_per_row: int


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings of one training; the only configuration that model and training see."""

    run: str
    task: str
    attention: str
    seed: int
    dataset: dict
    model: Model
    training: Training
    transition: Transition
    pattern: Pattern

    @classmethod
    def from_dict(cls, settings: Mapping) -> RunConfig:
        """Build from `resolve`'s dictionary. Raises ConfigError for settings that contradict each other."""
        config = cls(
            **{key: settings[key] for key in ("run", "task", "attention", "seed", "dataset")},
            **{
                block.__name__.lower(): _build(block, settings[block.__name__.lower()])
                for block in (Model, Training, Transition, Pattern)
            },
        )
        model, training = config.model, config.training
        if "max_length" not in config.dataset:
            raise ConfigError(f"task {config.task}: 'dataset' lacks the key 'max_length'")
        if config.dataset["max_length"] > model.max_seq_len:
            raise ConfigError(
                f"task {config.task}: dataset.max_length {config.dataset['max_length']} is more than "
                f"model.max_seq_len {model.max_seq_len}"
            )
        if model.sequence_length % model.block_size:
            raise ConfigError(
                f"task {config.task}: model.block_size {model.block_size} is more than the padded length "
                f"{model.sequence_length}"
            )
        if training.warmup > training.num_train_steps:
            raise ConfigError(
                f"task {config.task}: training.warmup {training.warmup} is more than "
                f"training.num_train_steps {training.num_train_steps}"
            )
        _check_method(config)
        first, last = training.num_init_steps, training.num_dense_train_steps
        if first is not None and last is not None and first > last:
            raise ConfigError(
                f"task {config.task}: training.num_init_steps {first} is more than "
                f"training.num_dense_train_steps {last}"
            )
        if model.zero_pixel_is_padding and config.task not in PIXEL_TASKS:
            raise ConfigError(
                f"task {config.task}: model.zero_pixel_is_padding is for pixels: {', '.join(PIXEL_TASKS)}"
            )
        if model.zero_pixel_is_padding and model.pooling_mode == "CLS":
            raise ConfigError(
                f"task {config.task}: model.zero_pixel_is_padding is about MEAN pooling, "
                "model.pooling_mode is CLS"
            )
        return config


def _check_method(config: RunConfig) -> None:
    """Raises ConfigError where attention, switch and pattern do not go together."""
    model, rule, source = config.model, config.transition.rule, config.pattern.source
    who = f"attention {config.attention}"
    if (rule == "never") != (source == "none"):
        raise ConfigError(
            f"{who}: transition.rule '{rule}' does not go with pattern.source '{source}': "
            "a dense run has rule never and source none"
        )
    if rule == "start" and source not in STATIC_PATTERNS:
        raise ConfigError(
            f"{who}: pattern.source '{source}' is learned in a dense phase, which transition.rule 'start' leaves out; "
            f"sources without one: {', '.join(STATIC_PATTERNS)}"
        )
    if config.pattern.min_per_row > model.num_blocks:
        raise ConfigError(
            f"{who}: pattern.min_per_row {config.pattern.min_per_row} is more than the {model.num_blocks} "
            "blocks of a row"
        )
    if model.attention == "softmax" or model.attention in EFFICIENT:
        if model.attention_arguments:
            raise ConfigError(
                f"{who}: model.attention_arguments are for an attention of your own, not for '{model.attention}'"
            )
    elif ":" not in model.attention:
        known_ones = ["softmax", *EFFICIENT]
        raise ConfigError(
            f"{who}: unknown model.attention '{model.attention}'{nearest(model.attention, known_ones)}; there are "
            f"{', '.join(known_ones)}, and package.module:Class for your own"
        )
    if model.attention == "softmax":
        return
    if rule != "never":
        raise ConfigError(
            f"{who}: model.attention '{model.attention}' has no blocks to choose; transition.rule must be never"
        )
    if model.attention_dropout:
        raise ConfigError(
            f"{who}: model.attention_dropout drops attention weights, which only softmax has; "
            f"set it to 0 for model.attention '{model.attention}'"
        )
    S = model.sequence_length
    parts = {
        "nystromformer": ("landmarks", model.landmarks, "must divide"),
        "reformer": ("bucket_size", 2 * model.bucket_size, "must, doubled, divide"),
        "linformer": ("projection", model.projection, "must be at most"),
    }
    if model.attention in parts:
        key, size, words = parts[model.attention]
        if size > S or ("divide" in words and S % size):
            raise ConfigError(
                f"{who}: model.{key} {getattr(model, key)} {words} the padded length {S} of task {config.task}"
            )
    if model.attention == "skyformer" and model.landmarks % 2:
        raise ConfigError(
            f"{who}: model.landmarks {model.landmarks} must be even: half are queries, half keys"
        )


def _build(cls: type, values: Mapping) -> Any:
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values]
    if missing:
        raise ConfigError(f"'{cls.__name__.lower()}' lacks the key '{missing[0]}'")
    return cls(**values)


def digest(settings: Mapping) -> str:
    """sha256 of settings in canonical JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
