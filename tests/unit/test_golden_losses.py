"""A change that computes nothing leaves the losses of golden_losses.json identical."""

import json

import golden_losses
import pytest
import torch

from sat.attention import kernels, selection


def forget_backends():
    for chosen_before in (selection._choose, kernels.load_library):
        chosen_before.cache_clear()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_losses_of_plain_pytorch_are_those_stored(tmp_path, monkeypatch):
    """To the last bit where they were stored; elsewhere sums are taken in another order."""
    monkeypatch.setenv("SAT_KERNELS", str(tmp_path))
    forget_backends()
    try:
        measured = golden_losses.losses()
    finally:
        forget_backends()
    stored = json.loads(golden_losses.STORED.read_text())
    if stored["machine"] == golden_losses.machine():
        assert measured == stored["losses"]
    assert measured == pytest.approx(stored["losses"], rel=1e-4)


def test_the_kernels_give_the_stored_losses_and_give_them_again(kernels_dir):
    first = golden_losses.losses()
    assert first == golden_losses.losses()
    assert first == pytest.approx(json.loads(golden_losses.STORED.read_text())["losses"], rel=1e-4)
