"""TFDS data sets prepared from archives that are already here."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import prepare_tfds

SCRIPTS = Path(prepare_tfds.__file__).parent

# Small archives in the layout of the real ones. TFDS knows the hashes of the real ones, so the first
# attempt must fail; then it is told that ours are right.
PROGRAM = """
import io, sys, tarfile
from pathlib import Path
import numpy as np
from lra.files import sha256_file, write_json
from lra.order import tfds_order
from lra.tfds_folder import import_tfds, open_builder
import preprocess, prepare_tfds

root = Path(sys.argv[1])
rng = np.random.default_rng(0)

def pack(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

def records(first):
    rows = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    # The first pixel, gray, says which image it is.
    rows[:, [1, 1025, 2049]] = (first + np.arange(20))[:, None]
    return rows.tobytes()

folder = "cifar-10-batches-bin"
cifar = {f"{folder}/data_batch_{n + 1}.bin": records(20 * n) for n in range(5)}
cifar[f"{folder}/test_batch.bin"] = records(0)
cifar[f"{folder}/batches.meta.txt"] = "\\n".join("abcdefghij").encode()
imdb = {
    f"aclImdb/{split}/{kind}/{n}_7.txt": f"{split} {kind} {n}".encode()
    for split in ("train", "test") for kind in ("pos", "neg", "unsup") for n in range(10)
}
csv = lambda n: "".join(f'"{1 + k % n}","title {k}","news {k}"\\n' for k in range(20)).encode()
news = {f"ag_news_csv/{split}.csv": csv(4) for split in ("train", "test")}
lines = "".join(f'"{1 + k % 2}","review {k}"\\n' for k in range(20)).encode()
yelp = {f"yelp_review_polarity_csv/{split}.csv": lines for split in ("train", "test")}
archives = root / "archives"
archives.mkdir()
tfds = import_tfds()
from tensorflow_datasets.core.download.checksums import UrlInfo

for name, file, files in (
    ("cifar10:3.0.2", "cifar-10-binary.tar.gz", cifar),
    ("imdb_reviews/plain_text:1.0.0", "aclImdb_v1.tar.gz", imdb),
    ("ag_news_subset:1.0.0", "ag_news_csv.tar.gz", news),
    ("yelp_polarity_reviews:0.2.0", "yelp_review_polarity_csv.tgz", yelp),
):
    archive, record = archives / file, archives / f"{file}.source.json"
    pack(archive, files)
    info = {"name": file, "file": file, "data": "released", "bytes": 1}
    write_json(record, info | {"sha256": sha256_file(archive)})
    try:
        prepare_tfds.prepare(name, root / "tfds", archive, record)
    except ValueError as error:
        print("refused:", error)
    builder = open_builder(name, root / "tfds")
    assert not Path(builder.data_dir).exists()
    url, = builder.url_infos
    size = archive.stat().st_size
    type(builder).url_infos = {url: UrlInfo(size=size, checksum=sha256_file(archive), filename=file)}
    # What attempts leave that were killed: a folder without its description, an unfinished one.
    left = Path(builder.data_dir)
    (left.parent / f"incomplete.ABC_{left.name}").mkdir(parents=True)
    left.mkdir()
    (left / "half.tfrecord").write_bytes(b"half")
    prepare_tfds.prepare(name, root / "tfds", archive, record)

preprocess.preprocess("image", {"max_length": 1024}, root, root / "image")
preprocess.preprocess("text", {"max_length": 64}, root, root / "text")
preprocess.preprocess("agnews", {"max_length": 64}, root, root / "agnews")
preprocess.preprocess("yelp", {"max_length": 64}, root, root / "yelp")
from lra.arrow import read_arrow
for task, text in (("agnews", b"news 3"), ("yelp", b"review 3")):
    rows = [r for b in read_arrow(root / task / "test.arrow") for r in b.to_pylist()]
    label, = {r["label"] for r in rows if bytes(r["input_ids_0"]) == text}
    assert label == (3 if task == "agnews" else 1)
found = [
    row[0] for s in ("train", "dev")
    for b in read_arrow(root / "image" / f"{s}.arrow") for row in b["input_ids_0"].to_pylist()
]
assert found == tfds_order(range(100), "train").tolist()
"""


def test_prepared_from_archives_that_are_here(tmp_path, tf_python):
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    command = [tf_python, "-c", PROGRAM, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    refusals = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(refusals) == 4
    assert all("TFDS for" in line and "delete it and get it again" in line for line in refusals)
    manifest = json.loads((tmp_path / "image" / "manifest.json").read_text())
    rows = {split: facts["rows"] for split, facts in manifest["splits"].items()}
    assert rows == {"train": 90, "dev": 10, "test": 20}
    assert manifest["data"] == "released"
    manifest = json.loads((tmp_path / "text" / "manifest.json").read_text())
    rows = {split: facts["rows"] for split, facts in manifest["splits"].items()}
    assert rows == {"train": 18, "dev": 2, "test": 20}
    for task, counts in (("agnews", [5] * 4), ("yelp", [10] * 2)):
        facts = json.loads((tmp_path / task / "manifest.json").read_text())["splits"]
        assert {split: about["rows"] for split, about in facts.items()} == {
            "train": 18, "dev": 2, "test": 20,
        }  # fmt: skip
        assert list(facts["test"]["label_counts"].values()) == counts
    names = sorted(path.name for path in (tmp_path / "tfds").iterdir())
    assert names == ["ag_news_subset", "cifar10", "imdb_reviews", "yelp_polarity_reviews"]
    assert not list((tmp_path / "tfds").rglob("*incomplete*"))
    assert tarfile.is_tarfile(tmp_path / "archives" / "cifar-10-binary.tar.gz")


def test_unknown_builder_is_one_line(tmp_path, tf_python):
    command = [tf_python, prepare_tfds.__file__, "--builder", "sudoku:1.0.0", "--data-dir"]
    command += [tmp_path, "--archive", tmp_path / "a", "--record", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: TFDS has no data set sudoku:1.0.0" in done.stderr
    assert "Traceback" not in done.stderr
