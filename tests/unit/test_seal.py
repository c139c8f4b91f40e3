"""Checksums of JSON files and of what lies beside them: no changed number is believed."""

import json
import random
import shutil

import collect
import figures
import model_card
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_runs import make_config, make_metrics, write_run
from processed import write_processed

from sat import data, seal

AGAIN = "make it again"


def test_a_changed_accuracy_is_refused_though_it_is_valid_json(tmp_path):
    path = write_run(tmp_path, make_metrics(accuracy=0.413)) / "metrics.json"
    collect.read_metrics(path)
    text = path.read_text()
    path.write_text(text.replace('"accuracy": 0.413', '"accuracy": 0.513'))
    with pytest.raises(
        ValueError, match="metrics.json: its checksum differs.*trains the run again"
    ):
        collect.read_metrics(path)


def test_metrics_without_a_checksum_are_refused(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(make_metrics()))
    with pytest.raises(ValueError, match="lacks the checksum 'content_sha256'"):
        collect.read_metrics(path)


@settings(max_examples=60)
@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_what_is_read(tmp_path_factory, place, bit):
    folder = tmp_path_factory.getbasetemp() / "sealed"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "whole.json").write_text(json.dumps(seal.add(make_metrics(accuracy=0.413))))
    whole = (folder / "whole.json").read_bytes()
    changed = bytearray(whole)
    changed[place % len(whole)] ^= 1 << bit
    (folder / "flipped.json").write_bytes(changed)
    try:
        read = seal.read(folder / "flipped.json", AGAIN)
    except ValueError as error:
        assert "flipped.json" in str(error) and AGAIN in str(error)
    else:
        assert read == json.loads(whole)


@pytest.mark.parametrize("name", ["config.json", "history.jsonl", "pattern.safetensors"])
def test_a_file_of_another_run_is_refused(tmp_path, name):
    mine = write_run(tmp_path, make_metrics(attention="sat", switch=(120, "rule")))
    other = write_run(tmp_path, make_metrics(attention="softmax", accuracy=0.2))
    shutil.copyfile(other / name, mine / name)
    with pytest.raises(ValueError, match=rf"seed1001/{name} is not the file that was written"):
        figures.read_runs([mine], "listops", make_config())


def test_a_model_is_not_copied_with_files_that_changed(tmp_path):
    folder = write_run(tmp_path, make_metrics(attention="sat", switch=(120, "rule")))
    (folder / "pattern.safetensors").unlink()
    with pytest.raises(ValueError, match="pattern.safetensors is missing"):
        model_card.best_run([folder])


def test_a_changed_manifest_is_refused(tmp_path):
    write_processed(tmp_path, "listops", {s: ([[1], [2]], [0, 1]) for s in data.SPLITS})
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"id_offset": 0', '"id_offset": 1'))
    with pytest.raises(
        data.DataError, match="manifest.json: its checksum differs.*preprocess again"
    ):
        data.load(tmp_path)


def test_the_seal_is_that_of_what_a_reader_finds(tmp_path):
    content = {"by number": {2: "b", 10: "a"}, "nan": float("nan"), "pair": (1, 2), "ü": 1e300}
    path = tmp_path / "any.json"
    path.write_text(json.dumps(seal.add(content)))
    assert seal.read(path, AGAIN)["by number"] == {"2": "b", "10": "a"}


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, "\ud800"])
def test_what_is_no_sealed_json_is_refused(tmp_path, text):
    path = tmp_path / "any.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"any\.json: .*make it again"):
        seal.read(path, AGAIN)


def test_flipped_bits_of_a_failure_are_refused(tmp_path):
    generator = random.Random(1)
    path = tmp_path / "runs/listops/sat/seed1001/failed.json"
    path.parent.mkdir(parents=True)
    keys = {"task": "listops", "attention": "sat", "seed": 1001, "kind": "failed", "step": 120}
    whole = json.dumps(seal.add(keys | {"message": "it failed"})).encode()
    path.write_bytes(whole.replace(b'"step": 120', b'"step": 121'))
    with pytest.raises(ValueError, match="failed.json: its checksum differs"):
        collect.read_failures(make_config(), tmp_path / "runs")
    for _ in range(20):
        changed = bytearray(whole)
        changed[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="failed.json"):
            collect.read_failures(make_config(), tmp_path / "runs")
