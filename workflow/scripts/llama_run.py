"""Try a build of llama.cpp on the CPU: a few tokens from a model, and llama-bench on it.

    python workflow/scripts/llama_run.py --build results/lra/llama/build.json --source data/lra/llama/source.json \
        --bench results/lra/llama/bench.csv --summary results/lra/llama/summary.md --threads 8 [--model path.gguf]

Run it with the Python of envs/llama.yaml (gguf is imported where it is used: the rest works without). Without --model
it writes a Llama model of a few million random weights with the vocabulary of a ggml-vocab-*.gguf of the source tree:
its text means nothing, and that it comes out is the test.
"""

import argparse
import csv
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from build_kernels import excerpt
from lra.files import read_json, run_script, scratch_folder

PROMPT = "The long range arena"
NUM_TOKENS = 16
TIME_LIMIT = 600  # seconds of each program
SEED = 7
VOCABULARY = "models/ggml-vocab-llama-spm.gguf"
# Small, but each part of a Llama is there; head width 32, two query heads share a key.
EMBEDDING, FEED_FORWARD, LAYERS, HEADS, KEY_HEADS, CONTEXT = 128, 256, 2, 4, 2, 512


def vocabulary(path: Path) -> dict[str, object]:
    """The fields tokenizer.ggml.* of a GGUF file, in the file's types. ValueError when it has none."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    found = {name: field for name, field in fields.items() if name.startswith("tokenizer.ggml.")}
    if "tokenizer.ggml.tokens" not in found:
        raise ValueError(f"{path} has no vocabulary (tokenizer.ggml.tokens)")
    return found


def write_random_model(path: Path, vocabulary_file: Path, seed: int = SEED) -> int:
    """Write a Llama of random weights, N(0, 0.02^2) and norms of 1, as GGUF; returns its number of weights.

    The same seed gives the same bytes. Raises ValueError when the vocabulary cannot be used.
    """
    if not vocabulary_file.is_file():
        raise ValueError(
            f"{vocabulary_file} is missing: this version has no such vocabulary; name a model of your own, "
            "llama: {model: path.gguf}"
        )
    import gguf
    import numpy

    tokens = vocabulary(vocabulary_file)
    num_tokens = len(tokens["tokenizer.ggml.tokens"].data)
    key_width = EMBEDDING // HEADS * KEY_HEADS
    generator = numpy.random.default_rng(seed)
    shapes = {"token_embd.weight": (num_tokens, EMBEDDING), "output_norm.weight": (EMBEDDING,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (EMBEDDING,),
            f"blk.{i}.attn_q.weight": (EMBEDDING, EMBEDDING),
            f"blk.{i}.attn_k.weight": (key_width, EMBEDDING),
            f"blk.{i}.attn_v.weight": (key_width, EMBEDDING),
            f"blk.{i}.attn_output.weight": (EMBEDDING, EMBEDDING),
            f"blk.{i}.ffn_norm.weight": (EMBEDDING,),
            f"blk.{i}.ffn_gate.weight": (FEED_FORWARD, EMBEDDING),
            f"blk.{i}.ffn_up.weight": (FEED_FORWARD, EMBEDDING),
            f"blk.{i}.ffn_down.weight": (EMBEDDING, FEED_FORWARD),
        }
    shapes["output.weight"] = (num_tokens, EMBEDDING)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_vocab_size(num_tokens)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, field in tokens.items():
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights = numpy.ones(shape, numpy.float32)
        else:
            weights = (0.02 * generator.standard_normal(shape)).astype(numpy.float32)
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(int(numpy.prod(shape)) for shape in shapes.values())


def check_model(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"llama.model: {path} is not a file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"llama.model: {path} is no GGUF file")


def call(command: list[object], seconds: float = TIME_LIMIT) -> tuple[str, str]:
    """(stdout, stderr) of a program of the build. ValueError when it fails or takes longer than `seconds`."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=os.environ | {"LLAMA_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{name} was stopped after {seconds:.0f} s; try a smaller llama.model, or build_type Release"
        ) from None
    said = [stream.decode(errors="replace") for stream in (done.stdout, done.stderr)]
    if done.returncode:
        raise ValueError(f"{name} failed (exit {done.returncode}):\n{excerpt(said[1] or said[0])}")
    return said[0], said[1]


def complete(bin_folder: Path, programs: list[str], model: Path, threads: int) -> dict:
    """Let the build continue PROMPT: {program, text, tokens, tokens_per_second}.

    Older versions have no llama-completion; their llama-cli does the same.
    """
    program = next(name for name in ("llama-completion", "llama-cli") if name in programs)
    command = [bin_folder / program, "-m", model, "-p", PROMPT, "-n", NUM_TOKENS, "-t", threads]
    command += ["-c", 256, "-ngl", 0, "-s", SEED, "--temp", 0, "--ignore-eos", "-no-cnv"]
    text, said = call([*command, "--no-display-prompt", "--perf"])
    return {"program": program, "text": text, **parse_timings(said)}


def parse_timings(said: str) -> dict:
    """Tokens and speed of the generation, from the lines that llama.cpp ends with. ValueError without them."""
    found = re.search(
        r"(?<!prompt )eval time =\s*[\d.]+ ms /\s*(\d+) runs.*?([\d.]+|inf|nan) tokens per second",
        said,
    )
    if not found:
        raise ValueError(f"no line 'eval time = ...' in what it said:\n{excerpt(said)}")
    # The first token comes out of the prompt's pass, which is timed apart.
    return {"tokens": int(found[1]) + 1, "tokens_per_second": float(found[2])}


def parse_bench(text: str) -> list[dict[str, str]]:
    """The rows of llama-bench -o csv. ValueError when a column is missing or nothing was measured."""
    start = re.search(r"^build_commit,", text, re.MULTILINE)
    rows = list(csv.DictReader(io.StringIO(text[start.start() :]))) if start else []
    needed = {
        "model_type",
        "model_n_params",
        "n_threads",
        "n_prompt",
        "n_gen",
        "avg_ts",
        "stddev_ts",
    }
    if not rows or needed - rows[0].keys():
        lacks = f"lacks {', '.join(sorted(needed - rows[0].keys()))}" if rows else "has no rows"
        raise ValueError(f"the CSV of llama-bench {lacks}:\n{excerpt(text)}")
    for row in rows:
        if None in row.values() or not float(row["avg_ts"]) > 0:
            raise ValueError(f"llama-bench measured nothing in the row {row}")
    return rows


def bench(bin_folder: Path, model: Path, threads: int) -> list[dict[str, str]]:
    command = [bin_folder / "llama-bench", "-m", model, "-p", 64, "-n", 16, "-r", 3]
    return parse_bench(call([*command, "-t", threads, "-ngl", 0, "-o", "csv"])[0])


def as_csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def printable(text: str) -> str:
    """`text` on one line, without characters that steer a terminal or a page."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def speed(per_second: float, shown: str) -> str:
    """`shown`, or that the timer's ticks are too long for it."""
    return shown if math.isfinite(per_second) else "too fast to time"


def summary(build: dict, model: str, completion: dict, rows: list[dict[str, str]]) -> str:
    """The Markdown summary; without a heading, for the report to take it in."""
    commit = f", commit `{build['commit'][:12]}`" if build["commit"] else ""
    steps = build["steps"]
    earlier = f", {steps['earlier']} of them by earlier calls" if steps["earlier"] else ""
    shown = printable(completion["text"]).replace("`", "'")[:200]
    per_second = completion["tokens_per_second"]
    lines = [
        f"**llama.cpp {build['version']}**{commit}, from `{build['from']}`, built as {build['build_type']} with "
        f"{build['compiler']['version']} (flags `{build['flags']}`{', ccache' if build['ccache'] else ''}).",
        f"The last call took {build['seconds']:.0f} s with {build['threads']} threads; there are "
        f"{steps['all']} steps{earlier}, {build['seconds_of_steps']:.0f} s together.",
        "",
        f'Model: {model}. `{completion["program"]}` continued "{PROMPT}" by {completion["tokens"]} tokens, '
        f"{speed(per_second, f'{per_second:.1f} a second')}:",
        "",
        f"`{shown or '(nothing that can be printed)'}`",
        "",
        "| model | weights | threads | test | tokens a second |",
        "|---|---:|---:|---|---:|",
    ]
    for row in rows:
        tests = {"prompt of": int(row["n_prompt"]), "generate": int(row["n_gen"])}
        test = ", ".join(f"{name} {number}" for name, number in tests.items() if number)
        mean, deviation = float(row["avg_ts"]), float(row["stddev_ts"])
        lines.append(
            f"| {row['model_type']} | {int(row['model_n_params']):,} | {row['n_threads']} | {test} | "
            f"{speed(mean, f'{mean:.1f} ± {deviation:.1f}')} |"
        )
    lines += ["", "All on the CPU, with `llama-bench`; bench.csv has every column."]
    if build["build_type"] == "Debug":
        lines += ["A Debug build is slow: build_type Release is the one to measure."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", required=True, type=Path, help="build.json")
    parser.add_argument("--source", required=True, type=Path, help="source.json")
    parser.add_argument("--bench", required=True, type=Path, help="bench.csv")
    parser.add_argument("--summary", required=True, type=Path, help="summary.md")
    parser.add_argument("--model", type=Path, help="a GGUF file (default: random weights)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    build = read_json(args.build)
    if not {"llama-completion", "llama-cli"} & set(build["programs"]):
        raise ValueError(f"{args.build}: the build has neither llama-completion nor llama-cli")
    programs = Path(build["folder"]) / "bin"
    with scratch_folder(args.summary.with_name(".run.tmp")) as scratch:
        if args.model:
            check_model(args.model)
            model, name = args.model, f"`{args.model.name}`"
        else:
            model = scratch / "random.gguf"
            tree = Path(read_json(args.source)["folder"])
            count = write_random_model(model, tree / VOCABULARY)
            name = f"{count:,} random weights (seed {SEED}), so that the text means nothing"
        print(f"llama.cpp: a few tokens, {args.threads} threads", file=sys.stderr)
        completion = complete(programs, build["programs"], model, args.threads)
        print("llama.cpp: llama-bench", file=sys.stderr)
        rows = bench(programs, model, args.threads)
        for row in rows:
            row["model_filename"] = model.name
        for path, text in (
            (args.bench, as_csv(rows)),
            (args.summary, summary(build, name, completion, rows)),
        ):
            (scratch / path.name).write_text(text, encoding="utf-8")
            os.replace(scratch / path.name, path)


if __name__ == "__main__":
    run_script(main)
