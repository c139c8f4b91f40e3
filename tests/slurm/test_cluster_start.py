"""When the tests may start a Slurm of their own, without starting one."""

import fcntl

import cluster
import pytest


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """A stand-in for /etc/slurm with the links that a run leaves when it is killed; -> (it, the cluster's folder)."""
    folder = tmp_path / "sat-slurm-gone"
    place = tmp_path / "etc"
    folder.mkdir()
    place.mkdir()
    (folder / "slurm.conf").touch()
    (folder / "lock").touch()
    (place / "slurm.conf").symlink_to(folder / "slurm.conf")
    monkeypatch.setattr(cluster, "CONFIGURATION", place)
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 0)
    return place, folder


def test_what_a_killed_run_left_is_removed(configuration):
    place, folder = configuration
    assert "has a configuration" not in (cluster.missing() or "")
    assert not list(place.iterdir())
    assert not folder.exists()


def test_a_cluster_that_runs_is_left_alone(configuration):
    place, folder = configuration
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "has a configuration" in cluster.missing()
    assert (place / "slurm.conf").exists()


def test_nothing_is_installed_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONFIGURATION", tmp_path)
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster, "_find", lambda program: None)
    monkeypatch.setattr(cluster.shutil, "which", lambda program, **options: f"/usr/bin/{program}")
    monkeypatch.setattr(cluster.subprocess, "run", lambda *_, **__: pytest.fail("apt-get was run"))
    for name in cluster.ALLOW_INSTALLING:
        monkeypatch.delenv(name, raising=False)
    reason = cluster.install()
    assert "not installed: munged" in reason
    assert "SAT_INSTALL_SLURM=1" in reason
