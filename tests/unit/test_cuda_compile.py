"""csrc/cuda compiled by nvcc, for real: no warning, no large spill, every architecture is known."""

import ctypes
import re
import shutil
import subprocess

import build_kernels
import pytest
import torch
from cuda_emulation import ROOT

from sat.attention import kernels

NVCC = build_kernels.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc here")

MOST_SPILLED = 64  # bytes of a thread


def test_the_default_architectures():
    listed = subprocess.run([NVCC, "--list-gpu-arch"], text=True, capture_output=True).stdout
    architectures = build_kernels.default_architectures(NVCC).split(";")
    assert all(name.removesuffix("-real") in listed for name in architectures)
    assert [name.endswith("-real") for name in architectures] == [True] * (
        len(architectures) - 1
    ) + [False]


def test_an_nvcc_without_any_of_them_is_named():
    with pytest.raises(build_kernels.BuildError, match="names none of"):
        build_kernels.default_architectures(shutil.which("true"))


def test_the_library_compiles_for_the_oldest_and_the_newest(tmp_path):
    known = build_kernels.default_architectures(NVCC).split(";")
    architectures = f"{known[0]};{known[-1]}-real"
    log = tmp_path / "log"
    library, record = build_kernels.build_cuda(
        ROOT / "csrc", tmp_path, log, "required", architectures
    )
    assert record["architectures"] == architectures.split(";")
    assert record["sha256"] == build_kernels.sha256(library)
    report = log.read_text()
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    # forward, map, two gradients in 8 shapes each, and delta
    assert len(spills) == 2 * (4 * 8 + 1), "a kernel is missing, or it is not in the report"
    assert max(spills) <= MOST_SPILLED
    loads_and_answers(library)


def loads_and_answers(library):
    """Also where there is no driver; then a launch gives CUDA's error instead of ending the process."""
    cuda = ctypes.CDLL(str(library))
    assert cuda.sat_abi_version() == kernels.ABI_VERSION
    for name, arguments in kernels._SIGNATURES.items():
        getattr(cuda, name).argtypes = arguments
    q = torch.zeros(1, 1, 64, 32)
    problem = kernels._problem(q, None, None, "zero_logits", 0.0, None)
    arguments = [*[kernels._tensor(q)] * 4, None, None, None]
    no_blocks = kernels._BLOCKS.pack(0, 0, 0, 0, 0)
    assert cuda.sat_block_sparse_forward(problem, no_blocks, *arguments) == -1
    if not torch.cuda.is_available():
        assert cuda.sat_dense_forward(problem, *arguments, None) > 0
