# metrics and histories -> tables, figures, report


rule collect:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/collect.py"),
        shared=local("workflow/scripts/tables.py"),
        metrics=METRICS,
        settings=SETTINGS,
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
        runs=runs_folder,
        folder=parent_of("csv"),
    shell:
        "{params.python} {input.script} --output-dir {params.folder} --config {params.config:q} "
        "--digests {params.digests:q} --runs-dir {params.runs} > {log} 2>&1"


rule compare:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/compare.py"),
        shared=local(["workflow/scripts/collect.py", "workflow/scripts/tables.py"]),
        published=local("config/published.csv"),
        metrics=METRICS,
        settings=SETTINGS,
    output:
        published=multiext(f"{TABLES}/published", ".csv", ".md", ".tex"),
        ablation=multiext(f"{TABLES}/ablation", ".csv", ".md", ".tex"),
        cost=multiext(f"{TABLES}/cost", ".csv", ".md", ".tex"),
        preparation=multiext(f"{TABLES}/preparation", ".csv", ".md", ".tex"),
    log:
        f"{RESULTS}/logs/compare.log",
    benchmark:
        f"{RESULTS}/benchmarks/compare.tsv"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        config=ORDER,
        runs=runs_folder,
        # Read as they are: a run that was trained by hand has none, and must not be trained again for one.
        benchmarks=f"{RESULTS}/benchmarks",
        folder=lambda wildcards, output: str(Path(output[0]).parent),
    shell:
        "{params.python} {input.script} --output-dir {params.folder} --config {params.config:q} "
        "--runs-dir {params.runs} --published {input.published} --benchmarks {params.benchmarks} "
        "> {log} 2>&1"


rule table:
    input:
        rules.collect.output,
        rules.compare.output,


# The tables of what is finished by now, failed runs as rows: for a run set of which a part failed. It has no output, so
# that it runs whenever it is asked for and is never taken for the whole.
rule table_so_far:
    input:
        env=local("envs/report.yaml"),
        scripts=local([f"workflow/scripts/{name}.py" for name in ("collect", "compare", "tables")]),
        published=local("config/published.csv"),
    log:
        f"{RESULTS}/logs/table_so_far.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        config=ORDER,
        digests=json.dumps(settings_of_runs()),
        results=RESULTS,
    shell:
        "{{ {params.python} workflow/scripts/collect.py --config {params.config:q} --allow-missing "
        "--runs-dir {params.results}/runs --output-dir {params.results}/so-far --digests {params.digests:q} && "
        "{params.python} workflow/scripts/compare.py --config {params.config:q} --allow-missing "
        "--runs-dir {params.results}/runs --output-dir {params.results}/so-far/tables "
        "--published {input.published} --benchmarks {params.results}/benchmarks; }} 2>&1 | tee {log}"


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
