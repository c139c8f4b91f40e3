# llama.cpp: source -> build -> a smoke run. Apart from `all`; needs no data.

LLAMA = config["llama"]
LLAMA_RESULTS = f"{RESULTS}/llama"
LLAMA_BUILD = f"build-{LLAMA['build_type']}-{LLAMA['version']}"
LLAMA_SOURCE = {key: LLAMA[key] for key in ("version", "file", "sha256", "commit", "sources")}


# As for a download, nothing in the project is an input. The tree is no output: Snakemake would delete it, and with it
# the dates by which a build goes on from its objects.
rule get_llama:
    output:
        record=local(f"{DATA}/llama/source.json"),
    log:
        f"{RESULTS}/logs/get_llama.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/get_llama.tsv")
    localrule: True  # on a cluster too: compute nodes often have no network
    conda:
        "../../envs/python.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        python=in_env("python"),
        llama=lambda wildcards: json.dumps(LLAMA_SOURCE),  # no string: it holds braces
        folder=lambda wildcards, output: f"{Path(output.record).parent}/source-{LLAMA['version']}",
        archives=lambda wildcards, output: str(Path(output.record).parent.parent / "archives"),
        manual_dir=config["manual_dir"],
    shell:
        "{params.python} workflow/scripts/llama_source.py --llama {params.llama:q} --folder {params.folder:q} "
        "--archives {params.archives:q} --record {output.record} --manual-dir {params.manual_dir:q} > {log} 2>&1"


# The build folder, one for each type and version, is no output either.
rule build_llama:
    input:
        env=local("envs/llama.yaml"),
        script=local("workflow/scripts/llama_build.py"),
        shared=local("workflow/scripts/build_kernels.py"),
        source=rules.get_llama.output.record,
    output:
        record=local(f"{LLAMA_RESULTS}/build.json"),
    log:
        f"{RESULTS}/logs/build_llama.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/build_llama.tsv")
    conda:
        "../../envs/llama.yaml"
    threads: config["threads"]["kernels"]
    resources:
        mem_mb=8000,
    params:
        python=in_env("llama"),
        build_type=LLAMA["build_type"],
        folder=lambda wildcards, output: f"{Path(output.record).parent}/{LLAMA_BUILD}",
    shell:
        "{params.python} {input.script} --source {input.source} --build-type {params.build_type} "
        "--folder {params.folder:q} --record {output.record} --threads {threads} > {log} 2>&1"


rule run_llama:
    input:
        env=local("envs/llama.yaml"),
        script=local("workflow/scripts/llama_run.py"),
        source=rules.get_llama.output.record,
        build=rules.build_llama.output.record,
        model=local([LLAMA["model"]]) if LLAMA["model"] else [],
    output:
        bench=local(f"{LLAMA_RESULTS}/bench.csv"),
        summary=local(f"{LLAMA_RESULTS}/summary.md"),
    log:
        f"{RESULTS}/logs/run_llama.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/run_llama.tsv")
    conda:
        "../../envs/llama.yaml"
    threads: config["threads"]["kernels"]
    resources:
        mem_mb=4000,
    params:
        python=in_env("llama"),
        model=lambda wildcards, input: (
            f"--model {shlex.quote(input.model[0])}" if input.model else ""
        ),
    shell:
        "{params.python} {input.script} --build {input.build} --source {input.source} --bench {output.bench} "
        "--summary {output.summary} {params.model} --threads {threads} > {log} 2>&1"


rule llama:
    input:
        rules.build_llama.output,
        rules.run_llama.output,
