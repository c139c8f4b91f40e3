"""Command line of one training: train it, or score it on test.

    python -m sat --mode train --task lra-image --random 1001 --name sat --sk 1.7 --ds 1.3
    python -m sat --mode eval  --task lra-image --random 1001 --name sat

    python -m sat --mode train --task lra-image --name sat --processes 4      # a GPU each, one training

reads data/<run>/<task>/ and config/, and writes results/<run>/runs/<task>/<name>/seed<random>/; <run> is lra unless
--run names another one (config/<run>.yaml). The pipeline passes the settings whole (--settings).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from pathlib import Path

from sat import config as settings
from sat import failure, gpu_lock
from sat.launch import is_main, with_allocator_settings


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mode", choices=["train", "eval"], required=True)
    which = parser.add_argument_group("which training")
    which.add_argument(
        "--task",
        help="listops, text, retrieval, image (cifar10), pathfinder, agnews or yelp, with or without lra-",
    )
    which.add_argument(
        "--name", metavar="ATTENTION", help="a file config/attentions/ATTENTION.yaml (default: sat)"
    )
    which.add_argument("--random", type=int, metavar="SEED", help="(default: 1001)")
    which.add_argument("--run", help="run set: the folder below data/ and results/ (default: lra)")
    which.add_argument(
        "--settings", metavar="JSON", help="every setting, instead of the options above"
    )
    changes = parser.add_argument_group("changes to the configuration (train)")
    changes.add_argument("--sk", type=float, metavar="SKEWNESS", help="training.skewness")
    changes.add_argument(
        "--ds", type=float, metavar="DISTANCE", help="training.distance, in percent"
    )
    changes.add_argument(
        "--train_steps", "--train-steps", type=int, metavar="N", help="training.num_train_steps"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", type=Path, help="processed task (default: data/<run>/<task>)")
    where.add_argument("--output-dir", type=Path, help="the run's folder")
    where.add_argument(
        "--kernels",
        type=Path,
        help="folder of the compiled kernels (default: results/<run>/kernels)",
    )
    where.add_argument("--device", choices=["cpu"], help="cpu: do not use a GPU")
    where.add_argument(
        "--threads", type=int, help="CPU threads of all processes together (default: torch's)"
    )
    where.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that share every batch, each with a GPU of its own where there are any",
    )
    options = parser.parse_args(arguments)
    named = _given(options, "--task", "--name", "--random", "--run")
    changed = _given(options, "--sk", "--ds", "--train_steps")
    if options.settings is not None and named + changed:
        parser.error(f"--settings holds every setting, {(named + changed)[0]} too: leave one out")
    if options.mode == "eval" and changed:
        parser.error(
            f"{changed[0]} changes a training; --mode eval scores a run with the settings it was trained with"
        )
    if options.task is None and options.settings is None:
        parser.error("name the training with --task")
    for key, default in (("name", "sat"), ("random", 1001), ("run", "lra")):
        if getattr(options, key) is None:
            setattr(options, key, default)
    return options


def _given(options: argparse.Namespace, *names: str) -> list[str]:
    return [name for name in names if getattr(options, name.removeprefix("--")) is not None]


def resolve(options: argparse.Namespace) -> dict:
    """The settings that the command line means. Raises ConfigError."""
    if options.settings is not None:
        try:
            whole = json.loads(options.settings)
        except json.JSONDecodeError as error:
            raise settings.ConfigError(f"--settings: not valid JSON ({error})") from None
        return settings.checked_run(whole)
    flags = {"skewness": options.sk, "distance": options.ds, "num_train_steps": options.train_steps}
    changes = {"training": {key: value for key, value in flags.items() if value is not None}}
    config = settings.load(options.run)
    return settings.resolve(config, options.task, options.name, options.random, changes=changes)


def which(options: argparse.Namespace) -> tuple[str, str, str, int]:
    """(run set, task, attention, seed) to score, whatever the configuration is now. Raises ConfigError."""
    if options.settings is not None:
        resolved = resolve(options)
        return tuple(resolved[key] for key in ("run", "task", "attention", "seed"))
    task = settings.canonical_task(options.task)
    if not Path("results", options.run, "runs", task, options.name).is_dir():
        settings.load(options.run)
        settings.canonical_attention(options.name)
    return options.run, task, options.name, options.random


def take_devices(options: argparse.Namespace, arguments: list[str]) -> None:
    """Lock a free GPU a process; where several processes are wanted, become their launcher. Raises ConfigError."""
    started_by_launcher = "LOCAL_RANK" in os.environ
    gpu_lock.number_as_listed()
    gpus = (
        []
        if options.device == "cpu" or os.environ.get("SAT_GPUS_TAKEN")
        else gpu_lock.visible_gpus(gpu_lock.listed_gpus())
    )
    if started_by_launcher:
        # Process i of `accelerate launch` computes on visible device i; the first one locks for all.
        count = int(os.environ["LOCAL_WORLD_SIZE"])
        if gpus and os.environ["LOCAL_RANK"] == "0":
            gpu_lock.take(gpus[:count], count)
        return
    processes = max(1, options.processes)
    if gpus:
        taken = gpu_lock.take(gpus, processes)
        os.environ |= {"CUDA_VISIBLE_DEVICES": ",".join(taken), "SAT_GPUS_TAKEN": "1"}
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        program = [str(processes), "-m", "sat", *arguments]
        os.execv(sys.executable, [sys.executable, *launcher, *program])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(
        level=logging.INFO if is_main() else logging.ERROR, format="%(message)s"
    )  # the backend that attention takes
    try:
        if options.mode == "train":
            resolved = resolve(options)
            run, task, attention, seed = (
                resolved[key] for key in ("run", "task", "attention", "seed")
            )
        else:
            run, task, attention, seed = which(options)
    except settings.ConfigError as error:
        return _fail(error)
    folder = Path("results", run, "runs", task, attention, f"seed{seed}")
    output_dir, data_dir = options.output_dir or folder, options.data_dir or Path("data", run, task)
    kernels = options.kernels or Path("results", run, "kernels")
    if options.kernels is not None and not kernels.is_dir():
        return _fail(settings.ConfigError(f"--kernels: there is no folder {kernels}"))
    if kernels.is_dir():
        os.environ["SAT_KERNELS"] = str(kernels)

    # torch is imported late: a wrong task name is answered at once.
    import torch.distributed

    from sat import data
    from sat.evaluation import check_finished, evaluate_run, readable
    from sat.interruption import Interrupted
    from sat.memory import OutOfMemory
    from sat.training import TrainingFailed, train

    threads = options.threads
    if threads is not None:
        threads = max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        if options.mode == "eval":
            other = "" if run == "lra" else f" --run {run}"
            check_finished(
                output_dir,
                f"python -m sat --mode train --task {task} --random {seed} --name {attention}{other}",
            )
        if not (data_dir / "manifest.json").is_file():
            data.load(data_dir)  # its error now, not after a wait for a GPU
        take_devices(options, sys.argv[1:] if arguments is None else arguments)
        if options.mode == "train":
            (output_dir / failure.FILE).unlink(missing_ok=True)
            try:
                train(resolved, data_dir, output_dir, device=options.device, threads=threads)
            except (settings.ConfigError, data.DataError, Interrupted):
                raise  # nothing has run, or the same command goes on
            except Exception as error:
                if is_main():
                    with contextlib.suppress(OSError):  # the disk may be what failed
                        failure.record(output_dir, resolved, error)
                raise
        else:
            result = evaluate_run(output_dir, data_dir, options.device, threads)
            if is_main():
                print(json.dumps(result, indent=2), flush=True)
                print(f"{readable(result)}\nalso in {output_dir}/eval.json", file=sys.stderr)
    except (settings.ConfigError, data.DataError, OutOfMemory, TrainingFailed) as error:
        return _fail(error)
    except OSError as error:
        return _fail(f"{error}: mend it and run the same command again")
    except Interrupted as interruption:
        if is_main():
            print(
                f"{interruption}; the state is saved: the same command goes on from it",
                file=sys.stderr,
            )
        return 128 + interruption.number
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _fail(error: Exception | str) -> int:
    if is_main():
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    with_allocator_settings()
    sys.exit(main())
