"""FlexAttention behind the gate of the zero-logit denominator, forward on the CPU."""

import pytest
import torch

import sat.attention as attention
from sat import backends, benchmark
from sat.attention import flex, kernels, reference, selection

BLOCK, N = 32, 128


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, N, 16, generator=generator).to(dtype) for _ in range(3)]


def make_mask():
    """An empty row, a full one and random ones."""
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0], mask[1] = False, True
    return mask


@pytest.mark.parametrize("denominator", kernels.DENOMINATORS)
@pytest.mark.parametrize("lengths", [None, [N, 50, 0]])
def test_flex_gives_the_numbers_of_reference(denominator, lengths):
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    arguments = make_mask(), BLOCK, lengths, denominator
    expected = reference.block_sparse_attention(
        *(x.double() for x in inputs()), *arguments, 0.0, None
    )
    got = flex.block_sparse_attention(*inputs(), *arguments)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)


def test_another_mask_of_the_same_shape_gives_its_own_numbers():
    outputs = [
        flex.block_sparse_attention(*inputs(), mask, BLOCK, None, "zero_logits")[0]
        for mask in (make_mask(), ~make_mask())
    ]
    assert not outputs[0][:, :, :BLOCK].any() and not outputs[1][:, :, BLOCK : 2 * BLOCK].any()
    assert outputs[1][:, :, :BLOCK].all()


def test_the_benchmark_compiles_flex():
    """The compiled forward, renormalised, that sat.benchmark compares with."""
    mask = make_mask()
    mask[0, 0] = True  # a row with nothing selected is not flex' case
    q, k, v = inputs()
    with torch.no_grad():
        got = benchmark.flex_forward(mask, BLOCK)(q, k, v)
    expected, _ = reference.block_sparse_attention(
        q, k, v, mask, BLOCK, None, "renormalised", 0.0, None
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": None}, "it has no dense attention"),
        ({"dropout_p": 0.1}, "it has no dropout"),
        ({"dtype": torch.float64}, "it takes torch.float32, torch.bfloat16, torch.float16, got"),
        ({"device": "meta"}, "the tensors are on meta"),
    ],
)
def test_what_flex_cannot_do_is_named(change, message):
    q = torch.zeros(1, 1, N, 16, dtype=change.get("dtype"), device=change.get("device"))
    options = {"block_size": BLOCK, "dropout_p": 0.0} | change
    assert message in flex.obstacle(q, options["block_size"], options["dropout_p"])


def test_behind_the_door_on_the_cpu_by_name():
    q, k, v = (x.requires_grad_() for x in inputs())
    options = {"block_size": BLOCK, "backend": "flex"}
    with torch.no_grad():
        o = attention.block_sparse_attention(q, k, v, make_mask(), **options)
    expected = attention.block_sparse_attention(
        q, k, v, make_mask(), block_size=BLOCK, backend="reference"
    )
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'flex' has no backward on the CPU; use torch.no_grad"):
        attention.block_sparse_attention(q, k, v, make_mask(), **options)
    with pytest.raises(ValueError, match="'flex' cannot be used: it has no dropout"):
        attention.block_sparse_attention(q, k, v, make_mask(), **options, dropout_p=0.1)
    with pytest.raises(ValueError, match="'flex' cannot be used: it has no dense attention"):
        attention.dense_attention(q, k, v, backend="flex")


@pytest.fixture
def a_gpu(monkeypatch):
    """The choice for a GPU, with errors and times given by tables: what it takes and what it logs."""
    errors, times = {}, {}

    def largest_error(backend, dtype):
        error = errors.get((backend, dtype), errors[backend])
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(selection, "unavailable", lambda backend: None)
    monkeypatch.setattr(selection, "largest_error", largest_error)
    monkeypatch.setattr(selection, "milliseconds", times.__getitem__)
    monkeypatch.setattr(kernels, "instruction_set", lambda device_type: "cuda")
    return errors, times


def test_on_a_gpu_the_fastest_of_those_that_pass(a_gpu, monkeypatch, caplog):
    errors, times = a_gpu
    errors.update(cuda=1e-7, flex=1e-7)
    times.update(cuda=1.0, flex=2.0)
    assert selection._choose.__wrapped__("cuda")[0] == "cuda" and not caplog.records
    times.update(flex=0.5)
    with caplog.at_level("INFO"):
        assert selection._choose.__wrapped__("cuda")[0] == "flex"
    assert "attention on cuda: flex; cuda 1.00 ms a call; flex 0.50 ms a call" in caplog.text
    q = torch.empty(1, 1, 32, 32, device="meta")
    monkeypatch.setattr(selection, "_ranking", lambda device_type: ("flex", "cuda", "reference"))
    monkeypatch.setitem(selection.CANDIDATES, "meta", ("cuda", "flex"))
    monkeypatch.setattr(
        selection,
        "_obstacle",
        lambda name, q, block_size, dropout_p: "no" if name == "flex" and dropout_p else None,
    )
    assert selection.resolve("auto", q, 32) == "flex"
    assert selection.resolve("auto", q, 32, dropout_p=0.1) == "cuda"
    errors.update(flex=1.0)
    assert selection._choose.__wrapped__("cuda")[0] == "cuda"
    errors.update({("cuda", torch.bfloat16): 0.5})
    assert selection._choose.__wrapped__("cuda")[0] == "reference"
    assert "not cuda: its kernels differ from reference by 5.0e-01 in bfloat16" in caplog.text
    assert "plain PyTorch" in caplog.text and "not flex: its kernels differ" in caplog.text


def test_a_check_that_fails_is_said_in_the_table(a_gpu, capsys):
    errors, times = a_gpu
    errors.update(cuda=RuntimeError("no kernel image"), cpu=1e-7, flex=1e-7, reference=1e-7)
    times.update(cpu=1.0, flex=1.0, reference=1.0)
    assert selection._choose.__wrapped__("cuda")[0] == "flex"
    rows = {row[0]: row for row in backends.table()}
    assert rows["cuda"][2] == "NO: its check failed: no kernel image"
    assert rows["cpu"][2:] == ("yes (1e-07)", "1.0 ms")
