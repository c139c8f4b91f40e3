# sources -> archives -> raw task files. Downloads and the extraction need nothing but Python's standard library.

ARCHIVES = f"{DATA}/archives"
LEVEL = settings.resolve_dataset(config, "pathfinder")["options"]["level"]
RAW = {
    "listops": expand(f"{DATA}/raw/listops/basic_{{split}}.tsv", split=["train", "val", "test"]),
    "retrieval": expand(
        f"{DATA}/raw/retrieval/new_aan_pairs.{{split}}.tsv", split=["train", "eval", "test"]
    ),
    "pathfinder": [f"{DATA}/raw/pathfinder/{LEVEL}.tar"],
}
TFDS = {
    "text": ("imdb_reviews", f"{DATA}/tfds/imdb_reviews/plain_text/1.0.0/dataset_info.json"),
    "image": ("cifar10", f"{DATA}/tfds/cifar10/3.0.2/dataset_info.json"),
}
DATA_SCRIPTS = expand("workflow/scripts/{module}.py", module=["common", "tokens"])


if config["data"] == "generated":

    rule demo_archives:
        input:
            env="envs/tf.yaml",
            script="workflow/scripts/demo_archives.py",
        output:
            archive=f"{ARCHIVES}/lra_release.gz",
            records=expand(
                f"{ARCHIVES}/{{source}}.source.json",
                source=["lra_release.gz", "imdb_reviews", "cifar10"],
            ),
            tfds=[info for _, info in TFDS.values()],
        log:
            f"{RESULTS}/logs/demo_archives.log",
        benchmark:
            f"{RESULTS}/benchmarks/demo_archives.tsv"
        conda:
            "../../envs/tf.yaml"
        threads: 1
        resources:
            mem_mb=2000,
        params:
            python=in_env("tf"),
            config=json.dumps(config.get("demo")),
            folder=DATA,
        shell:
            "{params.python} {input.script} --config {params.config:q} --output-dir {params.folder} > {log} 2>&1"

    RECORDS = {"lra_release": f"{ARCHIVES}/lra_release.gz.source.json"} | {
        source: f"{ARCHIVES}/{source}.source.json" for source, _ in TFDS.values()
    }

else:
    SOURCE_OF_FILE = {
        source["file"]: {"name": name, **source} for name, source in config["sources"].items()
    }
    RECORDS = {
        name: f"{ARCHIVES}/{source['file']}.source.json"
        for name, source in config["sources"].items()
    }

    rule download:
        input:
            script="workflow/scripts/download.py",
        output:
            archive=f"{ARCHIVES}/{{file}}",
            record=f"{ARCHIVES}/{{file}}.source.json",
        log:
            f"{RESULTS}/logs/download/{{file}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/download/{{file}}.tsv"
        wildcard_constraints:
            file="|".join(map(re.escape, SOURCE_OF_FILE)),
        threads: 1
        resources:
            mem_mb=500,
        params:
            python=in_env(None),
            source=lambda wildcards: json.dumps(SOURCE_OF_FILE[wildcards.file]),
            manual_dir=config["manual_dir"],
        shell:
            "{params.python} {input.script} --source {params.source:q} --manual-dir {params.manual_dir:q} "
            "--output {output.archive} --record {output.record} > {log} 2>&1"

    for _source, _info in TFDS.values():

        rule:
            name:
                f"prepare_{_source}"
            input:
                env="envs/tf.yaml",
                script="workflow/scripts/prepare_tfds.py",
                archive=f"{ARCHIVES}/{config['sources'][_source]['file']}",
                record=RECORDS[_source],
            output:
                info=_info,
            log:
                f"{RESULTS}/logs/prepare_{_source}.log",
            benchmark:
                f"{RESULTS}/benchmarks/prepare_{_source}.tsv"
            conda:
                "../../envs/tf.yaml"
            threads: 1
            resources:
                mem_mb=3000,
            params:
                python=in_env("tf"),
                builder=config["sources"][_source]["tfds"],
                folder=f"{DATA}/tfds",
            shell:
                "{params.python} {input.script} --builder {params.builder:q} --data-dir {params.folder} "
                "--archive {input.archive} --record {input.record} > {log} 2>&1"


rule extract:
    input:
        script="workflow/scripts/extract.py",
        archive=f"{ARCHIVES}/lra_release.gz",
    output:
        RAW["listops"],
        RAW["retrieval"],
        RAW["pathfinder"],
    log:
        f"{RESULTS}/logs/extract.log",
    benchmark:
        f"{RESULTS}/benchmarks/extract.tsv"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env(None),
        level=LEVEL,
        folder=f"{DATA}/raw",
    shell:
        "{params.python} {input.script} --archive {input.archive} --output-dir {params.folder} "
        "--level {params.level} > {log} 2>&1"
