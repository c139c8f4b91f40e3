# <task>/*.arrow + kernels -> one folder a training: settings, metrics, history, weights, pattern


rule train:
    input:
        env=local("envs/torch.yaml"),
        sources=SAT,
        own=own_attention,
        schema=local(settings.SCHEMA),
        kernels=rules.compile_kernels.output,
        data=rules.preprocess.output,
    output:
        config=f"{RUN_FOLDER}/config.json",
        metrics=f"{RUN_FOLDER}/metrics.json",
        history=f"{RUN_FOLDER}/history.jsonl",
        model=f"{RUN_FOLDER}/model.safetensors",
        pattern=f"{RUN_FOLDER}/pattern.safetensors",
    log:
        f"{RESULTS}/logs/train/{{task}}/{{attention}}/seed{{seed}}.log",
    benchmark:
        local(f"{RESULTS}/benchmarks/train/{{task}}/{{attention}}/seed{{seed}}.tsv")
    conda:
        "../../envs/torch.yaml"
    threads: config["threads"]["train"]
    resources:
        mem_mb=8000,
        gpu=gpus_of_training,
    params:
        root=in_root,
        python=in_env("torch"),
        settings=lambda wildcards: json.dumps(
            settings_of(wildcards.task, wildcards.attention, wildcards.seed)
        ),
        data=lambda wildcards, input: str(Path(input.data[0]).parent),
        kernels=lambda wildcards, input: str(Path(input.kernels[0]).parent),
        folder=parent_of("metrics"),
    shell:
        "PYTHONPATH={params.root:q}${{PYTHONPATH:+:$PYTHONPATH}} {params.python} -m sat --mode train --settings {params.settings:q} "
        "--data-dir {params.data} --output-dir {params.folder} --kernels {params.kernels} --threads {threads} "
        "--processes {resources.gpu} "
        "> {log} 2>&1"
