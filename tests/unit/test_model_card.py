"""Model folders: the best run on dev, its files, and a card that the Hugging Face Hub can read."""

import model_card
import pytest
import yaml
from made_up_runs import make_metrics, write_run


def write_seeds(folder, **changes):
    """Three seeds; the second is the best on dev, the third on test."""
    dirs = []
    for seed, dev, test in ((1, 0.5, 0.4), (2, 0.7, 0.5), (3, 0.6, 0.9)):
        metrics = make_metrics(attention="sat", seed=seed, accuracy=test, switch=(120, "rule"))
        metrics["dev"] |= {"accuracy": dev}
        metrics |= {"num_inputs": 1, "input": {"input_type": "text", "symbols": ["[MIN"]}}
        metrics["sources"] = [{"name": "lra_release", "sha256": "a" * 64}]
        run = write_run(folder, metrics | changes)
        (run / "model.safetensors").write_bytes(b"weights of seed %d" % seed)
        dirs.append(run)
    return dirs


def test_the_best_on_dev_is_taken_whole(tmp_path):
    dirs = write_seeds(tmp_path)
    output = tmp_path / "models/listops/sat"
    model_card.main([*map(str, dirs), "--output-dir", str(output)])
    assert {p.name for p in output.iterdir()} == {*model_card.COPIED, "README.md"}
    for name in model_card.COPIED:
        assert (output / name).read_bytes() == (dirs[1] / name).read_bytes()
    card = (output / "README.md").read_text()
    assert f'sat.load("{output}")' in card and "seed 2, the best on dev of 3" in card
    assert "60.00 ± 26.46 % on test" in card and "step 120 (by rule)" in card
    assert "a" * 64 in card and "**Trained and tested on generated data**" in card


def test_the_card_of_one_seed_compares_with_none(tmp_path):
    card = model_card.make_card(write_seeds(tmp_path)[0], [make_metrics(attention="sat")], tmp_path)
    assert "This is seed 1, the only one." in card and "all of them" not in card


def test_the_metadata_are_yaml_in_the_form_of_the_hub(tmp_path):
    dirs = write_seeds(tmp_path)
    model_card.main([*map(str, dirs), "--output-dir", str(tmp_path / "out")])
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\n")
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["license"] == "apache-2.0" and "sat" in fields["tags"]
    (result,) = fields["model-index"][0]["results"]
    assert result["task"]["type"] == "text-classification"
    assert {"type", "name", "split"} <= result["dataset"].keys()
    accuracy = next(m for m in result["metrics"] if m["type"] == "accuracy")
    assert accuracy["value"] == 0.5


@pytest.mark.parametrize(
    ("changes", "example", "tag"),
    [
        ({"input": {"input_type": "image"}}, '"picture.png"', "image-classification"),
        ({"num_inputs": 2, "input": {"input_type": "text"}}, '("one text"', "text-classification"),
        ({"input": {"input_type": "text"}}, '["a text"]', "text-classification"),
    ],
)
def test_the_example_is_one_of_the_task(tmp_path, changes, example, tag):
    dirs = write_seeds(tmp_path, **changes)
    model_card.main([*map(str, dirs), "--output-dir", str(tmp_path / "out")])
    card = (tmp_path / "out/README.md").read_text()
    assert f".predict([{example.strip('[]')}" in card and f'pipeline_tag: "{tag}"' in card


@pytest.mark.parametrize(
    ("task", "data", "name"),
    [
        ("listops", "released", "listops, Long Range Arena"),
        ("listops", "generated", "listops, generated in its layout"),
        ("agnews", "released", "agnews, as released"),
        ("tickets", "own", "tickets, data of one's own"),
    ],
)
def test_only_released_tasks_of_lra_are_said_to_be_lra(tmp_path, task, data, name):
    text = model_card.front_matter(make_metrics(task, data=data), "a-model")
    fields = yaml.safe_load(text)
    assert fields["model-index"][0]["results"][0]["dataset"]["name"] == name
    assert ("long-range-arena" in fields["tags"]) == name.endswith("Arena")


def test_a_dense_run_on_released_data(tmp_path):
    metrics = make_metrics(data="released")
    run = write_run(tmp_path, metrics)
    card = model_card.make_card(run, [metrics], tmp_path)
    assert "did not go sparse" in card and "generated" not in card


def test_a_broken_run_is_named_and_leaves_nothing(tmp_path):
    dirs = write_seeds(tmp_path)
    (dirs[1] / "metrics.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        model_card.main([*map(str, dirs), "--output-dir", str(tmp_path / "out")])
    assert "metrics.json: not JSON" in str(stop.value) and not (tmp_path / "out").exists()
