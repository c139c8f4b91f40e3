"""Stand-in for the interpreter of an environment: makes the files of the step that it is told to run, at once.

Steps that need no packages (download.py, extract.py, llama_source.py) run for real. stub_project.install_python puts
the stand-in where Snakemake looks for an interpreter. Each call is a line of calls.jsonl in the working directory, so
that tests see which environment ran which step.
"""

import json
import os
import sys
from pathlib import Path

FILES = {
    "preprocess.py": ["train.arrow", "dev.arrow", "test.arrow", "manifest.json"],
    "build_kernels.py": ["libsat_cpu.so", "kernels.json"],
    "sat": [
        "config.json",
        "metrics.json",
        "history.jsonl",
        "model.safetensors",
        "pattern.safetensors",
    ],
    "compare.py": [
        f"{name}.{form}"
        for name in ("published", "ablation", "cost", "preparation")
        for form in ("csv", "md", "tex")
    ],
    "collect.py": ["table.csv", "table.md", "table.tex", "table_short.tex"],
    "figures.py": [
        f"{name}.{form}"
        for name in ("accuracy", "loss", "time", "statistics", "pattern", "mass")
        for form in ("svg", "png")
    ],
    "model_card.py": [
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "pattern.safetensors",
    ],
    "summary_figures.py": [
        f"{name}.{form}"
        for name in ("summary", "speed", "memory", "preparation")
        for form in ("svg", "png")
    ],
}


def main(arguments: list[str]) -> None:
    step = arguments[1] if arguments[0] == "-m" else Path(arguments[0]).name
    options = dict(zip(arguments, arguments[1:], strict=False))
    call = {"python": sys.argv[0], "step": step, "PYTHONPATH": os.environ.get("PYTHONPATH")}
    with open("calls.jsonl", "a") as calls:
        calls.write(json.dumps(call) + "\n")
    if step in ("download.py", "extract.py", "llama_source.py"):
        os.execv(sys.executable, [sys.executable, *arguments])
    if step == "prepare_tfds.py":
        outputs = [
            Path(options["--data-dir"], *options["--builder"].split(":"), "dataset_info.json")
        ]
    elif step.startswith("llama_"):
        flags = ("--record", "--bench", "--summary")
        outputs = [Path(options[flag]) for flag in flags if flag in options]
    elif "--output" in options:
        outputs = [Path(options["--output"])]
    else:
        outputs = [Path(options["--output-dir"], name) for name in FILES[step]]
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(f"{step}: {output}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
