# metrics and histories -> table.{csv,md,tex} and two figures a task


rule collect:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/collect.py"),
        metrics=[path for task in TASKS for path in metrics_of(task)],
    output:
        csv=f"{RESULTS}/table.csv",
        md=f"{RESULTS}/table.md",
        tex=f"{RESULTS}/table.tex",
    log:
        f"{RESULTS}/logs/collect.log",
    benchmark:
        f"{RESULTS}/benchmarks/collect.tsv"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        config=ORDER,
        digests=json.dumps(settings_of_runs()),
        folder=parent_of("csv"),
    shell:
        "{params.python} {input.script} --output-dir {params.folder} --config {params.config:q} "
        "--digests {params.digests:q} {input.metrics} "
        "> {log} 2>&1"


rule table:
    input:
        rules.collect.output,


rule draw_figures:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/figures.py"),
        shared=local("workflow/scripts/collect.py"),
        runs=lambda wildcards: runs_of(wildcards.task),
    output:
        accuracy=f"{RESULTS}/figures/{{task}}/accuracy.svg",
        pattern=f"{RESULTS}/figures/{{task}}/pattern.svg",
    log:
        f"{RESULTS}/logs/figures/{{task}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/figures/{{task}}.tsv"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        config=ORDER,
        folder=parent_of("accuracy"),
        folders=lambda wildcards, input: sorted({str(Path(path).parent) for path in input.runs}),
    shell:
        "{params.python} {input.script} --task {wildcards.task} --output-dir {params.folder} "
        "--config {params.config:q} {params.folders} > {log} 2>&1"


rule figures:
    input:
        [path for task in TASKS for path in figures_of(task)],
