"""Data and results in object storage: Snakemake's storage plugin and a local S3 server (moto)."""

import boto3
import compare
import pytest
from moto.server import ThreadedMotoServer

CREDENTIALS = {"ACCESS_KEY": "test", "SECRET_KEY": "test"}


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket, and the arguments that make it Snakemake's default storage."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(f"SNAKEMAKE_STORAGE_S3_{name}", value)
        client = boto3.resource(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        bucket = client.create_bucket(Bucket="lra")
        storage = ["--default-storage-provider", "s3", "--default-storage-prefix", "s3://lra/mine"]
        yield bucket, [*storage, "--storage-s3-endpoint-url", endpoint]
    finally:
        server.stop()


def test_data_and_results_lie_in_the_bucket_and_archives_stay_here(fresh, bucket):
    bucket, storage = bucket
    printed = fresh.run("all", "--printshellcmds", *storage)
    keys = {item.key.removeprefix("mine/") for item in bucket.objects.all()}
    assert {"data/tiny/listops/train.arrow", "results/tiny/table.csv"} <= keys
    assert "results/tiny/runs/image/sat/seed1001/metrics.json" in keys
    assert not [key for key in keys if "archives" in key.removeprefix("results/") or "/raw/" in key]
    assert (fresh.root / "data/tiny/archives/lra_release.gz").is_file()
    assert not (fresh.root / "results/tiny/table.csv").exists()

    # Programs that read a folder get one that has the files: benchmarks and settings here, the rest with the inputs.
    benchmarks = fresh.root / "results/tiny/benchmarks"
    steps = [row["step"] for row in compare.preparation_rows(benchmarks)]
    expected = {"extract", "prepare cifar10", "preprocess listops", "compile kernels"}
    assert expected <= set(steps)
    assert (benchmarks / "train/image/sat/seed1001.tsv").is_file()
    assert printed.count("--benchmarks results/tiny/benchmarks ") == 2
    figures = ".snakemake/storage/s3/lra/mine/results/tiny/figures"
    assert f"--results results/tiny --figures {figures} " in printed

    assert "Nothing to be done" in fresh.run("all", *storage)

    bucket.Object("mine/results/tiny/table.csv").delete()
    before = len(fresh.calls())
    fresh.run("table", *storage)
    assert len(fresh.calls()) == before + 1


def test_the_table_so_far_is_refused_where_the_runs_lie_in_the_bucket(fresh, bucket):
    _, storage = bucket
    done = fresh.snakemake(
        *["table_so_far", "--cores", "1", "--configfile", "config/tiny.yaml"], *storage
    )
    assert done.returncode != 0
    assert "table_so_far reads the folder results/tiny/runs" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (fresh.root / "calls.jsonl").exists()
