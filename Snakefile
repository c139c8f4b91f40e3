# Sparse-attention Transformers on the Long Range Arena: from the archives to the results table.
#
#   snakemake --cores 8 --use-conda all                            the whole real run
#   snakemake all --cores 2 --configfile config/demo.yaml          the offline demo
#   snakemake --cores 8 --use-conda listops                        one task
#   snakemake --cores 1 table                                      the results tables
#   snakemake --cores 1 report                                     tables, figures and sources in one HTML file
#   snakemake --cores 1 --use-conda benchmark                      time and memory of attention
#   snakemake --cores 8 llama                                      llama.cpp, built and tried
#
# workflow/rules/ holds the rules in the order in which the data flow, config/config.yaml the settings.

import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

min_version("9.0")

sys.path[:0] = [workflow.basedir, f"{workflow.basedir}/workflow/scripts"]

import environments
from sat import config as settings


configfile: "config/config.yaml"


try:
    on_command_line = settings.typed(dict(workflow.config_settings.config))
    config = settings.complete(settings.merge(config, on_command_line), where="configuration")
except settings.ConfigError as error:
    raise WorkflowError(str(error))

RUN = config["run"]
DATA = f"data/{RUN}"
RESULTS = f"results/{RUN}"
TASKS = config["tasks"]


wildcard_constraints:
    task="|".join(map(re.escape, TASKS)),
    attention="|".join(map(re.escape, config["attentions"])),
    seed=r"\d+",


include: "workflow/rules/common.smk"
include: "workflow/rules/archives.smk"
include: "workflow/rules/preprocess.smk"
include: "workflow/rules/kernels.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/results.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/llama.smk"


localrules:
    all,
    benchmark,
    collect,
    compare,
    data,
    draw_figures,
    draw_summary,
    export_model,
    kernels,
    figures,
    llama,
    models,
    report,
    report_attention,
    table,
    table_so_far,
    write_report,


rule all:
    default_target: True
    input:
        rules.table.input,
        rules.figures.input,
        rules.report.input,
        rules.models.input,


rule data:
    input:
        expand(f"{DATA}/{{task}}/manifest.json", task=TASKS),


rule kernels:
    input:
        rules.compile_kernels.output,


# One target a task, under each of its names: its trainings and figures.
for _name, _task in [
    *((task, task) for task in TASKS),
    *((alias, task) for alias, task in settings.ALIASES.items() if task in TASKS),
]:

    rule:
        name:
            _name
        input:
            runs_of(_task),
            figures_of(_task),
        localrule: True


onstart:
    refuse_what_storage_lacks()
    make_environments()
    Path(RESULTS).mkdir(parents=True, exist_ok=True)
    # In the configuration's own order: rules record parts of it as params, and another order is another text.
    partial = Path(f"{RESULTS}/config.json.partial")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(f"{RESULTS}/config.json")


onsuccess:
    _table = Path(f"{RESULTS}/table.md")
    if any(job.name == "collect" for job in workflow.dag.jobs) and _table.is_file():
        print(f"\n{_table.read_text()}", file=sys.stderr)
    _summary = Path(f"{RESULTS}/llama/summary.md")
    if any(job.name == "run_llama" for job in workflow.dag.jobs) and _summary.is_file():
        print(f"\n{_summary.read_text()}", file=sys.stderr)
    _made = {
        "report.html": f"Report: {RESULTS}/report.html",
        "table.csv": f"Table: {RESULTS}/table.{{csv,md,tex}}, tables/",
        "figures": f"Figures: {RESULTS}/figures/<task>/",
        "llama": f"llama.cpp: {RESULTS}/llama/",
        "logs": f"Logs: {RESULTS}/logs/",
    }
    print(
        "   ".join(text for name, text in _made.items() if Path(RESULTS, name).exists()),
        file=sys.stderr,
    )


onerror:
    print(
        "\nA step failed (its log is above). Other trainings go on with --keep-going; the table of what is finished, "
        "failed runs as rows: the same command with the target table_so_far.",
        file=sys.stderr,
    )
