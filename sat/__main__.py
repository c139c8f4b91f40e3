"""Command line of one training: train it, or score it on test.

    python -m sat --mode train --task lra-image --random 1001 --name sat --sk 1.7 --ds 1.3
    python -m sat --mode eval  --task lra-image --random 1001 --name sat

reads data/<run>/<task>/ and config/, and writes results/<run>/runs/<task>/<name>/seed<random>/; <run> is lra unless
--run names another one (config/<run>.yaml). The pipeline passes the settings whole (--settings).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from sat import config as settings
from sat.launch import with_allocator_settings


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
        "--name", default="sat", metavar="ATTENTION", help="a file config/attentions/ATTENTION.yaml"
    )
    which.add_argument("--random", type=int, default=1001, metavar="SEED")
    which.add_argument(
        "--run", default="lra", help="run set: the folder below data/ and results/ (default: lra)"
    )
    which.add_argument(
        "--settings", metavar="JSON", help="every setting; the options above are then not used"
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
    where.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    options = parser.parse_args(arguments)
    if options.task is None and options.settings is None:
        parser.error("name the training with --task")
    return options


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


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s"
    )  # the backend that attention takes
    try:
        resolved = resolve(options)
    except settings.ConfigError as error:
        return _fail(error)
    run, task = resolved["run"], resolved["task"]
    folder = Path("results", run, "runs", task, resolved["attention"], f"seed{resolved['seed']}")
    output_dir, data_dir = options.output_dir or folder, options.data_dir or Path("data", run, task)
    kernels = options.kernels or Path("results", run, "kernels")
    if options.kernels is not None and not kernels.is_dir():
        return _fail(settings.ConfigError(f"--kernels: there is no folder {kernels}"))
    if kernels.is_dir():
        os.environ["SAT_KERNELS"] = str(kernels)

    # torch is imported late: a wrong task name is answered at once.
    from sat.data import DataError
    from sat.evaluation import evaluate_run
    from sat.interruption import Interrupted
    from sat.training import TrainingFailed, train

    try:
        if options.mode == "train":
            train(resolved, data_dir, output_dir, device=options.device, threads=options.threads)
        else:
            print(
                json.dumps(
                    evaluate_run(output_dir, data_dir, options.device, options.threads), indent=2
                )
            )
    except (settings.ConfigError, DataError, TrainingFailed) as error:
        return _fail(error)
    except Interrupted as interruption:
        print(
            f"{interruption}; the state is saved: the same command goes on from it", file=sys.stderr
        )
        return 128 + interruption.number
    return 0


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    with_allocator_settings()
    sys.exit(main())
