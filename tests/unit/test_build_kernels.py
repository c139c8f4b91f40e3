"""workflow/scripts/build_kernels.py, and the libraries that sat refuses to load."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_kernels
import pytest

from sat.attention import kernels

ROOT = Path(__file__).resolve().parents[2]


def load(folder, monkeypatch):
    monkeypatch.setenv("SAT_KERNELS", str(folder))
    return kernels.load_library.__wrapped__("cpu")


def run_script(source, folder, **environment):
    script = ROOT / "workflow/scripts/build_kernels.py"
    command = [sys.executable, script, "--source", source, "--output-dir", folder, "--cuda", "none"]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_record_says_how_it_was_built(kernels_dir):
    text = (kernels_dir / "kernels.json").read_text()
    record = json.loads(text)
    assert record["cuda"] == {"built": False, "reason": "switched off"}
    cpu = record["cpu"]
    assert cpu["built"] and cpu["compiler"] and cpu["version"]
    assert "baseline" in cpu["instruction_sets"]
    assert cpu["sha256"] == build_kernels.sha256(kernels_dir / "libsat_cpu.so")
    assert "native" not in text and str(ROOT) not in text and str(kernels_dir) not in text
    assert sorted(p.name for p in kernels_dir.iterdir()) == ["kernels.json", "libsat_cpu.so"]


def test_two_builds_give_the_same_bytes(kernels_dir, tmp_path):
    build_kernels.build_kernels(ROOT / "csrc", tmp_path, "none", "")
    for name in ("kernels.json", "libsat_cpu.so"):
        assert (tmp_path / name).read_bytes() == (kernels_dir / name).read_bytes()


def test_no_compiler_names_the_packages(tmp_path):
    done = run_script(ROOT / "csrc", tmp_path / "kernels", PATH=str(tmp_path), CXX="")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no C++ compiler found")
    for package in ("g++", "gcc-c++", "cxx-compiler", "xcode-select"):
        assert package in done.stderr
    assert not (tmp_path / "kernels").exists()


def test_a_failed_compile_shows_an_excerpt_and_keeps_the_log(tmp_path):
    source, folder = tmp_path / "csrc", tmp_path / "kernels"
    shutil.copytree(ROOT / "csrc", source)
    kernel = source / "cpu/attention.cpp"
    kernel.write_text("int broken( { return 0; }\n" + kernel.read_text())
    folder.mkdir()
    (folder / "libsat_cpu.so").write_text("an older build")
    done = run_script(source, folder)
    assert done.returncode == 1
    assert "build.log" in done.stderr and "broken" in done.stderr
    assert len(done.stderr.splitlines()) < 25 and "Traceback" not in done.stderr
    assert [p.name for p in folder.iterdir()] == ["build.log"]
    assert "cpu/attention.cpp" in (folder / "build.log").read_text()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_script(ROOT / "csrc", tmp_path / "file/kernels")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "file/kernels" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_source_folder_is_named(tmp_path):
    done = run_script(tmp_path, tmp_path / "kernels")
    assert done.returncode == 1 and f"error: {tmp_path}: expected" in done.stderr


def test_cuda_required_without_nvcc_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(build_kernels, "find_nvcc", lambda: None)
    with pytest.raises(build_kernels.BuildError, match="nvcc not found"):
        build_kernels.build_cuda(ROOT / "csrc", tmp_path, tmp_path / "log", "required", "80")
    library, record = build_kernels.build_cuda(
        ROOT / "csrc", tmp_path, tmp_path / "log", "auto", ""
    )
    assert library is None and record == {"built": False, "reason": "nvcc not found"}


@pytest.fixture
def copy(kernels_dir, tmp_path):
    return Path(shutil.copytree(kernels_dir, tmp_path / "copy"))


def test_a_damaged_library_is_not_loaded(copy, monkeypatch):
    library = copy / "libsat_cpu.so"
    library.write_bytes(library.read_bytes()[:10_000])
    with pytest.raises(
        kernels.KernelLibraryError, match="not the file that kernels.json describes"
    ):
        load(copy, monkeypatch)


def test_a_library_without_a_record_is_not_loaded(copy, monkeypatch):
    (copy / "kernels.json").unlink()
    with pytest.raises(kernels.KernelLibraryError, match="build it anew with: snakemake"):
        load(copy, monkeypatch)


def test_another_interface_version_is_not_loaded(copy, monkeypatch):
    monkeypatch.setattr(kernels, "ABI_VERSION", 99)
    with pytest.raises(kernels.KernelLibraryError, match=r"interface version \d+, expected 99"):
        load(copy, monkeypatch)


def test_a_file_that_is_no_library_is_not_loaded(copy, monkeypatch):
    (copy / "libsat_cpu.so").write_text("no library")
    record = json.loads((copy / "kernels.json").read_text())
    record["cpu"]["sha256"] = build_kernels.sha256(copy / "libsat_cpu.so")
    (copy / "kernels.json").write_text(json.dumps(record))
    with pytest.raises(kernels.KernelLibraryError, match="cannot be loaded"):
        load(copy, monkeypatch)


def test_the_newest_run_is_taken_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("SAT_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "PROJECT", tmp_path)
    assert kernels.kernels_folder() is None
    for age, run in enumerate(("demo", "lra")):
        library = tmp_path / "results" / run / "kernels/libsat_cpu.so"
        library.parent.mkdir(parents=True)
        library.touch()
        os.utime(library, (1000 - age, 1000 - age))
    assert kernels.kernels_folder() == tmp_path / "results/demo/kernels"
