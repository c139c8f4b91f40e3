"""Time that Snakemake takes to plan many trainings (a dry run of `all` in a copy of the project; nothing runs).

.venvs/test/bin/python tests/workflow/benchmark_plan.py [--trainings 200 1000 10000]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "workflow/scripts")]

import stub_project  # noqa: E402

TASKS = ["listops", "text", "retrieval", "image", "pathfinder", "agnews", "yelp"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainings", type=int, nargs="+", default=[200, 1000, 10_000])
    options = parser.parse_args()
    print("trainings  jobs  seconds")
    with tempfile.TemporaryDirectory() as folder:
        project = stub_project.make(Path(folder) / "project")
        attentions = [path.stem for path in (project.root / "config/attentions").glob("*.yaml")]
        for trainings in options.trainings:
            seeds = max(1, round(trainings / (len(TASKS) * len(attentions))))
            project.configure(tasks=TASKS, attentions=attentions, seeds=list(range(seeds)))
            before = time.perf_counter()
            done = project.snakemake("--dry-run", "all", "--configfile", "config/tiny.yaml")
            seconds = time.perf_counter() - before
            if done.returncode != 0:
                sys.exit(done.stdout)
            jobs = next(line for line in done.stdout.splitlines() if line.startswith("total"))
            print(f"{len(TASKS) * len(attentions) * seeds:9}  {jobs.split()[1]:>4}  {seconds:7.1f}")


if __name__ == "__main__":
    main()
