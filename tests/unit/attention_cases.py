"""Inputs of attention for the tests of the kernels, and their check against `reference` in float64."""

import torch

EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random(shape, seed=0, scale=1.0):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, d_o = (torch.randn(shape, generator=generator) for _ in range(4))
    return [q * scale, k, v, d_o]


def random_mask(num_blocks, kind="random"):
    """A block mask of a kind: none, one, all, random with an empty and a full row."""
    mask = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    if kind == "all":
        mask[:] = True
    elif kind == "one":
        mask[num_blocks - 1, 0] = True
    elif kind == "random":
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(7)) < 0.4
        mask[0], mask[1] = False, True
    return mask


def run(call, backend, dtype, inputs):
    """Outputs of call(backend, q, k, v) and the gradients of the first one, on the CPU."""
    device = "cuda" if backend == "cuda" else "cpu"
    *qkv, d_o = (x.to(dtype).to(device) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in qkv]
    outputs = call(backend, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs[0], leaves, d_o)
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def check(call, backend, inputs, dtype=torch.float32, rounding=1e-7, factor=2, share=1e-5):
    """At most `factor` times plain PyTorch's error in float32 (None: not compared) and `share` of the largest value.

    The share is not asked where plain PyTorch is above it, with large scores. A few roundings of the largest value are
    allowed beside, more where a smaller type is written. Where a softmax has one winner, the gradient of its scores is
    the rounding of dO v - <dO, o>: `rounding`, relative to the size of these.
    """
    inputs = [x.to(dtype).float() for x in inputs]  # what both sides see
    q, k, v, d_o = (x.abs().max().item() for x in inputs)
    exact = run(call, "reference", torch.float64, inputs)
    plain = run(call, "reference", torch.float32, inputs)
    ours = run(call, backend, dtype, inputs)
    noise = [0.0] * (len(exact) - 3) + [rounding * d_o * v * k, rounding * d_o * v * q, 0.0]
    for expected, rough, got, extra in zip(exact, plain, ours, noise, strict=True):
        assert torch.equal(got.isinf(), expected.isinf())  # log-sum-exp of empty rows
        expected, rough, got = (x.double().nan_to_num(neginf=0) for x in (expected, rough, got))
        error, of_plain = ((x - expected).abs().max().item() for x in (got, rough))
        largest = expected.abs().max().item()
        # delta is made from the rounded output, so gradients keep a few of its roundings
        extra += 4 * EPSILON[dtype] * largest
        limits = [] if factor is None else [factor * of_plain]
        if of_plain <= share * largest:
            limits.append(share * largest)
        allowed = min(limits) + extra
        assert error <= allowed, f"{error:.2e} > {allowed:.2e}"
