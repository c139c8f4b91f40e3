"""Progress, curves and images of a training, read back with TensorBoard's own reader."""

import io
import math

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sat import watching

LINE = {
    "event": "train",
    "step": 1,
    "phase": "dense",
    "loss": 2.5,
    "accuracy": 0.25,
    "learning_rate": 1e-3,
    "ms": 12.0,
    "skewness": [1.5, math.nan],
    "distance": None,
    "change": None,
}


def events_of(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def picture_of(events, tag):
    (image,) = events.Images(tag)
    return Image.open(io.BytesIO(image.encoded_image_string))


def test_curves_and_images_can_be_read_back(tmp_path):
    a_SS = torch.full((1024, 1024), 0.25)
    a_SS[:, :512] = 1.0
    with watching.Curves(tmp_path) as curves:
        curves.add(LINE, memory_bytes=2**30)
        curves.add({"event": "eval", "split": "dev", "step": 1, "loss": 2.0, "accuracy": 0.5})
        curves.add({"event": "transition", "step": 1})
        curves.add_maps([a_SS], 1)
        curves.add_pattern([torch.eye(4, dtype=torch.bool)], 1)
    events = events_of(tmp_path)
    found = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train/loss": [2.5],
        "train/accuracy": [0.25],
        "train/learning_rate": [pytest.approx(1e-3)],
        "train/ms": [12.0],
        "train/memory": [2.0**30],
        "skewness/layer_0": [1.5],
        "dev/loss": [2.0],
        "dev/accuracy": [0.5],
    }
    picture = picture_of(events, "attention/layer_0").convert("L")
    assert picture.size == (512, 512)
    assert picture.getpixel((0, 0)) == 255  # x goes over the keys
    assert picture.getpixel((511, 0)) == 127  # the root of a quarter
    picture = picture_of(events, "pattern/layer_0").convert("L")
    assert picture.size == (256, 256)
    assert [picture.getpixel((64 * i + 5, 5)) for i in range(4)] == [255, 0, 0, 0]


def test_a_second_attempt_replaces_the_steps_it_repeats(tmp_path):
    with watching.Curves(tmp_path) as curves:
        for step in (1, 2, 3):
            curves.add(LINE | {"step": step})
    with watching.Curves(tmp_path, first_step=3) as curves:
        curves.add(LINE | {"step": 3, "loss": 7.0})
    loss = events_of(tmp_path).Scalars("train/loss")
    assert [(e.step, e.value) for e in loss] == [(1, 2.5), (2, 2.5), (3, 7.0)]


def test_only_the_main_process_writes_and_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with watching.Curves(tmp_path / "board") as curves:
        curves.add(LINE)
        curves.add_maps([torch.eye(4)], 1)
        curves.add_pattern([torch.eye(4, dtype=torch.bool)], 1)
    watching.say("hello")
    assert not (tmp_path / "board").exists()
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_a_minute(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    progress = watching.Progress(total=100)
    progress.update(LINE)
    assert capsys.readouterr().err == ""
    now[0] += watching.LOG_SECONDS
    progress.update(LINE | {"step": 2})
    progress.update(LINE | {"step": 3})
    assert capsys.readouterr().err == "step 2/100 dense: loss 2.5000, accuracy 25.0 %, 12 ms\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(watching.sys, "stderr", terminal)
    progress = watching.Progress(total=10, done=4)
    progress.update(LINE | {"step": 5})
    progress.close()
    shown = terminal.getvalue()
    assert "5/10" in shown
    assert "dense: loss 2.5000, accuracy 25.0 %, 12 ms" in shown


def test_values_that_json_lacks_become_null():
    assert watching.without_nan(LINE)["skewness"] == [1.5, None]
    assert watching.without_nan(LINE)["distance"] is None
