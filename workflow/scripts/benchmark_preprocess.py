"""Measure preprocessing at the size of the real data: CPU seconds, peak memory, size of the output.

    python benchmark_preprocess.py [--scale 1.0] [--tasks listops ...] [--json FILE] [--folder DIR]

Makes inputs in the real layout and of the real sizes times --scale: 100,000 ListOps rows of 500 to 2,000 symbols,
182,613 pairs of 2 x 29 kB (the AAN files have 10.6 GB), 50,000 reviews of 1.3 kB on average, 60,000 colour images,
200,000 Pathfinder images. They are real files, though their contents are variations of a few thousand examples.
Then runs preprocess.py on each as a process of its own, at a quarter of the size and at the whole, so that a peak
which grows with the data is seen, and prints a table. Needs 13 GB below --folder (default: a temporary folder) at
scale 1, less with fewer tasks; what it made is deleted.

Needs the TF environment. The seconds are those of the whole process, user and system, imports included, less a bare
import of TensorFlow and TFDS (measured beside each run) for the tasks that need one. They are compared with the
per-example tf.data pipelines in use, which took the seconds in BASELINE on the machine where the bars were set; on
another machine the ratio is only a hint. The size is compared with pickled int32 arrays of the model's length.
"""

import argparse
import io
import json
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from random import Random

import numpy as np
from lra.files import run_script, write_json
from lra.generate_listops import generate_rows
from lra.generate_pathfinder import generate_images
from lra.generate_stand_ins import generate_reviews
from lra.tfds_folder import write_tfds

# Seconds of the pipelines in use, and how many times faster the preprocessing must and should be.
BASELINE = {
    "listops": (102, 25, 38),
    "text": (62, 20, 40),
    "retrieval": (381, 20, 28),
    "image": (32, 5, 8),
    "pathfinder": (54, 6, 9),
}
RECORDS = {
    "listops": "lra_release.gz",
    "text": "aclImdb_v1.tar.gz",
    "retrieval": "lra_release.gz",
    "image": "cifar-10-binary.tar.gz",
    "pathfinder": "lra_release.gz",
}
WITH_TENSORFLOW = ("text", "image")
# dataset.max_length, and ids of an example in the pickles (model length times inputs).
LENGTHS = {
    "listops": (2000, 2048),
    "text": (4000, 4096),
    "retrieval": (4000, 2 * 4096),
    "image": (1024, 1024),
    "pathfinder": (1024, 1024),
}
MAX_MEGABYTES = 700
IMPORT = "import tensorflow, tensorflow_datasets"
# A small process starts the one that is measured: Linux counts the memory of whoever starts a process as its peak.
MEASURE = """
import json, resource, subprocess, sys
nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
subprocess.run(sys.argv[1:], check=True, **nowhere)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""
LEVEL = "curv_contour_length_14"


# ---------------------------------------------------------------- inputs


def make_listops(folder: Path, scale: float) -> None:
    """ListOps TSV files: rows of a few expressions whose digits are exchanged."""
    rng = Random(1)
    rows = generate_rows(1000, rng, min_length=500, max_length=2000, max_depth=10, max_args=10)
    sources = [source.encode() for source, _ in rows]
    raw = folder / "raw/listops"
    raw.mkdir(parents=True)
    for name, count in (("train", 96_000), ("val", 2_000), ("test", 2_000)):
        with open(raw / f"basic_{name}.tsv", "wb") as file:
            file.write(b"Source\tTarget\n")
            for _ in range(round(count * scale)):
                digits = bytes(rng.sample(b"0123456789", 10))
                source = rng.choice(sources).translate(bytes.maketrans(b"0123456789", digits))
                file.write(b"%s\t%d\n" % (source, rng.randrange(10)))


def make_retrieval(folder: Path, scale: float) -> None:
    """AAN TSV files: pieces of one long text, a few of their bytes no ASCII."""
    rng = Random(2)
    letters = "etaoinshrdlu" * 3 + "cmfywgpbvkxqjz" + " " * 9 + '",.é'
    text = "".join(rng.choices(letters, k=1 << 20)).encode()
    raw = folder / "raw/retrieval"
    raw.mkdir(parents=True)
    for name, count in (("train", 147_086), ("eval", 18_090), ("test", 17_437)):
        with open(raw / f"new_aan_pairs.{name}.tsv", "wb") as file:
            for index in range(round(count * scale)):
                pieces = []
                for _ in range(2):
                    start = rng.randrange(len(text) // 2)
                    pieces.append(text[start : start + rng.randrange(1_000, 57_000)])
                fields = (b"%d.0" % rng.randrange(2), b"P%d" % index, b"Q%d" % index, *pieces)
                file.write(b"\t".join(fields) + b"\n")


def make_text(folder: Path, scale: float) -> None:
    """The TFDS data set imdb_reviews: pieces of generated reviews."""
    rng = Random(3)
    text = " ".join(row["text"] for _, row in generate_reviews(1000, rng, 1000)).encode()
    splits = {}
    for split in ("train", "test"):
        splits[split] = []
        for _ in range(round(25_000 * scale)):
            start, length = rng.randrange(len(text) // 2), int(rng.lognormvariate(6.95, 0.65))
            piece = text[start : start + min(length, 13_000)]
            example = {"text": piece, "label": rng.randrange(2)}
            splits[split].append((len(splits[split]), example))
    write_tfds("imdb_reviews/plain_text:1.0.0", folder / "tfds", splits)


def make_image(folder: Path, scale: float) -> None:
    """The TFDS data set cifar10: smooth colours with some noise, about as hard to pack as photographs."""
    rng = np.random.default_rng(4)
    files = []
    for _ in range(2000):
        coarse = rng.normal(128, 50, (5, 5, 3)).repeat(8, 0).repeat(8, 1)
        for axis in (0, 1):
            coarse = np.cumsum(coarse, axis)
            ahead, behind = (coarse.take(range(s, s + 32), axis) for s in (8, 0))
            coarse = (ahead - behind) / 8
        noisy = coarse + rng.normal(0, 6, coarse.shape)
        files.append(png(np.clip(noisy, 0, 255).astype(np.uint8)))
    splits = {
        split: [
            (n, {"id": f"{split}_{n:05}", "image": files[index], "label": index % 10})
            for n, index in enumerate(rng.integers(0, len(files), round(count * scale)).tolist())
        ]
        for split, count in (("train", 50_000), ("test", 10_000))
    }
    write_tfds("cifar10:3.0.2", folder / "tfds", splits)


def make_pathfinder(folder: Path, scale: float) -> None:
    """The tar of a level, as extract.py leaves it: images of the genuine task, turned and mirrored."""
    rng = np.random.default_rng(5)
    files = []
    for pixels, label in generate_images(1500, rng, 32, 14, 4):
        for turned in (pixels, pixels.T, pixels[::-1], pixels[:, ::-1]):
            files.append((png(np.ascontiguousarray(turned)), label))
    path = folder / f"raw/pathfinder/{LEVEL}.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(200):
            lines = []
            for sample in range(round(1000 * scale)):
                data, label = files[int(rng.integers(len(files)))]
                add(tar, f"imgs/{number}/sample_{sample}.png", data)
                tail = f"{sample} {label} 1.0 14 4 2 0.5 1 1"
                lines.append(f"imgs/{number} sample_{sample}.png {tail}\n")
            add(tar, f"metadata/{number}.npy", "".join(lines).encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    tar.members.clear()


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- measurements


def measure(task: str, folder: Path, scale: float) -> dict:
    """Make the input of a task, preprocess it in a process of its own; what that took."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data = Path(scratch)
        globals()[f"make_{task}"](data, scale)
        record = {"name": "benchmark", "file": RECORDS[task], "data": "generated"}
        write_json(data / "archives" / f"{RECORDS[task]}.source.json", record)
        config = json.dumps({"task": task, "max_length": LENGTHS[task][0]})
        script = Path(__file__).with_name("preprocess.py")
        command = [sys.executable, script, "--task", task, "--config", config]
        command += ["--run-data", data, "--output-dir", data / task]
        imported = (0.0, 0.0)
        if task in WITH_TENSORFLOW:
            imported = min(run([sys.executable, "-c", IMPORT]) for _ in range(2))
        seconds, megabytes = run(command)
        manifest = json.loads((data / task / "manifest.json").read_text())
        splits = manifest["splits"].values()
        rows = sum(split["rows"] for split in splits)
        return {
            "rows": rows,
            "refused": sum(split["num_refused"] for split in splits),
            "cpu_seconds": seconds,
            "import_cpu_seconds": imported[0],
            "peak_megabytes": megabytes,
            "import_peak_megabytes": imported[1],
            "output_bytes": sum(split["bytes"] for split in splits),
            "share_of_pickles": round(
                sum(split["bytes"] for split in splits) / (rows * LENGTHS[task][1] * 4), 3
            ),
        }


def run(command: list) -> tuple[float, float]:
    """CPU seconds and peak of resident memory (MB) of a process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"this failed; run it alone: {shlex.join(map(str, command))}")
    seconds, megabytes = json.loads(done.stdout)
    return round(seconds, 2), round(megabytes, 1)


def table_row(task: str, small: dict, whole: dict) -> str:
    """One line of the printed table; the bars hold at full size only."""
    seconds, must, aim = BASELINE[task]
    own = whole["cpu_seconds"] - whole["import_cpu_seconds"]
    peaks = f"{small['peak_megabytes']:.0f} -> {whole['peak_megabytes']:.0f}"
    return (
        f"{task:10} {whole['rows']:>8,} {whole['cpu_seconds']:>7.2f} {own:>7.2f} "
        f"{seconds / must:>6.1f} {seconds / aim:>6.1f} {seconds / own:>6.1f} {peaks:>12} "
        f"{whole['share_of_pickles']:>8.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real sizes")
    parser.add_argument("--tasks", nargs="+", choices=BASELINE, default=list(BASELINE))
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--folder", type=Path, help="where inputs are made, and deleted")
    args = parser.parse_args()
    if not 0.001 <= args.scale <= 10:
        raise ValueError(f"--scale is {args.scale}, expected 0.001 to 10")
    print(
        f"{'task':10} {'rows':>8} {'CPU s':>7} {'own':>7} {'must':>6} {'aim':>6} {'times':>6} "
        f"{'peak MB':>12} {'/pickles':>8}   (own: less the import of TensorFlow; must and aim: of own at "
        f"scale 1; peak <= {MAX_MEGABYTES})",
        flush=True,
    )
    found = {}
    for task in args.tasks:
        small = measure(task, args.folder, args.scale / 4)
        whole = measure(task, args.folder, args.scale)
        found[task] = {"quarter": small, "whole": whole}
        print(table_row(task, small, whole), flush=True)
    if args.json:
        write_json(args.json, {"scale": args.scale, "tasks": found})


if __name__ == "__main__":
    run_script(main)
