# metrics and histories -> tables, figures, report


rule collect:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/collect.py"),
        seal=SEAL,
        shared=local("workflow/scripts/tables.py"),
        metrics=METRICS,
        settings=SETTINGS,
    output:
        csv=report(
            f"{RESULTS}/table.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "main"},
        ),
        md=f"{RESULTS}/table.md",
        tex=f"{RESULTS}/table.tex",
        short=f"{RESULTS}/table_short.tex",
    log:
        f"{RESULTS}/logs/collect.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/collect.tsv")
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
        seal=SEAL,
        shared=local(["workflow/scripts/collect.py", "workflow/scripts/tables.py"]),
        published=local("config/published.csv"),
        metrics=METRICS,
        settings=SETTINGS,
    output:
        report(
            f"{TABLES}/published.csv",
            caption="../report/published_table.rst",
            category="Tables",
            labels={"table": "beside published figures"},
        ),
        multiext(f"{TABLES}/published", ".md", ".tex"),
        report(
            f"{TABLES}/ablation.csv",
            caption="../report/ablation_table.rst",
            category="Tables",
            labels={"table": "ablations"},
        ),
        multiext(f"{TABLES}/ablation", ".md", ".tex"),
        report(
            f"{TABLES}/cost.csv",
            caption="../report/cost_table.rst",
            category="Tables",
            labels={"table": "cost of the trainings"},
        ),
        multiext(f"{TABLES}/cost", ".md", ".tex"),
        report(
            f"{TABLES}/preparation.csv",
            caption="../report/preparation_table.rst",
            category="Tables",
            labels={"table": "cost before the trainings"},
        ),
        multiext(f"{TABLES}/preparation", ".md", ".tex"),
    log:
        f"{RESULTS}/logs/compare.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/compare.tsv")
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
        folder=first_folder,
    shell:
        "{params.python} {input.script} --output-dir {params.folder} --config {params.config:q} "
        "--runs-dir {params.runs} --published {input.published} --benchmarks {params.benchmarks} "
        "> {log} 2>&1"


rule table:
    input:
        rules.collect.output,
        rules.compare.output,


# Tables, figures and report of what is finished by now, failed runs as rows: for a run set of which a part failed. It has
# no output, so that it runs whenever it is asked for and is never taken for the whole.
rule table_so_far:
    input:
        env=local("envs/report.yaml"),
        scripts=local([f"workflow/scripts/{name}.py" for name in SO_FAR]),
        seal=SEAL,
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
        tasks=TASKS,
    shell:
        "{{ set -- --config {params.config:q} --allow-missing --runs-dir {params.results}/runs && "
        "rm -rf {params.results}/so-far/figures && "
        '{params.python} workflow/scripts/collect.py "$@" '
        "--output-dir {params.results}/so-far --digests {params.digests:q} && "
        '{params.python} workflow/scripts/compare.py "$@" --output-dir {params.results}/so-far/tables '
        "--published {input.published} --benchmarks {params.results}/benchmarks && "
        'for task in {params.tasks:q}; do {params.python} workflow/scripts/figures.py "$@" '
        '--task "$task" --output-dir "{params.results}/so-far/figures/$task" || exit 1; done && '
        '{params.python} workflow/scripts/summary_figures.py "$@" '
        "--output-dir {params.results}/so-far/figures --benchmarks {params.results}/benchmarks && "
        '{params.python} workflow/scripts/report.py "$@" --output {params.results}/so-far/report.html '
        "--published {input.published} --results {params.results} --figures {params.results}/so-far/figures; "
        "}} 2>&1 | tee {log}"


rule draw_figures:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/figures.py"),
        seal=SEAL,
        shared=local(["workflow/scripts/collect.py", "workflow/scripts/tables.py"]),
        runs=lambda wildcards: runs_of(wildcards.task),
    output:
        [
            report(
                f"{RESULTS}/figures/{{task}}/{name}.svg",
                caption=f"../report/{name}.rst",
                category="Figures",
                subcategory="{task}",
                labels={"task": "{task}", "figure": words},
            )
            for name, words in FIGURES.items()
        ],
        [f"{RESULTS}/figures/{{task}}/{name}.png" for name in FIGURES],
    log:
        f"{RESULTS}/logs/figures/{{task}}.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/figures/{{task}}.tsv")
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        config=ORDER,
        folder=first_folder,
        folders=lambda wildcards, input: sorted({str(Path(path).parent) for path in input.runs}),
    shell:
        "{params.python} {input.script} --task {wildcards.task} --output-dir {params.folder} "
        "--config {params.config:q} {params.folders} > {log} 2>&1"


rule draw_summary:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/summary_figures.py"),
        seal=SEAL,
        shared=local(
            [f"workflow/scripts/{name}.py" for name in ("collect", "compare", "figures", "tables")]
        ),
        metrics=METRICS,
        settings=SETTINGS,
    output:
        [
            report(
                f"{RESULTS}/figures/{name}.svg",
                caption=f"../report/{name}.rst",
                category="Summary",
                labels={"task": "all", "figure": words},
            )
            for name, words in SUMMARIES.items()
        ],
        [f"{RESULTS}/figures/{name}.png" for name in SUMMARIES],
    log:
        f"{RESULTS}/logs/draw_summary.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/draw_summary.tsv")
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        config=ORDER,
        runs=runs_folder,
        benchmarks=f"{RESULTS}/benchmarks",
        folder=first_folder,
    shell:
        "{params.python} {input.script} --output-dir {params.folder} --config {params.config:q} "
        "--runs-dir {params.runs} --benchmarks {params.benchmarks} > {log} 2>&1"


rule figures:
    input:
        rules.draw_summary.output,
        [path for task in TASKS for path in figures_of(task)],


rule write_report:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/report.py"),
        seal=SEAL,
        shared=local(
            [
                *[f"workflow/scripts/{name}.py" for name in ("collect", "compare", "tables")],
                "workflow/report/report.html.j2",
                *[f"workflow/report/{name}.rst" for name in (*FIGURES, *SUMMARIES)],
            ]
        ),
        published=local("config/published.csv"),
        metrics=METRICS,
        settings=SETTINGS,
        figures=[path for path in rules.figures.input if str(path).endswith(".svg")],
    output:
        f"{RESULTS}/report.html",
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/report.tsv")
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        config=ORDER,
        runs=runs_folder,
        figures=figures_folder,
        results=lambda wildcards: RESULTS,  # that on this machine, with or without object storage
        beside=digest_of_existing([*BENCHMARK_FIGURES, LLAMA_SUMMARY]),
    shell:
        "{params.python} {input.script} --output {output} --config {params.config:q} --runs-dir {params.runs} "
        "--published {input.published} --results {params.results} --figures {params.figures} > {log} 2>&1"


rule report:
    input:
        rules.write_report.output,
        rules.collect.output,
        rules.compare.output,


rule export_model:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/model_card.py"),
        seal=SEAL,
        shared=local(["workflow/scripts/collect.py", "workflow/scripts/tables.py"]),
        runs=lambda wildcards: runs_of(wildcards.task, [wildcards.attention]),
    output:
        [f"{MODEL_FOLDER}/{name}" for name in MODEL_FILES],
    log:
        f"{RESULTS}/logs/models/{{task}}/{{attention}}.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/models/{{task}}/{{attention}}.tsv")
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        folder=first_folder,
        folders=lambda wildcards, input: sorted({str(Path(path).parent) for path in input.runs}),
    shell:
        "{params.python} {input.script} --output-dir {params.folder} {params.folders} > {log} 2>&1"


rule models:
    input:
        expand(
            f"{MODEL_FOLDER}/{{name}}",
            task=TASKS,
            attention=config["attentions"],
            name=MODEL_FILES,
        ),
