"""Predictions on new inputs: the same as evaluation's on the test set, and clear words for what cannot be encoded."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sat
from sat import config, data, evaluation, predict, seal
from sat.model import Classifier

sys.path.append(str(config.ROOT / "workflow/scripts"))
from lra import encode  # noqa: E402

EXPRESSIONS = [
    "[MAX 2 9 [MIN 4 7 ] 0 ]",
    "( ( ( [SM 1 ) 2 ) ] )",
    "[MED 1 2 [SM 3 4 5 ] ]",
    "7",
]
TEXTS = ["a fine film", "dreadful", "naïve café 🎬", "x" * 300]


def save_run(folder, task, attention="sat", num_inputs=1, **described):
    """A run folder as training leaves it, with weights as they are drawn."""
    settings = config.resolve(config.load("demo"), task, attention, 1)
    resolved = config.RunConfig.from_dict(settings)
    torch.manual_seed(0)
    learned = resolved.pattern.source == "parameter"
    model = Classifier(resolved.model, num_inputs, learned_pattern=learned)
    with torch.no_grad():  # apart from each other, so that a wrong id shows in the label
        for parameter in model.parameters():
            parameter.mul_(3)
    folder.mkdir(parents=True)
    import safetensors.torch

    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    n = resolved.model.num_blocks
    masks = {
        f"layer_{i}": (torch.rand(n, n) < 0.5).to(torch.uint8)
        for i in range(resolved.model.num_layers)
    }
    masks |= {f"pooled_layer_{i}": torch.rand(n, n) for i in range(resolved.model.num_layers)}
    safetensors.torch.save_file(masks, str(folder / "pattern.safetensors"))
    (folder / "config.json").write_text(json.dumps(settings))
    entry = {"max_length": settings["dataset"]["max_length"], "id_offset": 0, "options": {}}
    entry |= {"symbols": None, "classes": None} | described
    metrics = seal.add({"num_inputs": num_inputs, "input": entry})
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def expected(folder, rows, id_offset=0):
    """Probabilities by the path that evaluation takes: an Arrow split, its batches, the model."""
    import pyarrow as pa

    settings, model, masks = evaluation.load_run(folder, torch.device("cpu"))
    columns = {f"input_ids_{i}": column for i, column in enumerate(rows)}
    table = pa.table(columns | {"label": pa.array([0] * len(rows[0]), pa.uint8())})
    path = folder / "test.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    padded = not pa.types.is_fixed_size_list(rows[0].type)
    split = data.Split(path, padded, id_offset)
    model.eval()
    with torch.inference_mode():
        return [
            row
            for batch in split.batches(2, settings.model.sequence_length)
            for row in model(batch, masks)[0].softmax(dim=1).tolist()
        ]


def agree(predictions, probabilities):
    found = np.array([p["probabilities"] for p in predictions])
    np.testing.assert_allclose(found, probabilities, rtol=2e-4, atol=1e-6)
    assert [p["label"] for p in predictions] == np.argmax(probabilities, axis=1).tolist()
    for p in predictions:
        assert p["probability"] == p["probabilities"][p["label"]]
    assert len({round(row[0], 6) for row in probabilities}) > 1  # inputs are told apart


def test_listops_as_evaluated(tmp_path):
    folder = save_run(tmp_path / "run", "listops", input_type="text", symbols=list(encode.SYMBOLS))
    lines = "".join(f"{e}\t0\n" for e in EXPRESSIONS).encode()
    ids, lengths, _, _ = encode.encode_listops(lines, 64)
    agree(
        sat.load(folder, "cpu").predict(EXPRESSIONS),
        expected(folder, [encode.to_lists(ids, lengths)]),
    )


def test_listops_without_brackets_as_evaluated(tmp_path):
    options = {"symbols": list(encode.SYMBOLS), "options": {"brackets": False}}
    folder = save_run(tmp_path / "run", "listops", input_type="text", **options)
    batch = sat.load(folder, "cpu").encode(EXPRESSIONS[:1])
    ids, lengths, _, _ = encode.encode_listops(f"{EXPRESSIONS[0]}\t0\n".encode(), 64, False)
    assert batch.lengths[0].tolist() == lengths.tolist()
    assert batch.ids[0][0, : lengths[0]].tolist() == ids.tolist()


def test_texts_as_evaluated(tmp_path):
    folder = save_run(
        tmp_path / "run", "text", input_type="text", id_offset=1, classes=["bad", "good"]
    )
    rows = encode.encode_text([text.encode() for text in TEXTS], 256)
    predictions = sat.load(folder, "cpu").predict(TEXTS)
    agree(predictions, expected(folder, [rows], 1))
    assert all(p["class"] == ["bad", "good"][p["label"]] for p in predictions)


def test_pairs_as_evaluated(tmp_path):
    folder = save_run(tmp_path / "run", "retrieval", num_inputs=2, input_type="text", id_offset=1)
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    rows = [
        encode.encode_text([t.encode() for t in column], 256) for column in (TEXTS, TEXTS[::-1])
    ]
    agree(sat.load(folder, "cpu").predict(pairs), expected(folder, rows, 1))


def test_images_as_evaluated(tmp_path):
    """RGB arrays and PNGs, gray and RGB."""
    folder = save_run(tmp_path / "run", "image", input_type="image")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    gray = encode.to_gray(images)
    paths = [tmp_path / "rgb.png", tmp_path / "gray.png"]
    Image.fromarray(images[0]).save(paths[0])
    Image.fromarray(gray[1]).save(paths[1])
    predictions = sat.load(folder, "cpu").predict([*paths, images[2]])
    agree(predictions, expected(folder, [encode.encode_images(gray)]))


def test_the_kernels_of_the_run_set_are_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("SAT_KERNELS", raising=False)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/kernels.json").write_text("{}")
    predict.use_kernels_of(tmp_path / "models/text/sat")
    assert predict.os.environ["SAT_KERNELS"] == str(tmp_path / "kernels")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder of each kind of input."""
    root = tmp_path_factory.mktemp("runs")
    save_run(root / "listops", "listops", input_type="text", symbols=list(encode.SYMBOLS))
    save_run(root / "text", "text", input_type="text", id_offset=1)
    save_run(root / "retrieval", "retrieval", num_inputs=2, input_type="text", id_offset=1)
    save_run(root / "image", "image", input_type="image")
    return root


@pytest.mark.parametrize(
    ("task", "inputs", "words"),
    [
        ("listops", ["[MAX 1 2 ]", "[MAX 1 x ]"], "input 2: unknown symbol"),
        ("listops", [""], "input 1: no symbols"),
        ("listops", ["[MAX " + "1 " * 80 + "]"], "input 1: longer than max_length"),
        ("text", [3], "input 1: expected a text, found int"),
        ("retrieval", [("a", "b", "c")], "expected 2 texts an input, found 3"),
        ("image", [np.zeros((8, 8), np.uint8)], r"input 1: expected uint8 \[32, 32\]"),
        ("image", [np.zeros((32, 32))], r"found float64 \[32, 32\]"),
    ],
)
def test_what_cannot_be_encoded_is_named(runs, task, inputs, words):
    with pytest.raises(ValueError, match=words):
        sat.load(runs / task, "cpu").predict(inputs)


def run_main(capsys, *arguments):
    code = predict.main([*map(str, arguments), "--device", "cpu"])
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_command_line_reads_files_and_stdin(runs, tmp_path, capsys, monkeypatch):
    file = tmp_path / "expressions.tsv"
    file.write_text("".join(f"{e}\t5\n" for e in EXPRESSIONS))
    code, from_file, _ = run_main(capsys, runs / "listops", file)
    assert code == 0 and len(from_file) == len(EXPRESSIONS)
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(EXPRESSIONS).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run_main(capsys, runs / "listops", "-")[1] == from_file
    assert from_file == sat.load(runs / "listops", "cpu").predict(EXPRESSIONS)

    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("one\ttwo\nthree\tfour\n")
    assert len(run_main(capsys, runs / "retrieval", pairs)[1]) == 2

    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    code, found, _ = run_main(capsys, runs / "image", tmp_path / "images.npy")
    assert found == sat.load(runs / "image", "cpu").predict(list(images))


@pytest.mark.parametrize(
    ("task", "name", "content", "words"),
    [
        ("retrieval", "a.tsv", b"one\n", "a.tsv: line 1: expected two texts with a tab"),
        ("image", "a.png", b"no image", "a.png: broken PNG: no header"),
        ("text", "a.txt", None, "No such file"),
    ],
)
def test_command_line_answers_in_one_line(runs, tmp_path, capsys, task, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, found, error = run_main(capsys, runs / task, tmp_path / name)
    assert (code, found) == (1, [])
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert "no finished run in" in run_main(capsys, tmp_path)[2]


def test_a_run_that_does_not_say_how_it_was_encoded(tmp_path, capsys):
    folder = save_run(tmp_path / "run", "text")
    assert "train the run again" in run_main(capsys, folder)[2]
