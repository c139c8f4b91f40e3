"""Losses of a tiny run, dense, then sparse, as golden_losses.json has them; only a change of what a step computes
changes them.

    PYTHONPATH=. .venvs/test/bin/python tests/unit/golden_losses.py

measures and stores them anew; the commit says why.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from processed import repeated_symbol, write_processed

from sat import config, data, runtime, training

STORED = Path(__file__).with_suffix(".json")
STEPS, SWITCH = 20, 10
SIZES = {"train": 96, "dev": 16, "test": 16}
CHANGES = {
    "dataset": {"max_length": 64},
    "model": {"num_layers": 2, "max_seq_len": 64, "block_size": 16, "density": 0.3}
    | {"dropout_prob": 0.1, "attention_dropout": 0.1, "batch_size": None},
    "training": {"batch_size": 8, "learning_rate": 1e-3, "warmup": 5, "num_train_steps": STEPS}
    | {"num_dense_train_steps": SWITCH, "skewness": 1e9},
}


def machine() -> dict[str, str]:
    """Where losses are the same to the last bit: the processor, what torch uses of it, the version of torch."""
    keys = ("vendor_id", "cpu family", "model", "stepping")
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    cpu = {line[0].strip(): line[1].strip() for line in reversed(lines) if len(line) == 2}
    return {key: cpu.get(key, "") for key in keys} | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def losses() -> list[float]:
    """Loss of every step, with the kernels of $SAT_KERNELS, or plain PyTorch where there are none."""
    settings = config.resolve(config.load("demo"), "listops", "sat", 3, changes=CHANGES)
    run = config.RunConfig.from_dict(settings)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        write_processed(Path(folder), "listops", repeated_symbol("listops", SIZES, 64))
        _, splits = data.load(Path(folder))
        state = training.Training(run, 1, runtime.make_accelerator("cpu", 1))
        for index in range(STEPS):
            rows = data.training_rows(len(splits["train"]), 8, index, run.seed)
            line = state.step(index, splits["train"].batch(rows, run.model.sequence_length))
            measured.append(line["loss"])
            if state.transition["step"] == index + 1:
                state.go_sparse()
    assert (state.transition, state.phase) == ({"step": SWITCH, "reason": "limit"}, "sparse")
    return measured


def main() -> None:
    os.environ["SAT_KERNELS"] = tempfile.mkdtemp()  # empty: plain PyTorch
    STORED.write_text(json.dumps({"machine": machine(), "losses": losses()}, indent=1) + "\n")
    print(f"wrote {STORED}", file=sys.stderr)


if __name__ == "__main__":
    main()
