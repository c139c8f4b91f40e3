# kernels -> time and memory of attention beside PyTorch's: tables and figures. Not part of `all`.

BENCHMARK = f"{RESULTS}/benchmark"


rule measure_attention:
    input:
        env=local("envs/torch.yaml"),
        sources=sorted(map(str, Path("sat/attention").glob("*.py")))
        + [f"sat/{name}.py" for name in ("benchmark", "launch", "runtime")],
        kernels=rules.compile_kernels.output,
    output:
        json=local(f"{BENCHMARK}/attention.json"),
    log:
        f"{RESULTS}/logs/measure_attention.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/measure_attention.tsv")
    conda:
        "../../envs/torch.yaml"
    threads: config["threads"]["train"]
    resources:
        mem_mb=16000,
    params:
        root=in_root,
        python=in_env("torch"),
        kernels=lambda wildcards, input: str(Path(input.kernels[0]).parent),
        quick="--quick" if config["data"] == "generated" else "",
    shell:
        "SAT_KERNELS={params.kernels:q} PYTHONPATH={params.root:q} {params.python} -m sat.benchmark attention "
        "--json {output.json} --threads {threads} {params.quick} > {log} 2>&1"


rule report_attention:
    input:
        env=local("envs/report.yaml"),
        script=local("workflow/scripts/benchmark_report.py"),
        shared=local([f"workflow/scripts/{name}.py" for name in ("collect", "figures", "tables")]),
        seal=SEAL,
        json=rules.measure_attention.output.json,
    output:
        csv=local(f"{BENCHMARK}/attention.csv"),
        md=local(f"{BENCHMARK}/attention.md"),
        figures=local(BENCHMARK_FIGURES),
    log:
        f"{RESULTS}/logs/report_attention.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/report_attention.tsv")
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("report"),
        folder=parent_of("csv"),
    shell:
        "{params.python} {input.script} {input.json} --output-dir {params.folder} > {log} 2>&1"


rule measure_steps:
    input:
        env=local("envs/torch.yaml"),
        sources=sorted(
            str(path) for path in [*Path("sat").glob("*.py"), *Path("sat/attention").glob("*.py")]
        ),
        kernels=rules.compile_kernels.output,
    output:
        json=local(f"{BENCHMARK}/step.json"),
        md=local(f"{BENCHMARK}/step.md"),
    log:
        f"{RESULTS}/logs/measure_steps.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/measure_steps.tsv")
    conda:
        "../../envs/torch.yaml"
    threads: config["threads"]["train"]
    resources:
        mem_mb=16000,
    params:
        root=in_root,
        python=in_env("torch"),
        kernels=lambda wildcards, input: str(Path(input.kernels[0]).parent),
        quick="--quick" if config["data"] == "generated" else "",
    shell:
        "SAT_KERNELS={params.kernels:q} PYTHONPATH={params.root:q} {params.python} -m sat.benchmark step "
        "--json {output.json} --threads {threads} {params.quick} > {output.md} 2> {log}"


rule benchmark:
    input:
        rules.measure_steps.output,
        rules.report_attention.output,
