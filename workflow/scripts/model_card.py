"""Put the best run of a task and attention where others can take it: weights, settings and a model card.

    python workflow/scripts/model_card.py --output-dir results/demo/models/listops/sat \\
        results/demo/runs/listops/sat/seed*

The run with the best accuracy on dev, the first of equal ones, is copied: model.safetensors,
pattern.safetensors, config.json, metrics.json; README.md is a card in the form of the Hugging Face Hub.
`sat.load(folder)` and `python -m sat.predict folder` read such a folder.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from collect import (
    LRA_TASKS,
    accuracy_text,
    describe_device,
    read_metrics,
    read_settings,
    summarise,
)
from tables import write_all

COPIED = ("model.safetensors", "pattern.safetensors", "config.json", "metrics.json")
ORIGINS = {
    "released": "as released",
    "generated": "generated in its layout",
    "own": "data of one's own",
}
TASKS = {"image": "image-classification", "text": "text-classification"}
EXAMPLES = {
    "listops": '"[MAX 2 9 [MIN 4 7 ] 0 ]"',
    "pair": '("one text", "another text")',
    "image": '"picture.png"',
    "text": '"a text"',
}


def best_run(folders: list[Path]) -> Path:
    """The run folder with the best accuracy on dev; ValueError when there is none."""
    if not folders:
        raise ValueError("no run folder given")
    ordered = sorted(folders)
    accuracies = [read_metrics(f / "metrics.json", COPIED)["dev"]["accuracy"] for f in ordered]
    return ordered[accuracies.index(max(accuracies))]


def input_kind(metrics: dict[str, Any]) -> str:
    """A key of EXAMPLES."""
    described = metrics.get("input") or {}
    if described.get("input_type") == "image":
        return "image"
    if described.get("symbols"):
        return "listops"
    return "pair" if metrics.get("num_inputs") == 2 else "text"


def front_matter(metrics: dict[str, Any], name: str) -> str:
    """The card's metadata: YAML, of which JSON is a part, a key a line."""
    kind = input_kind(metrics)
    task = {"type": TASKS["image" if kind == "image" else "text"]}
    of_lra = metrics["task"] in LRA_TASKS and metrics["data"] == "released"
    origin = "Long Range Arena" if of_lra else ORIGINS[metrics["data"]]
    tags = {"sparse-attention", "sat", metrics["attention"]}
    data_set = {
        "name": f"{metrics['task']}, {origin}",
        "type": metrics["task"],
        "split": "test",
    }
    values = [
        {"type": key, "value": metrics["test"][key], "name": f"test {key}"}
        for key in ("accuracy", "loss")
    ]
    fields = {
        "license": "apache-2.0",
        "library_name": "pytorch",
        "pipeline_tag": task["type"],
        "tags": sorted(tags | ({"long-range-arena"} if of_lra else set())),
        "metrics": ["accuracy"],
        "model-index": [
            {"name": name, "results": [{"task": task, "dataset": data_set, "metrics": values}]}
        ],
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items())


def make_card(folder: Path, all_metrics: list[dict[str, Any]], output_dir: Path) -> str:
    """README.md of the run in `folder`, with what all seeds reached."""
    metrics, settings = read_metrics(folder / "metrics.json"), read_settings(folder / "config.json")
    name = f"{metrics['task']}-{metrics['attention']}"
    model, row = settings["model"], summarise(all_metrics, len(all_metrics))
    switch = metrics["transition"]
    if switch["step"] is None:
        phase = "Its attention is the same from the first step to the last; it did not go sparse."
    else:
        densities = ", ".join(f"{d:.3f}" for d in metrics["pattern"]["density"])
        phase = (
            f"It went sparse at step {switch['step']} (by {switch['reason']}) and keeps these shares of the blocks, "
            f"layer by layer: {densities}. pattern.safetensors holds them."
        )
    chance = f"{100 * metrics['test']['chance']:.2f} %"
    if metrics["test"]["baseline"] is not None:
        chance += f"; answering by the root operator alone gives {100 * metrics['test']['baseline']:.2f} %"
    warning = (
        "\n**Trained and tested on generated data**, not on the released data set: its accuracy is not comparable with "
        "published figures, and it is of no use for the task itself.\n"
        if metrics["data"] == "generated"
        else ""
    )
    sources = "".join(
        f"- {s.get('name') or s.get('file') or 'source'}: sha256 {s.get('sha256') or 'unknown'}\n"
        for s in metrics.get("sources") or []
    )
    versions = ", ".join(f"{k} {v}" for k, v in (metrics.get("versions") or {}).items())
    made_by = f"Commit {metrics.get('git_commit') or 'unknown'}" + (
        f"; {versions}." if versions else "."
    )
    results = "".join(
        f"| {words} | {100 * scored['accuracy']:.2f} | {scored['loss']:.3f} | {scored['examples']} |\n"
        for words, scored in (
            ("test", metrics["test"]),
            ("dev, of the checkpoint", metrics["dev"]),
        )
    )
    seeds = f"This is seed {metrics['seed']}, the only one."
    if len(all_metrics) > 1:
        seeds = (
            f"This is seed {metrics['seed']}, the best on dev of {len(all_metrics)}; all of them together reach\n"
            f"{accuracy_text(row)} % on test."
        )
    layers = f"{model['num_layers']} layer{'s' if model['num_layers'] > 1 else ''}"
    example = EXAMPLES[input_kind(metrics)]
    return f"""---
{front_matter(metrics, name)}---

# {metrics["task"]} with {metrics["attention"]} attention

A Transformer classifier of {metrics["num_parameters"]:,} parameters ({layers}, width
{model["transformer_dim"]}, {model["num_head"]} heads), trained by sat-lra. {phase}
{warning}
## Use

In a clone of sat-lra, with the Python of its torch environment:

```python
import sat

sat.load("{output_dir}").predict([{example}])
```

or `python -m sat.predict {output_dir} FILE`. Inputs are encoded as the preprocessing encodes them.

## Result

| | accuracy (%) | loss (nats) | examples |
|---|---:|---:|---:|
{results}
Chance is {chance}. {seeds}

## Training

{metrics["num_steps"]} steps of {settings["training"]["batch_size"]} sequences in {metrics["training_seconds"]:.0f} s on
{describe_device(metrics["device"])}; every setting is in config.json. {made_by}

Data (sha256 {metrics["data_sha256"]} over the processed splits):

{sources or "- sources not recorded" + chr(10)}"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, help="folders of the seeds")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        best = best_run(args.run_dirs)
        all_metrics = [read_metrics(f / "metrics.json") for f in sorted(args.run_dirs)]
        card = make_card(best, all_metrics, args.output_dir)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        copies = {args.output_dir / name: (best / name).read_bytes() for name in COPIED}
        write_all(copies | {args.output_dir / "README.md": card})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {args.output_dir} ({best})")


if __name__ == "__main__":
    main()
