"""Demo archives: the real layout, true labels, the same bytes in every process."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random

import demo_archives
import extract
import numpy as np
import pytest
from lra.generate_listops import apply_operator, generate_rows
from lra.generate_pathfinder import generate_images
from lra.generate_stand_ins import BAD, GOOD, TOPICS, generate_pairs, generate_reviews

LEVEL = "curv_contour_length_14"
CONFIG = {
    "seed": 3,
    "listops": {
        "train": 60, "dev": 20, "test": 20,
        "min_length": 5, "max_length": 40, "max_depth": 4, "max_args": 4,
    },
    "retrieval": {"train": 30, "dev": 10, "test": 10, "length": 120},
    "pathfinder": {
        "examples": 60, "image_size": 16, "contour_length": 4, "distractor_length": 2,
        "level": LEVEL,
    },
    "text": {"train": 30, "test": 20, "length": 150},
    "image": {"train": 40, "test": 20},
}  # fmt: skip
SCRIPTS = Path(demo_archives.__file__).parent


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "lra_release.gz"
    demo_archives.write_tar_gz(path, demo_archives.release_members(CONFIG))
    return path


def value_of(source: str) -> int:
    """The value of a ListOps expression, read with a stack."""
    stack: list[list] = [[]]
    for symbol in source.replace("(", "").replace(")", "").split():
        if symbol.startswith("["):
            stack.append([symbol])
        elif symbol == "]":
            operator, *values = stack.pop()
            stack[-1].append(apply_operator(operator, values))
        else:
            stack[-1].append(int(symbol))
    assert len(stack) == 1 and len(stack[0]) == 1
    return stack[0][0]


@pytest.mark.parametrize(
    ("operator", "values", "expected"),
    [
        ("[MIN", [4, 2, 9], 2),
        ("[MAX", [4, 2, 9], 9),
        ("[MED", [9, 1, 4], 4),
        ("[MED", [1, 2, 9, 4], 3),
        ("[MED", [1, 2], 1),
        ("[SM", [9, 9, 9], 7),
    ],
)
def test_operators(operator, values, expected):
    assert apply_operator(operator, values) == expected


def test_listops_rows_are_different_true_and_within_the_limits():
    rows = generate_rows(300, Random(1), min_length=8, max_length=50, max_depth=5, max_args=4)
    assert len({source for source, _ in rows}) == 300
    for source, value in rows:
        assert 8 < len(re.sub("[()]", " ", source).split()) < 50
        assert source.count("(") == source.count(")")
        assert value_of(source) == value


def test_listops_of_lra_sizes():
    source, value = generate_rows(2, Random(1), 500, 2000, 10, 10)[0]
    assert 500 < len(re.sub("[()]", " ", source).split()) < 2000
    assert value_of(source) == value


def test_listops_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="only .* of 1000 different expressions"):
        generate_rows(1000, Random(1), 0, 2, 1, 2)


def same_contour(image: np.ndarray) -> bool:
    """Are the two discs joined by bright pixels? Found by filling from one of them."""
    discs = np.argwhere(image > 240)
    far = discs[np.abs(discs - discs[0]).sum(1).argmax()]
    seen, todo = np.zeros(image.shape, bool), [tuple(discs[0])]
    while todo:
        y, x = todo.pop()
        if 0 <= y < len(image) and 0 <= x < len(image) and not seen[y, x] and image[y, x] > 64:
            seen[y, x] = True
            todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return bool(seen[tuple(far)])


@pytest.mark.parametrize("size", [(16, 4, 2), (32, 14, 4)])
def test_pathfinder_labels_say_whether_the_discs_are_joined(size):
    images = list(generate_images(100, np.random.default_rng(2), *size))
    assert len(images) == 100
    assert sum(label for _, label in images) == 50
    assert all(image.shape == (size[0], size[0]) for image, _ in images)
    # A few contours pass so close to each other that bright pixels alone cannot tell them apart.
    assert sum(same_contour(image) == bool(label) for image, label in images) >= 93


def test_pathfinder_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="do not fit into 8x8 pixels"):
        next(iter(generate_images(1, np.random.default_rng(0), 8, 12, 2)))


def test_related_pairs_share_their_topic():
    topics = [set(topic.split()) for topic in TOPICS]
    for label, *texts in generate_pairs(40, Random(0), 200):
        words = [set(text.replace('"', "").split()) for text in texts]
        found = [max(range(len(topics)), key=lambda t: len(topics[t] & w)) for w in words]
        assert (found[0] == found[1]) == bool(label)


def test_reviews_lean_towards_their_label_but_not_all_the_way():
    agree, mixed = 0, 0
    reviews = list(generate_reviews(200, Random(0), 250))
    for _, review in reviews:
        good = sum(review["text"].count(word) for word in GOOD)
        bad = sum(review["text"].count(word) for word in BAD)
        agree += (good > bad) == bool(review["label"])
        mixed += bool(good and bad)
    assert 120 < agree < 200
    assert mixed > 50
    assert len({key for key, _ in reviews}) == 200


def test_layout_is_that_of_the_release(archive):
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        inner = "lra_release/lra_release"
        assert "lra_release/listops-1000/basic_train.tsv" in names
        listops = tar.extractfile(f"{inner}/listops-1000/basic_val.tsv").read()
        pairs = tar.extractfile(f"{inner}/tsv_data/new_aan_pairs.train.tsv").read()
        lines = tar.extractfile(f"{inner}/pathfinder32/{LEVEL}/metadata/11.npy").read().split(b"\n")
        sizes = {info.name: info.size for info in tar}
    assert listops.startswith(b"Source\tTarget\r\n( ")
    labels = {line.split(b"\t")[0] for line in pairs.splitlines()}
    assert labels == {b"0", b"1.0"}
    assert pairs.count(b'"') % 2 or b' "' in pairs
    assert lines[0].split()[:3] == [b"imgs/11", b"sample_0.png", b"0"]
    images = [name for name in names if name.endswith(".png") and LEVEL in name]
    assert len(images) == 61
    assert [name for name in images if not sizes[name]] == [
        f"{inner}/pathfinder32/{LEVEL}/imgs/0/sample_5.png"
    ]


def test_archive_goes_the_way_of_the_real_one(archive, tmp_path, tf_python):
    extract.extract(archive, tmp_path / "raw", LEVEL)
    demo_archives.write_record(
        archive.parent, "lra_release.gz", "lra_release", [archive], CONFIG, ("listops",)
    )
    (tmp_path / "archives").symlink_to(archive.parent)
    settings = {"listops": (40, {}), "retrieval": (64, {}), "pathfinder": (256, {"image_size": 16})}
    for task, (max_length, options) in settings.items():
        config = json.dumps({"max_length": max_length, "options": options})
        command = [tf_python, SCRIPTS / "preprocess.py", "--task", task, "--config", config]
        command += ["--run-data", tmp_path, "--output-dir", tmp_path / task]
        subprocess.run(command, check=True)
        manifest = json.loads((tmp_path / task / "manifest.json").read_text())
        rows = {split: facts["rows"] for split, facts in manifest["splits"].items()}
        expected = CONFIG[task] if task != "pathfinder" else {"train": 48, "dev": 6, "test": 6}
        assert rows == {split: expected[split] for split in rows}
        refused = sum(facts["num_refused"] for facts in manifest["splits"].values())
        assert refused == (task == "pathfinder")
        assert manifest["data"] == "generated"
        assert manifest["sources"][0]["seed"] == 3


def test_hash_seed_does_not_matter(tmp_path, archive):
    program = "import demo_archives, json, pathlib, sys; demo_archives.write_tar_gz("
    program += "pathlib.Path(sys.argv[1]), demo_archives.release_members(json.loads(sys.argv[2])))"
    for seed in ("1", "2"):
        path = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPTS)}
        command = [sys.executable, "-c", program, path, json.dumps(CONFIG)]
        subprocess.run(command, check=True, env=environment)
        assert path.read_bytes() == archive.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sudoku": {}}, "has the keys .*sudoku"),
        ({"text": {"train": 1, "test": 1}}, "text has the keys .*expected .*length"),
    ],
)
def test_wrong_keys(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        demo_archives.generate(CONFIG | change, tmp_path)
    assert list(tmp_path.iterdir()) == []


DEMO = """
import json, sys
from pathlib import Path
import demo_archives, preprocess

config, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
demo_archives.generate(config, folder)
caps = {"train": 20, "dev": None, "test": None}
for task, length in (("text", 128), ("image", 1024)):
    preprocess.preprocess(task, {"max_length": length, "caps": caps}, folder, folder / task)
lra = {"max_length": 128, "options": {"dev_split": "lra"}}
preprocess.preprocess("text", lra, folder, folder / "text_lra")
"""


def test_demo_with_tensorflow(tmp_path, tf_python):
    """TFDS data sets and what is made of them: sizes, and the same bytes twice."""
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPTS)}
        command = [tf_python, "-c", DEMO, json.dumps(CONFIG), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        paths = [p for p in sorted(folder.rglob("*")) if p.suffix in (".arrow", ".json", ".gz")]
        paths += sorted(folder.rglob("*.tfrecord*"))
        paths = [p for p in paths if p.name != "metadata.json"]
        found.append(
            {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
        )
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
    assert not list((tmp_path / "1").rglob("*incomplete*")) + list((tmp_path / "1").rglob(".*tmp"))

    text = json.loads((tmp_path / "1" / "text" / "manifest.json").read_text())
    assert {s: facts["rows"] for s, facts in text["splits"].items()} == {
        "train": 20, "dev": 3, "test": 20,
    }  # fmt: skip
    assert text["options"] == {"dev_split": "holdout"}
    image = json.loads((tmp_path / "1" / "image" / "manifest.json").read_text())
    assert {s: facts["rows"] for s, facts in image["splits"].items()} == {
        "train": 20, "dev": 4, "test": 20,
    }  # fmt: skip
    lra = json.loads((tmp_path / "1" / "text_lra" / "manifest.json").read_text())
    assert lra["splits"]["dev"]["sha256"] == lra["splits"]["test"]["sha256"]
    assert lra["splits"]["train"]["rows"] == 30
