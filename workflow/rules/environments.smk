# Which Python runs a job. With --use-conda Snakemake makes and activates the environment; without it, .venvs/<name> is
# made from the same list before the first job starts. `envs/<name>.yaml` is an input of every rule that uses it.

CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method


def in_env(name):
    """The interpreter of the environment `name`; None: the one that runs Snakemake (standard library only).

    A params function that takes `input` is not recorded, so switching --use-conda reruns nothing.
    """

    def python(wildcards, input):
        if name is None:
            return sys.executable
        return "python" if CONDA else str(environments.interpreter(name))

    return python


def in_root(wildcards, input):
    """The folder of the Snakefile, for PYTHONPATH; not recorded, so a moved clone reruns nothing."""
    return workflow.basedir


def make_environments():
    """Make the environments that the pending jobs name as inputs, and no others."""
    if CONDA:
        return
    files = {str(f) for job in workflow.dag.needrun_jobs() for f in job.input}
    names = [path.stem for path in map(Path, sorted(files)) if path.parent == Path("envs")]
    try:
        environments.ensure_all(names)
    except environments.EnvironmentFailed as error:
        raise WorkflowError(str(error))
