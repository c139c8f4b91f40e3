"""Time and memory of training steps beside other ways to train the same model on the CPU.

    python -m sat.benchmark step --json step.json [--quick] [--threads 2] [--rounds 5]

For every shape, in one process and interleaved, with the same allocator settings and random ids:

    sdpa          plain PyTorch: nn modules, dense scaled_dot_product_attention, no statistics
    materialised  SAT's way: attention maps [B, H, S, S] as tensors, copied for NumPy's statistics
    dense         our dense step: mean maps, pattern loss, skewness and distance
    without maps  the same step of a run that never switches: no maps, no pattern loss, no statistics
    sparse        our sparse step at the density of the task

A step is forward, backward, clipping by value and AdamW. The clock is wall time, or with one thread
the CPU time of the process. `outside` is the share of our step that is not model and optimiser:
gathering the batch (loading), what is done with the mean maps (statistics: skewness, distance, pooling, pattern loss),
the line of the history (logging), each timed alone. `peak` is the memory that a step
at length 4096 takes in a process of its own, beyond what the process had before it.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {  # task whose model it is, batch
    "image": ("image", 32),
    "N=4096": ("text", 4),
    "listops": ("listops", 8),
}
QUICK_SHAPES = {"image": ("image", 2)}
WAYS = ("sdpa", "materialised", "dense", "without maps", "sparse")
# (name, numerator, denominator, must and aim for each of SHAPES)
BARS = (
    ("sparse over sdpa, times faster", "sdpa", "sparse", (2.6, 7, 4), (5, 13, 8)),
    (
        "sdpa over dense, times faster",
        "sdpa",
        "dense",
        (1 / 0.9, 1 / 0.85, 1 / 0.85),
        (1 / 0.7,) * 3,
    ),
    ("dense over SAT's way, times faster", "materialised", "dense", (2.3, 3, 2.7), (3, 3.9, 3.5)),
    ("sparse over SAT's way, times faster", "materialised", "sparse", (5, 20, 9), (11, 39, 18)),
)


def settings(task: str):
    """Settings of a task's run, and the same with a batch of its own."""
    from sat import config

    return config.RunConfig.from_dict(config.resolve(config.load("lra"), task, "sat", 1))


def random_batch(config, batch: int, seed: int = 0):
    import torch

    from sat.data import Batch

    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.model.sequence_length)
    ids = torch.randint(1, config.model.vocab_size, shape, generator=generator)
    labels = torch.randint(config.model.num_classes, (batch,), generator=generator)
    return Batch([ids], [None], labels)


def plain_model(config, materialised: bool):
    """The same model from PyTorch's own modules; forward(batch) -> (logits, maps [B, H, S, S])."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    model = config.model
    width, hidden, p = model.transformer_dim, model.transformer_hidden_dim, model.dropout_prob
    inner, S = model.num_head * model.head_dim, model.sequence_length

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, hidden),
                nn.GELU(),
                nn.Dropout(p),
                nn.Linear(hidden, width),
                nn.Dropout(p),
            )
            self.dropout = nn.Dropout(p)

        def forward(self, x):
            heads = (len(x), S, 3, model.num_head, model.head_dim)
            q, k, v = self.qkv(self.norms[0](x)).view(heads).permute(2, 0, 3, 1, 4)
            weights = None
            if materialised:
                weights = (q @ k.mT / model.head_dim**0.5).softmax(-1)
                o = weights @ v
            else:
                o = F.scaled_dot_product_attention(q, k, v)
            x = x + self.dropout(self.out(o.transpose(1, 2).reshape(len(x), S, inner)))
            return x + self.mlp(self.norms[1](x)), weights

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(model.vocab_size, width)
            self.position = nn.Parameter(torch.randn(S, width) * 0.02)
            self.dropout, self.norm = nn.Dropout(p), nn.LayerNorm(width)
            self.layers = nn.ModuleList(Layer() for _ in range(model.num_layers))
            self.head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, model.num_classes)
            )
            if materialised:
                self.pattern = nn.ParameterList(
                    torch.rand(model.num_blocks, model.head_dim) for _ in range(model.num_layers)
                )

        def forward(self, batch):
            x = self.dropout(self.embedding(batch.ids[0]) + self.position)
            maps = []
            for layer in self.layers:
                x, weights = layer(x)
                maps.append(weights)
            return self.head(self.norm(x).mean(dim=1)), maps

    return Plain()


def plain_step(config, batch, materialised: bool):
    """A function that does one step of plain PyTorch, materialised: with SAT's pattern loss and statistics."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    model = plain_model(config, materialised).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    n, block = config.model.num_blocks, config.model.block_size
    previous: list = []

    def step():
        optimiser.zero_grad()
        logits, maps = model(batch)
        loss = F.cross_entropy(logits, batch.labels)
        if materialised:
            for P, weights in zip(model.pattern, maps, strict=True):
                pooled = weights.detach().view(*weights.shape[:2], n, block, n, block).mean((3, 5))
                loss = loss + config.training.attn_loss_scale * (pooled - P @ P.T).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimiser.step()
        if materialised:
            new = [w.detach().mean((0, 1)).numpy() for w in maps]
            for index, a in enumerate(new):
                ((a - a.mean()) ** 3).mean() / a.std() ** 3
                if previous:
                    np.linalg.norm(a - previous[index])
            previous[:] = new
        return loss.item()

    return step


def our_training(config, batch: int, sparse: bool, rule: str | None = None, num_inputs: int = 1):
    """A Training in the phase, with the transition rule of the settings or another one."""
    from sat.runtime import make_accelerator
    from sat.training import Training

    changed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, batch_size=batch),
        training=dataclasses.replace(
            config.training, batch_size=batch, num_dense_train_steps=None, skewness=1e9
        ),
        transition=dataclasses.replace(config.transition, rule=rule or config.transition.rule),
    )
    training = Training(changed, num_inputs, make_accelerator("cpu", None))
    if sparse:
        training.go_sparse()
    return training


def our_step(config, batch, sparse: bool, rule: str | None = None):
    training = our_training(config, len(batch), sparse, rule)
    index = iter(range(1, 10**9))
    return lambda: training.step(next(index), batch)["loss"]


def steps(config, batch):
    return {
        "sdpa": plain_step(config, batch, False),
        "materialised": plain_step(config, batch, True),
        "dense": our_step(config, batch, False),
        "without maps": our_step(config, batch, False, "never"),
        "sparse": our_step(config, batch, True),
    }


def outside(config, size: int, rounds: int, clock) -> dict[str, float]:
    """Seconds a step of what is neither model nor optimiser, alone: loading, statistics, the history's line."""
    import numpy as np
    import pyarrow as pa
    import torch

    from sat import data
    from sat.transition import MapStatistics
    from sat.watching import Curves, without_nan

    S = config.model.sequence_length
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 17, (4 * size, S), dtype=np.uint8)
    table = pa.table({"input_ids_0": pa.array(list(ids)), "label": np.zeros(4 * size, np.int32)})
    times: dict[str, list[float]] = {"loading": [], "statistics": [], "logging": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        split = data.Split(path, False, 0)
        pair = [[torch.rand(S, S) for _ in range(config.model.num_layers)] for _ in range(2)]
        follower, training = MapStatistics(), our_training(config, size, False)
        line = {
            "event": "train",
            "step": 1,
            "phase": "dense",
            "learning_rate": 1e-3,
            "loss": 1.0,
            "accuracy": 0.5,
            "ms": 1.0,
        }
        line |= {"skewness": [1.0] * 4, "distance": [1.0] * 4, "change": [1.0] * 4}
        with Curves(Path(folder)) as curves, open(Path(folder) / "history", "w") as history:
            for index in range(rounds + 1):
                start = clock()
                split.batch(data.training_rows(4 * size, size, index, 0), S)
                times["loading"].append(clock() - start)
                start = clock()
                training._pattern_step([pair[index % 2]])
                follower.update(pair[index % 2])
                times["statistics"].append(clock() - start)
                start = clock()
                history.write(json.dumps(without_nan(line)) + "\n")
                curves.add(line)
                times["logging"].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_bytes(way: str, task: str, batch: int) -> int:
    """Memory of one step in a process of its own."""
    command = [sys.executable, "-m", "sat.step_benchmark", "peak", way, task, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_peak(way: str, task: str, batch: int) -> int:
    import torch

    from sat.benchmark import _status, extra_bytes

    config = settings(task)
    torch.set_num_threads(1)
    small = random_batch(config, 1)
    call = steps(config, random_batch(config, batch))[way]
    plain_step(config, small, False)()  # loads libraries, starts threads
    extra = extra_bytes(call)
    return extra if extra is not None else _status("VmHWM:")


def run(options, clock) -> dict:
    """What the file of the benchmark holds; prints the table."""
    from sat.benchmark import _measure, about

    shapes = QUICK_SHAPES if options.quick else SHAPES
    results, shares = [], []
    for name, (task, batch) in shapes.items():
        config = settings(task)
        seconds = _measure(steps(config, random_batch(config, batch)), options.rounds, clock)
        results.append({"shape": name, "task": task, "batch": batch, "seconds": seconds})
        parts = outside(config, batch, options.rounds, clock)
        shares.append({"shape": name, "seconds": parts, "shares": shares_of(parts, seconds)})
        times = ", ".join(f"{way} {1e3 * value:.0f} ms" for way, value in seconds.items())
        print(f"{name}: {times}", file=sys.stderr)
    record = about(options.rounds, clock, os.getloadavg()[0]) | {
        "results": results,
        "outside": shares,
        "peak_bytes": None
        if options.quick
        else {way: peak_bytes(way, "text", 4) for way in ("materialised", "dense")},
    }
    print("\n".join(table(record)))
    return record


def shares_of(parts: dict[str, float], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """By phase: the share of our step that each part outside the model takes."""
    dense = {name: value / seconds["dense"] for name, value in parts.items()}
    sparse = {
        name: value / seconds["sparse"] for name, value in parts.items() if name != "statistics"
    }
    return {"dense": dense, "sparse": sparse}


def _verdict(value: float, must: float, aim: float) -> str:
    return "aim" if value >= aim else "must" if value >= must else "MISSED"


def table(record: dict) -> list[str]:
    """Lines of Markdown: milliseconds a step; every figure, what it must be and what it aims at."""
    lines = [f"| shape | {' | '.join(WAYS)} |", "|---|" + "---:|" * len(WAYS)]
    for result in record["results"]:
        times = " | ".join(f"{1e3 * result['seconds'][way]:,.0f}" for way in WAYS)
        lines.append(f"| {result['shape']} | {times} |")
    lines += [
        "",
        "| figure | shape | measured | must | aim | reached |",
        "|---|---|---|---|---|---|",
    ]
    for title, above, below, musts, aims in BARS:
        for result, must, aim in zip(record["results"], musts, aims, strict=False):
            value = result["seconds"][above] / result["seconds"][below]
            lines.append(
                f"| {title} | {result['shape']} | {value:.2f} | {must:.2f} | {aim:.2f} "
                f"| {_verdict(value, must, aim)} |"
            )
    for name, phases, most in (
        ("outside the model", ("dense", "sparse"), (0.1, 0.05)),
        ("statistics of the maps", ("dense",), (0.05, 0.05)),
        ("loading", ("dense", "sparse"), (0.02, 0.02)),
    ):
        part = {"statistics of the maps": "statistics"}.get(name, name)
        for share in record["outside"]:
            for phase in phases:
                parts = share["shares"][phase]
                value = parts.get(part, sum(parts.values()))
                must, aim = (f"{100 * x:.0f} %" for x in most)
                lines.append(
                    f"| {name}, share of a {phase} step | {share['shape']} | {100 * value:.1f} % | {must} | {aim} "
                    f"| {_verdict(-value, *(-x for x in most))} |"
                )
    if record["peak_bytes"]:
        value = record["peak_bytes"]["materialised"] / max(1, record["peak_bytes"]["dense"])
        lines.append(
            f"| peak memory of SAT's dense step over ours | N=4096 | {value:.1f} | 5 | 10 | {_verdict(value, 5, 10)} |"
        )
    return lines


if __name__ == "__main__":
    print(measure_peak(sys.argv[2], sys.argv[3], int(sys.argv[4])))
