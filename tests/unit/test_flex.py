"""FlexAttention behind the gate of the zero-logit denominator, forward on the CPU."""

import pytest
import torch

from sat.attention import flex, kernels, reference

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": None}, "it has no dense attention"),
        ({"dropout_p": 0.1}, "it has no dropout"),
        ({"dtype": torch.float64}, "it takes torch.float32, torch.bfloat16, torch.float16, got"),
        ({"grad": True}, "no backward on the CPU; use torch.no_grad"),
        ({"device": "meta"}, "the tensors are on meta"),
    ],
)
def test_what_flex_cannot_do_is_named(change, message):
    q = torch.zeros(1, 1, N, 16, dtype=change.get("dtype"), device=change.get("device"))
    q.requires_grad_(change.get("grad", False))
    options = {"block_size": BLOCK, "dropout_p": 0.0} | change
    assert message in flex.obstacle(q, q, q, options["block_size"], options["dropout_p"])


def test_without_gradients_it_computes_on_the_cpu():
    q = torch.zeros(1, 1, N, 16, requires_grad=True)
    with torch.no_grad():
        assert flex.obstacle(q, q, q, BLOCK, 0.0) is None
