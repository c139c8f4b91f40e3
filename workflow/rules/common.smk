# What the rules share: names of files, which Python runs a job, functions for inputs and params.

# `local` keeps a file out of object storage (docs/cluster.md): the project's own files, and 25 GB of archives and raw
# files, of which programs also read what Snakemake does not know by name. So are benchmarks, which the tables read from
# their folder, and what else was measured on this machine.
ARCHIVES = f"{DATA}/archives"
LEVEL = settings.resolve_dataset(config, "pathfinder")["options"]["level"]
RAW = {
    "listops": local(
        expand(f"{DATA}/raw/listops/basic_{{split}}.tsv", split=["train", "val", "test"])
    ),
    "retrieval": local(
        expand(f"{DATA}/raw/retrieval/new_aan_pairs.{{split}}.tsv", split=["train", "eval", "test"])
    ),
    "pathfinder": local([f"{DATA}/raw/pathfinder/{LEVEL}.tar"]),
}
# What a task reads when it is not `lra_release`: the source (config/config.yaml, sources) and the files made from it.
TFDS = {
    task: (source, local(f"{DATA}/tfds/{source}/{version}/dataset_info.json"))
    for task, source, version in (
        ("text", "imdb_reviews", "plain_text/1.0.0"),
        ("image", "cifar10", "3.0.2"),
        ("agnews", "ag_news_subset", "1.0.0"),
        ("yelp", "yelp_polarity_reviews", "0.2.0"),
    )
}
PATHFINDER_TFDS = local(f"{DATA}/tfds/pathfinder32/1.0.0/dataset_info.json")
# Sources of three files, which need no extraction.
TSV_FILES = {
    "aan_mirror": {
        f"aan_mirror_{name}": local(f"{ARCHIVES}/new_aan_pairs.{name}.tsv")
        for name in ("train", "eval", "test")
    },
    "listops_tsv": {
        f"listops_{name}": local(f"{ARCHIVES}/basic_{name}.tsv")
        for name in ("train", "val", "test")
    },
}
# A user's own tasks: the files that their settings name.
OWN_FILES = {
    task: local(sorted(path for path in files.values() if path))
    for task in TASKS
    if (files := settings.resolve_dataset(config, task)["options"].get("files"))
}
# Modules that the data scripts share; those that generate are the demo's alone.
MODULES = local(sorted(str(path) for path in Path("workflow/scripts/lra").glob("*.py")))
READING = [path for path in MODULES if not Path(path).name.startswith("generate_")]


# The record of every source: where it came from and its hash.
if config["data"] == "generated":
    RECORDS = {
        source: local(f"{ARCHIVES}/{file}.source.json")
        for source, file in (
            ("lra_release", "lra_release.gz"),
            ("imdb_reviews", "imdb_reviews"),
            ("cifar10", "cifar10"),
        )
    }
else:
    SOURCE_OF_FILE = {
        source["file"]: {"name": name, **source} for name, source in config["sources"].items()
    }
    RECORDS = {
        name: local(f"{ARCHIVES}/{source['file']}.source.json")
        for name, source in config["sources"].items()
    }

KERNEL_SOURCES = local(
    sorted(
        str(path)
        for path in Path("csrc").rglob("*")
        if path.suffix in (".h", ".hpp", ".cpp", ".cu") or path.name == "CMakeLists.txt"
    )
)
# Writes and checks the checksums in what the steps hand on.
SEAL = local("sat/seal.py")
SAT = local(sorted(str(path) for path in Path("sat").rglob("*.py")))
RUN_FILES = [
    "config.json",
    "metrics.json",
    "history.jsonl",
    "model.safetensors",
    "pattern.safetensors",
]
RUN_FOLDER = f"{RESULTS}/runs/{{task}}/{{attention}}/seed{{seed}}"
MODEL_FOLDER = f"{RESULTS}/models/{{task}}/{{attention}}"
MODEL_FILES = [
    "README.md",
    "config.json",
    "metrics.json",
    "model.safetensors",
    "pattern.safetensors",
]
TABLES = f"{RESULTS}/tables"
ORDER = json.dumps({key: config[key] for key in ("run", "tasks", "attentions", "seeds")})
# Figures of a task and of the whole run set, with their names in the report of Snakemake.
FIGURES = {
    "accuracy": "accuracy over steps",
    "loss": "loss over steps",
    "time": "accuracy over time",
    "statistics": "statistics of the switch",
    "pattern": "map and pattern",
    "mass": "share of attention held",
}
SUMMARIES = {
    "summary": "test accuracy",
    "speed": "time of a step",
    "memory": "peak memory",
    "preparation": "cost of preparation",
}
# What the report shows where it has been made: by the targets `benchmark` and `llama`.
BENCHMARK_FIGURES = [f"{RESULTS}/benchmark/{name}.svg" for name in ("speedup", "time", "memory")]
LLAMA_SUMMARY = f"{RESULTS}/llama/summary.md"
# The programs that make tables, figures and report.
SO_FAR = ("collect", "compare", "figures", "report", "summary_figures", "tables")


# Which Python runs a job. With --use-conda Snakemake makes and activates the environment; without it, .venvs/<name> is
# made from the same list before the first job starts. `envs/<name>.yaml` is an input of every rule that uses it.

CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method


def in_env(name):
    """A params function: the interpreter of the environment `name`, quoted for the shell.

    A params function that takes `input` is not recorded, so switching --use-conda reruns nothing.
    """
    without_conda = sys.executable if name == "python" else environments.interpreter(name)
    return lambda wildcards, input: "python" if CONDA else shlex.quote(str(without_conda))


# Whether jobs run on other machines: only an executor that submits them has a number of jobs (`nodes`) beside the cores.
ELSEWHERE = workflow.remote_exec or workflow.resource_settings.nodes is not None


def gpus_of_training(wildcards):
    """gpus_per_run; 0 on a machine that has none, where several trainings at once use the CPUs.

    A cluster's nodes have some until its profile says otherwise. Raises WorkflowError where Snakemake would make them
    fewer without a word.
    """
    if not ELSEWHERE and shutil.which("nvidia-smi") is None:
        return 0
    wanted, limit = config["gpus_per_run"], workflow.global_resources.get("gpu")
    # The limit is that of the Snakemake that plans, not of the one that runs a job on a node.
    if not workflow.remote_exec and limit is not None and limit.value < wanted:
        raise WorkflowError(
            f"gpus_per_run is {wanted}, but the resource gpu is limited to {limit.value}: "
            f"call snakemake with --resources gpu={wanted}, or lower gpus_per_run"
        )
    return wanted


def in_root(wildcards, input):
    """The folder of the Snakefile, for PYTHONPATH; not recorded, so a moved clone reruns nothing."""
    return workflow.basedir


def parent_of(name):
    """A params function: the folder of the output `name`, for programs that are told where to write."""
    return lambda wildcards, output: str(Path(getattr(output, name)).parent)


def first_folder(wildcards, output):
    """The folder of the first output."""
    return str(Path(output[0]).parent)


def make_environments():
    """Make the environments that the pending jobs name as inputs, and no others."""
    if CONDA:
        return
    files = {str(f) for job in workflow.dag.needrun_jobs() for f in job.input}
    names = [path.stem for path in map(Path, sorted(files)) if path.parent == Path("envs")]
    try:
        environments.ensure_all(names)
    except environments.EnvironmentFailed as error:
        raise WorkflowError(str(error))


def refuse_what_storage_lacks():
    """Raises WorkflowError for table_so_far where the runs lie in object storage: it reads them from their folder."""
    provider = workflow.storage_settings.default_storage_provider
    if provider and any(job.name == "table_so_far" for job in workflow.dag.jobs):
        raise WorkflowError(
            f"table_so_far reads the folder {RESULTS}/runs, and the runs are in storage ({provider}): copy them to that "
            "folder and call it without --default-storage-provider"
        )


def raw_files(wildcards):
    """What the preprocessing of a task reads: its raw files or TFDS data set, and the records of the source."""
    source = config["read_from"].get(wildcards.task)
    if source in TSV_FILES:
        return [*TSV_FILES[source].values(), *(RECORDS[name] for name in TSV_FILES[source])]
    if source == "pathfinder_tfds":
        return [PATHFINDER_TFDS, RECORDS[source]]
    if wildcards.task in RAW:
        return [*RAW[wildcards.task], RECORDS["lra_release"]]
    source, info = TFDS[wildcards.task]
    return [info, RECORDS[source]]


def metrics_of(task):
    """The metrics of every training of a task, in the configuration's order."""
    return expand(
        f"{RUN_FOLDER}/metrics.json",
        task=task,
        attention=config["attentions"],
        seed=config["seeds"],
    )


def runs_folder(wildcards, input):
    """The folder above those of the runs; not recorded."""
    return shlex.quote(str(Path(input.metrics[0]).parents[3]))


def figures_folder(wildcards, input):
    """The folder of the figures of the whole run set; not recorded."""
    return shlex.quote(str(Path(input.figures[0]).parent))


@functools.cache
def settings_of_any_seed(task, attention):
    return settings.resolve(config, task, attention, config["seeds"][0])


def settings_of(task, attention, seed):
    """Every setting of a training. The files are read once, not once a seed: plans of 1,000 trainings stay quick."""
    return settings_of_any_seed(task, attention) | {"seed": int(seed)}


def own_attention(wildcards):
    """The file of an attention of one's own (package.module:Class), where it lies beside the Snakefile."""
    name = settings_of_any_seed(wildcards.task, wildcards.attention)["model"]["attention"]
    path = Path(*name.split(":")[0].split(".")).with_suffix(".py")
    return local(str(path)) if ":" in name and path.is_file() else []


def settings_of_runs():
    """Digest of every training's settings: a run that was trained with others by hand gets no row.

    Its first digits, so that a command for 1,000 trainings is not too long for a shell.
    """
    return {
        f"{task}/{attention}/seed{seed}": settings.digest(settings_of(task, attention, seed))[:16]
        for task in TASKS
        for attention in config["attentions"]
        for seed in config["seeds"]
    }


def runs_of(task, attentions=config["attentions"]):
    return expand(
        f"{RUN_FOLDER}/{{file}}",
        task=task,
        attention=attentions,
        seed=config["seeds"],
        file=RUN_FILES,
    )


def figures_of(task):
    names = [f"{name}.{form}" for form in ("svg", "png") for name in FIGURES]
    return expand(f"{RESULTS}/figures/{{task}}/{{name}}", task=task, name=names)


def digest_of_existing(paths):
    """Digest of those of the files that are there: what a job shows if it is there, without having it made."""
    return settings.digest({path: Path(path).read_text() for path in paths if Path(path).is_file()})


METRICS = [path for task in TASKS for path in metrics_of(task)]
SETTINGS = [str(Path(path).parent / "config.json") for path in METRICS]
