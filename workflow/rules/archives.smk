# sources -> archives -> raw task files. Downloads and the extraction need nothing but Python's standard library.

if config["data"] == "generated":

    rule demo_archives:
        input:
            env=local("envs/tf.yaml"),
            script=local("workflow/scripts/demo_archives.py"),
            modules=MODULES,
        output:
            archive=local(f"{ARCHIVES}/lra_release.gz"),
            records=list(RECORDS.values()),
            tfds=[TFDS[task][1] for task in ("text", "image")],
        log:
            f"{RESULTS}/logs/demo_archives.log",
        benchmark:
            local(f"{RESULTS}/benchmarks/demo_archives.tsv")
        conda:
            "../../envs/tf.yaml"
        threads: 1
        resources:
            mem_mb=2000,
        params:
            python=in_env("tf"),
            config=json.dumps(config["demo"]),
            folder=lambda wildcards, output: str(Path(output.archive).parent.parent),
        shell:
            "{params.python} {input.script} --config {params.config:q} --output-dir {params.folder} > {log} 2>&1"

else:

    # Nothing in the project is an input of a download: an edit must not fetch 8 GB again.
    rule download:
        output:
            archive=local(f"{ARCHIVES}/{{file}}"),
            record=local(f"{ARCHIVES}/{{file}}.source.json"),
        log:
            f"{RESULTS}/logs/download/{{file}}.log",
        benchmark:
            local(f"{RESULTS}/benchmarks/download/{{file}}.tsv")
        wildcard_constraints:
            file="|".join(map(re.escape, SOURCE_OF_FILE)),
        localrule: True  # on a cluster too: compute nodes often have no network
        conda:
            "../../envs/python.yaml"
        threads: 1
        resources:
            mem_mb=500,
        params:
            python=in_env("python"),
            source=lambda wildcards: json.dumps(SOURCE_OF_FILE[wildcards.file]),
            manual_dir=config["manual_dir"],
        shell:
            "{params.python} workflow/scripts/download.py --source {params.source:q} --manual-dir {params.manual_dir:q} "
            "--output {output.archive} --record {output.record} > {log} 2>&1"

    for _source, _info in TFDS.values():

        rule:
            name:
                f"prepare_{_source}"
            input:
                env=local("envs/tf.yaml"),
                script=local("workflow/scripts/prepare_tfds.py"),
                modules=READING,
                archive=local(f"{ARCHIVES}/{config['sources'][_source]['file']}"),
                record=RECORDS[_source],
            output:
                info=_info,
            log:
                f"{RESULTS}/logs/prepare_{_source}.log",
            benchmark:
                local(f"{RESULTS}/benchmarks/prepare_{_source}.tsv")
            conda:
                "../../envs/tf.yaml"
            threads: 1
            resources:
                mem_mb=3000,
            params:
                python=in_env("tf"),
                builder=config["sources"][_source]["tfds"],
                folder=lambda wildcards, output: str(Path(*Path(output.info).parts[:3])),
            shell:
                "{params.python} {input.script} --builder {params.builder:q} --data-dir {params.folder} "
                "--archive {input.archive} --record {input.record} > {log} 2>&1"

    rule extract_pathfinder_tfds:
        input:
            script=local("workflow/scripts/extract.py"),
            modules=local(["workflow/scripts/lra/files.py", "sat/seal.py"]),
            archive=local(f"{ARCHIVES}/{config['sources']['pathfinder_tfds']['file']}"),
        output:
            info=PATHFINDER_TFDS,
        log:
            f"{RESULTS}/logs/extract_pathfinder_tfds.log",
        benchmark:
            local(f"{RESULTS}/benchmarks/extract_pathfinder_tfds.tsv")
        conda:
            "../../envs/python.yaml"
        threads: 1
        resources:
            mem_mb=1000,
        params:
            python=in_env("python"),
            folder=lambda wildcards, output: str(Path(*Path(output.info).parts[:3])),
            name="pathfinder32/1.0.0",
        shell:
            "{params.python} {input.script} --archive {input.archive} --output-dir {params.folder} "
            "--tfds {params.name} > {log} 2>&1"


rule extract:
    input:
        script=local("workflow/scripts/extract.py"),
        modules=local(["workflow/scripts/lra/files.py", "sat/seal.py"]),
        archive=local(f"{ARCHIVES}/lra_release.gz"),
    output:
        RAW["listops"],
        RAW["retrieval"],
        RAW["pathfinder"],
    log:
        f"{RESULTS}/logs/extract.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/extract.tsv")
    conda:
        "../../envs/python.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("python"),
        level=LEVEL,
        folder=lambda wildcards, output: str(Path(output[0]).parent.parent),
    shell:
        "{params.python} {input.script} --archive {input.archive} --output-dir {params.folder} "
        "--level {params.level} > {log} 2>&1"
