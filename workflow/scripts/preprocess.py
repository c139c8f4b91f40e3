"""Turn the raw files of one task into Arrow: train, dev and test, with a manifest.

    python preprocess.py --task listops --config JSON --run-data data/lra --output-dir data/lra/listops

JSON: {"task", "caps": {"train": int|null, "dev": ..., "test": ...}, "max_length": int, "options": {...},
"source": str}. Options: text, agnews, yelp {"dev_split": "holdout"|"lra"}, listops {"brackets": bool},
pathfinder {"level", "image_size"}. Source: where a task can be read from two places, which one (SOURCES).

Rows that cannot be used are left out, counted and listed in the manifest. The same input gives the same
bytes on every machine and in every process. All files of a task appear at once, the manifest last.

A cap leaves each label its share. Texts are chosen by their content, the same ones in whatever order the files
hold them; images by their place in the order of TFDS, which their keys decide (lra/readers.py).
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from lra import readers
from lra.arrow import keep_rows, row_keys, write_arrow
from lra.encode import ID_OFFSET, SYMBOLS
from lra.files import (
    parse_json,
    progress,
    read_json,
    run_script,
    scratch_folder,
    sha256_file,
    write_json,
)
from lra.order import choose_capped, choose_holdout
from lra.readers import PATHFINDER_SALTS, PathfinderLevel, Refused

sys.path.append(str(Path(__file__).resolve().parents[2]))
from sat import seal  # noqa: E402

SPLITS = ("train", "dev", "test")
ALIASES = {"cifar10": "image", "news1": "agnews", "yelp1": "yelp"}
HOLDOUT_SHARE = 0.1
# By source: the tasks that can be read from it (a task's first source is its default), and the records of its
# archives: all of one of these groups (the archive as downloaded, or as demo_archives.py names it).
SOURCES = {
    "lra_release": (("listops", "retrieval", "pathfinder"), [("lra_release.gz",)]),
    "listops_tsv": (
        ("listops",),
        [tuple(f"basic_{split}.tsv" for split in ("train", "val", "test"))],
    ),
    "aan_mirror": (
        ("retrieval",),
        [tuple(f"new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test"))],
    ),
    "pathfinder_tfds": (("pathfinder",), [("pathfinder_tfds.gz",)]),
    "imdb_reviews": (("text",), [("aclImdb_v1.tar.gz",), ("imdb_reviews",)]),
    "cifar10": (("image",), [("cifar-10-binary.tar.gz",), ("cifar10",)]),
    "ag_news_subset": (("agnews",), [("ag_news_csv.tar.gz",)]),
    "yelp_polarity_reviews": (("yelp",), [("yelp_review_polarity_csv.tgz",)]),
}
TFDS_FOLDERS = {
    "imdb_reviews": "imdb_reviews/plain_text/1.0.0",
    "cifar10": "cifar10/3.0.2",
    "pathfinder_tfds": "pathfinder32/1.0.0",
    "ag_news_subset": "ag_news_subset/1.0.0",
    "yelp_polarity_reviews": "yelp_polarity_reviews/0.2.0",
}
TEXT_FEATURES = {"text": "text", "agnews": "description", "yelp": "text"}

BYTES = pa.list_(pa.uint8())
TASKS = {
    "listops": {"input_type": "text", "num_classes": 10, "vocab_size": len(SYMBOLS) + 1},
    "text": {"input_type": "text", "num_classes": 2, "vocab_size": 257},
    "retrieval": {"input_type": "text", "num_classes": 2, "vocab_size": 257},
    "agnews": {"input_type": "text", "num_classes": 4, "vocab_size": 257},
    "yelp": {"input_type": "text", "num_classes": 2, "vocab_size": 257},
    "image": {"input_type": "image", "num_classes": 10, "vocab_size": 256},
    "pathfinder": {"input_type": "image", "num_classes": 2, "vocab_size": 256},
}
OPTIONS = {
    "listops": {"brackets": True},
    "text": {"dev_split": "holdout"},
    "agnews": {"dev_split": "holdout"},
    "yelp": {"dev_split": "holdout"},
    "retrieval": {},
    "image": {},
    "pathfinder": {"level": "curv_contour_length_14", "image_size": 32},
}
CHOICES = {
    "brackets": (True, False),
    "dev_split": ("holdout", "lra"),
    "level": tuple(PATHFINDER_SALTS),
}

Batches = dict[str, Iterator[pa.RecordBatch]]


def preprocess(task: str, config: dict, run_data: Path, output_dir: Path) -> dict:
    """Write {train,dev,test}.arrow and manifest.json below `output_dir`; returns the manifest.

    ValueError, and nothing written, when a source is missing, an option is unknown or a split is empty.
    """
    options, caps, max_length, source = checked_config(task, config)
    sources = source_records(source, run_data)
    described = {
        "data": "generated" if any(s["data"] == "generated" for s in sources) else "released",
        **TASKS[task],
        "max_length": max_length,
        "options": options,
        "sources": sources,
    }
    if task == "listops":
        described["symbols"] = list(SYMBOLS)
    return write_task(
        task,
        schema_of(task, max_length),
        lambda: open_task(task, source, options, caps, max_length, run_data),
        caps,
        described,
        output_dir,
    )


def write_task(
    task: str,
    schema: pa.Schema,
    open_splits: Callable[[], tuple[Batches, dict[str, Refused]]],
    caps: dict[str, int | None],
    described: dict,
    output_dir: Path,
) -> dict:
    """Write the splits that `open_splits` reads, a tenth of train as dev where it has none; returns the manifest.

    described: what the manifest says of the task beside its splits. All files appear at once. ValueError, and nothing
    written, when a split is empty.
    """
    num_classes, input_type = described["num_classes"], described["input_type"]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output_dir.parent / f".{output_dir.name}.tmp") as scratch:
        paths = {split: scratch / f"{split}.arrow" for split in SPLITS}
        batches, refused = open_splits()
        facts = {}
        for split, rows in batches.items():
            with progress(f"{task} {split}", "rows") as add:
                facts[split] = write_arrow(paths[split], schema, counted(rows, add), num_classes)
        if "dev" not in batches:
            keys = row_keys(paths["train"], "holdout")[1]
            chosen = choose_holdout(keys, HOLDOUT_SHARE)
            for split, keep in (("dev", chosen), ("train", ~chosen)):
                facts[split] = keep_rows(paths["train"], keep, paths[split], num_classes)
        for split in SPLITS:
            if caps[split] is not None and input_type == "text":
                labels, keys = row_keys(paths[split], "cap")
                keep = choose_capped(labels, keys, caps[split])
                facts[split] = keep_rows(paths[split], keep, paths[split], num_classes)
        manifest = {
            "schema_version": 1,
            "task": task,
            "num_inputs": len(schema.names) - 1,
            "padding_id": 0 if input_type == "text" else None,
            # What to add to the values of an Arrow file to get ids.
            "id_offset": ID_OFFSET if described["vocab_size"] == 257 else 0,
            "caps": caps,
            "splits": {
                split: facts[split]
                | {
                    "file": paths[split].name,
                    "sha256": sha256_file(paths[split]),
                    "bytes": paths[split].stat().st_size,
                    "refused": refused[split].first,
                    "num_refused": refused[split].count,
                }
                for split in SPLITS
            },
        } | described
        for split in SPLITS:
            if not manifest["splits"][split]["rows"]:
                first = refused[split].first[:1]
                raise ValueError(
                    f"{task}: the {split} split has no rows: {refused[split].count} refused"
                    f"{f', the first: {first[0]}' if first else ''}; caps {caps}"
                )
        output_dir.mkdir(exist_ok=True)
        # An old manifest must not describe new rows, should this be stopped half way.
        (output_dir / "manifest.json").unlink(missing_ok=True)
        for path in paths.values():
            os.replace(path, output_dir / path.name)
    write_json(output_dir / "manifest.json", seal.add(manifest))
    return manifest


def counted(
    batches: Iterable[pa.RecordBatch], add: Callable[[int], None]
) -> Iterator[pa.RecordBatch]:
    """The same batches; `add` is called with the number of rows of each."""
    for batch in batches:
        add(batch.num_rows)
        yield batch


def checked_config(task: str, config: dict) -> tuple[dict, dict, int, str]:
    """Options with their defaults, caps of all splits, length and source; ValueError names a wrong key."""
    if config.get("task", task) != task:
        raise ValueError(f"--config is of task {config['task']!r}, --task says {task!r}")
    options = config.get("options") or {}
    if unknown := sorted(options.keys() - OPTIONS[task].keys()):
        raise ValueError(f"{task} has no option {unknown}; it has {sorted(OPTIONS[task])}")
    options = OPTIONS[task] | options
    for key, value in options.items():
        if key in CHOICES and not any(value is c or value == c for c in CHOICES[key]):
            raise ValueError(f"option {key} of {task} is {value!r}, expected one of {CHOICES[key]}")
    caps = config.get("caps") or {}
    if unknown := sorted(caps.keys() - set(SPLITS)):
        raise ValueError(f"caps has the unknown splits {unknown}, expected {list(SPLITS)}")
    caps = {split: caps.get(split) for split in SPLITS}
    for split, cap in caps.items():
        if cap is not None and (type(cap) is not int or cap < 1):
            raise ValueError(f"caps.{split} is {cap!r}, expected a number of rows or null")
    max_length = config["max_length"]
    side = {"image": 32, "pathfinder": options.get("image_size")}.get(task)
    if side and max_length != side**2:
        raise ValueError(
            f"{task}: max_length is {max_length}, but images of {side}x{side} have {side**2} pixels"
        )
    sources = [name for name, (tasks, _) in SOURCES.items() if task in tasks]
    source = config.get("source", sources[0])
    if source not in sources:
        raise ValueError(f"source of {task} is {source!r}, expected one of {sources}")
    return options, caps, max_length, source


def schema_of(task: str, max_length: int) -> pa.Schema:
    """Columns of the task's Arrow files."""
    pixels = pa.list_(pa.uint8(), max_length)
    inputs = {
        "listops": [pa.list_(pa.uint8())],
        "retrieval": [BYTES, BYTES],
        "image": [pixels],
        "pathfinder": [pixels],
    }.get(task, [BYTES])
    fields = [(f"input_ids_{index}", kind) for index, kind in enumerate(inputs)]
    return pa.schema([*fields, ("label", pa.uint8())])


def source_records(source: str, run_data: Path) -> list[dict]:
    """The records of a source's archives, less what differs between machines (address, folder)."""
    _, groups = SOURCES[source]
    for names in groups:
        paths = [run_data / "archives" / f"{name}.source.json" for name in names]
        if all(path.exists() for path in paths):
            records = map(read_json, paths)
            return [{k: v for k, v in record.items() if k != "url"} for record in records]
    raise ValueError(
        f"{run_data / 'archives' / groups[0][0]}.source.json is missing: download.py or "
        "demo_archives.py makes it"
    )


def check_extracted(task: str, source: str, options: dict, raw: Path) -> None:
    """ValueError when a raw file that the task reads is not the one that extract.py wrote and recorded."""
    record = raw / "files.json"
    if source != "lra_release" or not record.is_file():
        return
    again = f"delete {raw} and run extract.py, or the same command of snakemake, again"
    sealed = seal.read(record, again)
    names = [name for name in sealed.get(seal.FILES, {}) if name.startswith(f"{task}/")]
    if task == "pathfinder":
        names = [f"pathfinder/{options['level']}.tar"]
    seal.check_files(raw, sealed, names, again)


def open_task(
    task: str, source: str, options: dict, caps: dict, max_length: int, run_data: Path
) -> tuple[Batches, dict[str, Refused]]:
    """Batches of each split that the task's source has, and where its refused rows are noted."""
    refused = {split: Refused() for split in SPLITS}
    raw = run_data / "raw"
    check_extracted(task, source, options, raw)
    tsv_folder = raw / task if source == "lra_release" else run_data / "archives"
    if task == "listops":
        names = {"train": "train", "dev": "val", "test": "test"}
        batches = {
            split: readers.read_listops(
                tsv_folder / f"basic_{name}.tsv", max_length, options["brackets"], refused[split]
            )
            for split, name in names.items()
        }
    elif task == "retrieval":
        names = {"train": "train", "dev": "eval", "test": "test"}
        batches = {
            split: readers.read_retrieval(
                tsv_folder / f"new_aan_pairs.{name}.tsv", max_length, refused[split]
            )
            for split, name in names.items()
        }
    elif source == "lra_release":
        level = options["level"]
        data = PathfinderLevel(raw / f"pathfinder/{level}.tar", level, PATHFINDER_SALTS[level])
        refused = data.refused
        batches = {split: data.read(split, options["image_size"], caps[split]) for split in SPLITS}
    else:
        folder = run_data / "tfds" / TFDS_FOLDERS[source]
        parts = {"train": ("train", 0, 100), "test": ("test", 0, 100)}
        if task == "image":
            parts |= {"train": ("train", 0, 90), "dev": ("train", 90, 100)}
        elif task == "pathfinder":
            name = PATHFINDER_SALTS[options["level"]]
            parts = {"train": (name, 0, 80), "dev": (name, 80, 90), "test": (name, 90, 100)}
        elif options["dev_split"] == "lra":
            parts["dev"] = parts["test"]
        num_classes = TASKS[task]["num_classes"]
        batches = {
            split: readers.read_tfds_images(
                folder, part, round(max_length**0.5), num_classes, caps[split], refused[split]
            )
            if task in ("image", "pathfinder")
            else readers.read_tfds_text(
                folder, part, TEXT_FEATURES[task], num_classes, max_length, refused[split]
            )
            for split, part in parts.items()
        }
    return batches, refused


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--config", required=True, help="caps, max_length and options, JSON")
    parser.add_argument("--run-data", required=True, type=Path, help="data/<run>")
    parser.add_argument("--output-dir", required=True, type=Path, help="data/<run>/<task>")
    args = parser.parse_args()
    name = args.task.removeprefix("lra-")
    task = ALIASES.get(name, name)
    if task not in TASKS:
        raise ValueError(f"unknown task {args.task!r}, expected one of {', '.join(TASKS)}")
    manifest = preprocess(task, parse_json(args.config, "--config"), args.run_data, args.output_dir)
    say(manifest)


def say(manifest: dict) -> None:
    """Print what was written, and the first rows that were left out."""
    task = manifest["task"]
    for split, facts in manifest["splits"].items():
        print(f"{task} {split}: {facts['rows']:,} rows, {facts['num_refused']:,} refused")
        for row in facts["refused"]:
            print(f"  refused {row['file']}:{row['line']}: {row['reason']}")


if __name__ == "__main__":
    run_script(main)
