"""Make small archives in the layout of the real ones, for runs without network.

    python demo_archives.py --config JSON --output-dir data/demo

Writes archives/lra_release.gz (ListOps, AAN-like pairs, Pathfinder), the TFDS data sets
tfds/imdb_reviews/plain_text/1.0.0 and tfds/cifar10/3.0.2, and their records, which say "generated". ListOps
and Pathfinder are the genuine tasks at smaller sizes; pairs, reviews and images are stand-ins: see lra/.
The same configuration gives the same bytes.

JSON: {"seed", "listops": {"train", "dev", "test", "min_length", "max_length", "max_depth", "max_args"},
"retrieval": {"train", "dev", "test", "length"}, "pathfinder": {"examples", "image_size",
"contour_length", "distractor_length", "level"}, "text": {"train", "test", "length"},
"image": {"train", "test"}}.
"""

import argparse
import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import numpy as np
from lra.files import parse_json, run_script, sha256_file, write_json
from lra.generate_listops import generate_rows
from lra.generate_pathfinder import generate_images
from lra.generate_stand_ins import generate_digits, generate_pairs, generate_reviews
from lra.tfds_folder import write_tfds

KEYS = {
    "listops": {"train", "dev", "test", "min_length", "max_length", "max_depth", "max_args"},
    "retrieval": {"train", "dev", "test", "length"},
    "pathfinder": {"examples", "image_size", "contour_length", "distractor_length", "level"},
    "text": {"train", "test", "length"},
    "image": {"train", "test"},
}
NUM_FOLDERS = 12
ROOT = "lra_release/lra_release"

Members = Iterator[tuple[str, bytes]]


def generate(config: dict, output_dir: Path) -> None:
    """Write all archives and data sets of `config` below `output_dir`; ValueError names a bad key."""
    check(config)
    archives = output_dir / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    archive = archives / "lra_release.gz"
    write_tar_gz(archive, release_members(config))
    parts = ("listops", "retrieval", "pathfinder")
    write_record(archives, "lra_release.gz", "lra_release", [archive], config, parts)

    reviews = {
        split: generate_reviews(
            config["text"][split],
            Random(f"{config['seed']} text {split}"),
            config["text"]["length"],
        )
        for split in ("train", "test")
    }
    files = write_tfds("imdb_reviews/plain_text:1.0.0", output_dir / "tfds", reviews)
    write_record(archives, "imdb_reviews", "imdb_reviews", files, config, ("text",))

    digits = generate_digits(
        config["image"]["train"],
        config["image"]["test"],
        np.random.default_rng([config["seed"], 4]),
    )
    files = write_tfds("cifar10:3.0.2", output_dir / "tfds", digits)
    write_record(archives, "cifar10", "cifar10", files, config, ("image",))


def check(config: dict) -> None:
    """ValueError when a key is missing or unknown."""
    expected = {"seed", *KEYS}
    if config.keys() != expected:
        raise ValueError(f"--config has the keys {sorted(config)}, expected {sorted(expected)}")
    for task, keys in KEYS.items():
        if config[task].keys() != keys:
            raise ValueError(
                f"--config: {task} has the keys {sorted(config[task])}, expected {sorted(keys)}"
            )


def release_members(config: dict) -> Members:
    """Names and contents of the release's members, its oddities included."""
    listops = dict(listops_files(config))
    # The release holds ListOps twice and a broken Pathfinder one folder up; readers must pass them by.
    for name in listops:
        yield f"lra_release/listops-1000/{name}", b"Source\tTarget\n( [MAX 1 ) 2 ) ] )\t2\n"
    yield "lra_release/pathfinder128/curv_baseline/imgs/0/sample_0.png", b"broken"
    for name, data in listops.items():
        yield f"{ROOT}/listops-1000/{name}", data
    for name, data in pathfinder_files(config):
        yield f"{ROOT}/pathfinder32/{config['pathfinder']['level']}/{name}", data
    for name, data in retrieval_files(config):
        yield f"{ROOT}/tsv_data/{name}", data


def listops_files(config: dict) -> Members:
    """basic_{train,val,test}.tsv; the validation file ends its lines in CRLF."""
    limits = dict(config["listops"])
    sizes = [limits.pop(split) for split in ("train", "dev", "test")]
    rows = generate_rows(sum(sizes), Random(f"{config['seed']} listops"), **limits)
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        chosen, rows = rows[:size], rows[size:]
        end = "\r\n" if split == "val" else "\n"
        lines = ["Source\tTarget", *(f"{source}\t{value}" for source, value in chosen)]
        yield f"basic_{split}.tsv", "".join(line + end for line in lines).encode()


def retrieval_files(config: dict) -> Members:
    """new_aan_pairs.{train,eval,test}.tsv: no header, lone quotes, labels written in two ways."""
    options = config["retrieval"]
    for split, name in (("train", "train"), ("dev", "eval"), ("test", "test")):
        rng = Random(f"{config['seed']} retrieval {split}")
        lines = []
        for index, (label, one, other) in enumerate(
            generate_pairs(options[split], rng, options["length"])
        ):
            written = f"{label}.0" if index % 2 else str(label)
            lines.append(f"{written}\tE{index:05d}\tF{index:05d}\t{one}\t{other}\n")
        yield f"new_aan_pairs.{name}.tsv", "".join(lines).encode()


def pathfinder_files(config: dict) -> Members:
    """imgs/<n>/sample_<k>.png and metadata/<n>.npy (text), with one image too many that is empty."""
    from PIL import Image

    options = config["pathfinder"]
    images = generate_images(
        options["examples"],
        np.random.default_rng([config["seed"], 3]),
        options["image_size"],
        options["contour_length"],
        options["distractor_length"],
    )
    per_folder = -(-options["examples"] // NUM_FOLDERS)
    metadata: dict[int, list[str]] = {}
    for index, (pixels, label) in enumerate(images):
        folder, number = divmod(index, per_folder)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        metadata.setdefault(folder, []).append(metadata_line(options, folder, number, label))
        yield f"imgs/{folder}/sample_{number}.png", buffer.getvalue()
    metadata[0].append(metadata_line(options, 0, per_folder, 0))
    yield f"imgs/0/sample_{per_folder}.png", b""
    for folder, lines in metadata.items():
        yield f"metadata/{folder}.npy", "\n".join([*lines, ""]).encode()


def metadata_line(options: dict, folder: int, number: int, label: int) -> str:
    """Folder, file, image number, label, continuity, contour and distractor length, paddle's length,
    thickness, margin and number of contrasts."""
    lengths = f"{options['contour_length']} {options['distractor_length']}"
    return f"imgs/{folder} sample_{number}.png {number} {label} 1.0 {lengths} 2 0.5 1 1"


def write_tar_gz(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A gzipped tar without dates and owners, so that the same members give the same bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with (
            open(temporary, "wb") as file,
            gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                tar.members.clear()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_record(
    archives: Path, file: str, name: str, paths: list[Path], config: dict, parts: tuple[str, ...]
) -> None:
    """archives/<file>.source.json: what was generated, from which parameters, with which hash."""
    if len(paths) == 1:
        sha256 = sha256_file(paths[0])
    else:
        sha256 = hashlib.sha256("".join(map(sha256_file, sorted(paths))).encode()).hexdigest()
    record = {
        "name": name,
        "file": file,
        "url": "generated",
        "sha256": sha256,
        "bytes": sum(path.stat().st_size for path in paths),
        "data": "generated",
        "licence": "Apache-2.0",
        "provenance": "workflow/scripts/demo_archives.py",
        "seed": config["seed"],
        "parameters": {part: config[part] for part in parts},
    }
    write_json(archives / f"{file}.source.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="sizes and seed, JSON")
    parser.add_argument("--output-dir", required=True, type=Path, help="data/<run>")
    args = parser.parse_args()
    generate(parse_json(args.config, "--config"), args.output_dir)


if __name__ == "__main__":
    run_script(main)
