# csrc/ -> libsat_cpu.so, and libsat_cuda.so where nvcc is (kernels.json says whether it was built)


rule compile_kernels:
    input:
        env=local("envs/torch.yaml"),
        script=local("workflow/scripts/build_kernels.py"),
        sources=KERNEL_SOURCES,
    output:
        library=f"{RESULTS}/kernels/libsat_cpu.so",
        record=f"{RESULTS}/kernels/kernels.json",
    log:
        f"{RESULTS}/logs/compile_kernels.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/compile_kernels.tsv")
    conda:
        "../../envs/torch.yaml"
    threads: config["threads"]["kernels"]
    resources:
        mem_mb=2000,
    params:
        python=in_env("torch"),
        folder=parent_of("library"),
        cuda=config["kernels"]["cuda"],
        architectures=(
            f"--cuda-architectures '{config['kernels']['cuda_architectures']}'"
            if config["kernels"]["cuda_architectures"]
            else ""
        ),
    shell:
        "{params.python} {input.script} --source csrc --output-dir {params.folder} --cuda {params.cuda} "
        "{params.architectures} > {log} 2>&1"
