# raw task files and TFDS data sets -> <task>/<split>.arrow + manifest.json


rule preprocess:
    input:
        raw_files,
        env=local("envs/tf.yaml"),
        script=local("workflow/scripts/preprocess.py"),
        modules=READING,
        seal=SEAL,
    output:
        train=f"{DATA}/{{task}}/train.arrow",
        dev=f"{DATA}/{{task}}/dev.arrow",
        test=f"{DATA}/{{task}}/test.arrow",
        manifest=f"{DATA}/{{task}}/manifest.json",
    log:
        f"{RESULTS}/logs/preprocess/{{task}}.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/preprocess/{{task}}.tsv")
    wildcard_constraints:
        task="|".join(re.escape(task) for task in TASKS if task not in OWN_FILES) or "-",
    conda:
        "../../envs/tf.yaml"
    threads: 1
    resources:
        mem_mb=2000,
    params:
        python=in_env("tf"),
        config=lambda wildcards: json.dumps(settings.resolve_dataset(config, wildcards.task)),
        data=lambda wildcards, output: str(Path(output.manifest).parent.parent),
        folder=parent_of("manifest"),
    shell:
        "{params.python} {input.script} --task {wildcards.task} --config {params.config:q} "
        "--run-data {params.data} --output-dir {params.folder} > {log} 2>&1"


# The same for a task with files of its own (dataset.files of its settings).
rule preprocess_own:
    input:
        files=lambda wildcards: OWN_FILES[wildcards.task],
        env=local("envs/tf.yaml"),
        script=local("workflow/scripts/preprocess_own.py"),
        shared=local("workflow/scripts/preprocess.py"),
        modules=READING,
        seal=SEAL,
    output:
        train=f"{DATA}/{{task}}/train.arrow",
        dev=f"{DATA}/{{task}}/dev.arrow",
        test=f"{DATA}/{{task}}/test.arrow",
        manifest=f"{DATA}/{{task}}/manifest.json",
    log:
        f"{RESULTS}/logs/preprocess/{{task}}.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/preprocess/{{task}}.tsv")
    wildcard_constraints:
        task="|".join(map(re.escape, OWN_FILES)) or "-",
    conda:
        "../../envs/tf.yaml"
    threads: 1
    resources:
        mem_mb=2000,
    params:
        python=in_env("tf"),
        config=lambda wildcards: json.dumps(settings.resolve_dataset(config, wildcards.task)),
        folder=parent_of("manifest"),
    shell:
        "{params.python} {input.script} --task {wildcards.task} --config {params.config:q} "
        "--output-dir {params.folder} > {log} 2>&1"
