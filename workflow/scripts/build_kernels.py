"""Compile csrc/ into libsat_cpu.so and, where nvcc is, libsat_cuda.so.

    python workflow/scripts/build_kernels.py --source csrc --output-dir results/lra/kernels

Run it with a Python whose environment has cmake and ninja (envs/torch.yaml). It writes the libraries
and kernels.json, which says how each was built and holds its SHA-256: sat/ loads no library that
differs from it. A failed build leaves the folder without libraries and with the full build.log.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CUDA_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # those of them that nvcc can compile for
EXCERPT_LINES = 15

# What a build needs of the system, by who installs it; macOS has compiler and git from Apple.
INSTALL = {
    "Debian, Ubuntu": "apt-get install",
    "Fedora": "dnf install",
    "conda": "conda install -c conda-forge",
    "macOS": "brew install",
}
PACKAGES = {
    "compiler": ("g++", "gcc-c++", "cxx-compiler", None),
    "cmake": ("cmake", "cmake", "cmake", "cmake"),
    "curl headers": ("libcurl4-openssl-dev", "libcurl-devel", "libcurl", "curl"),
    "git": ("git", "git", "git", None),
}


class BuildError(ValueError):
    """What the user can mend; its text is the whole message."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


def how_to_install(*needed: str) -> str:
    """The commands that install the parts `needed` (keys of PACKAGES), one line a system."""
    lines = []
    for i, (system, command) in enumerate(INSTALL.items()):
        names = [PACKAGES[part][i] for part in needed]
        commands = ["xcode-select --install"] if None in names else []
        if packages := " ".join(filter(None, names)):
            commands.append(f"{command} {packages}")
        lines.append(f"  {f'{system}:':<15} {' && '.join(commands)}")
    return "Install it and run this again:\n" + "\n".join(lines)


def find_tool(name: str) -> str:
    """Path of a build tool: the one of this Python's packages, else the one on PATH."""
    if importlib.util.find_spec(name):
        package = importlib.import_module(name)
        folder = package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR
        if path := shutil.which(name, path=folder):
            return path
    if path := shutil.which(name):
        return path
    raise BuildError(f"{name} not found: run this in the environment of the rule (envs/)")


def find_cxx() -> str:
    """Path of the C++ compiler. BuildError when $CXX holds more than a program, NoCompilerError when there is none."""
    wanted = os.environ.get("CXX", "").strip()
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if path := shutil.which(candidate):
            return str(Path(path).absolute())
    if len(wanted.split()) > 1:
        raise BuildError(
            f"CXX is '{wanted}', expected one program, the compiler: put options into CXXFLAGS, and leave ccache out "
            "(the build of llama.cpp finds it by itself)"
        )
    raise NoCompilerError(
        "no C++ compiler found (looked for $CXX, c++, g++ and clang++). "
        + how_to_install("compiler")
    )


def find_nvcc() -> str | None:
    for candidate in (os.environ.get("CUDACXX"), "nvcc"):
        if candidate and (path := shutil.which(candidate)):
            return path
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (path := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return path
    return None


def default_architectures(nvcc: str) -> str:
    """CUDA_ARCHITECTURES that this nvcc knows, as CMAKE_CUDA_ARCHITECTURES.

    The last one also as PTX, which newer GPUs compile when they load it.
    """
    done = subprocess.run([nvcc, "--list-gpu-arch"], text=True, capture_output=True)
    known = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in done.stdout.split()]
    if done.returncode or not known:
        raise BuildError(f"{nvcc} --list-gpu-arch names none of {CUDA_ARCHITECTURES}")
    return ";".join([*(f"{number}-real" for number in known[:-1]), str(known[-1])])


def run(command: list[str], log: Path) -> None:
    """Runs a build step, appends what it says to `log`, raises BuildError with an excerpt."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode:
        raise BuildError(
            f"{Path(command[0]).name} failed; the full log is {log}\n{excerpt(done.stdout)}"
        )


def excerpt(text: str) -> str:
    """The first error in what a build step said and the lines after it, or its last lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)]
    start = max(errors[0] - 1, 0) if errors else max(len(lines) - EXCERPT_LINES, 0)
    return "\n".join(f"  {line}" for line in lines[start : start + EXCERPT_LINES])


def build(
    source: Path, folder: Path, log: Path, name: str, options: list[str]
) -> tuple[Path, dict]:
    """Configures and compiles one library below `folder`: its path and what CMake says of it."""
    folder = folder / name
    run(
        [
            find_tool("cmake"),
            f"-S{source.resolve()}",
            f"-B{folder.resolve()}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CXX_COMPILER={find_cxx()}",
            *options,
        ],
        log,
    )
    run([find_tool("cmake"), "--build", str(folder.resolve())], log)
    return folder / f"libsat_{name}.so", json.loads((folder / f"{name}.json").read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_cpu(source: Path, folder: Path, log: Path) -> tuple[Path, dict]:
    library, facts = build(source, folder, log, "cpu", ["-DSAT_CPU=ON", "-DSAT_CUDA=OFF"])
    sets = [entry.split("|") for entry in facts["sets"]]
    record = {
        "built": True,
        "compiler": facts["compiler"],
        "version": facts["version"],
        "openmp": facts["openmp"] or None,
        "flags": facts["flags"],
        "instruction_sets": {name: flags.replace(",", " ") for name, _, flags in sets},
        "sha256": sha256(library),
    }
    return library, record


def build_cuda(
    source: Path, folder: Path, log: Path, mode: str, architectures: str | None
) -> tuple[Path | None, dict]:
    """Like build_cpu; with mode "auto" a missing or failing nvcc is recorded, not raised."""
    if mode == "none":
        return None, {"built": False, "reason": "switched off"}
    nvcc = find_nvcc()
    try:
        if nvcc is None:
            raise BuildError("nvcc not found (looked for $CUDACXX, PATH, $CUDA_HOME)")
        architectures = architectures or default_architectures(nvcc)
        options = [
            "-DSAT_CPU=OFF",
            "-DSAT_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
        ]
        library, facts = build(source, folder, log, "cuda", options)
    except BuildError as error:
        if mode == "required":
            raise
        if nvcc is None:
            return None, {"built": False, "reason": "nvcc not found"}
        print(f"warning: no CUDA library: {error}", file=sys.stderr)
        return None, {"built": False, "reason": "nvcc failed, see build.log"}
    record = {
        "built": True,
        "nvcc": facts["nvcc"],
        "architectures": architectures.split(";"),
        "sha256": sha256(library),
    }
    return library, record


def build_kernels(source: Path, output_dir: Path, cuda: str, architectures: str | None) -> dict:
    """Builds what `cuda` ("auto", "none", "required") asks for into `output_dir`.

    Returns the content of kernels.json. Raises BuildError; then no library is left there.
    """
    if not (source / "CMakeLists.txt").is_file():
        raise BuildError(f"{source}: expected the kernel sources with a CMakeLists.txt")
    find_cxx()
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("kernels.json", "libsat_cpu.so", "libsat_cuda.so", "build.log"):
        (output_dir / name).unlink(missing_ok=True)
    # A fixed name: it gets into the objects, and two builds should give the same bytes.
    folder, log = output_dir / "build.tmp", output_dir / "build.log"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        cpu_library, cpu = build_cpu(source, folder, log)
        cuda_library, cuda_record = build_cuda(source, folder, log, cuda, architectures)
        record = {"schema_version": 1, "cpu": cpu, "cuda": cuda_record}
        for library in filter(None, (cpu_library, cuda_library)):
            os.replace(library, output_dir / library.name)
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (folder / "kernels.json").write_text(text, encoding="utf-8")
        os.replace(folder / "kernels.json", output_dir / "kernels.json")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "build.log" not in cuda_record.get("reason", ""):
        log.unlink()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="the folder csrc")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--cuda",
        choices=("auto", "none", "required"),
        default="auto",
        help="auto: build the CUDA library if nvcc is there (default)",
    )
    parser.add_argument(
        "--cuda-architectures",
        help="as CMAKE_CUDA_ARCHITECTURES, separated by semicolons (default: those of "
        f"{', '.join(map(str, CUDA_ARCHITECTURES))} that nvcc knows, the last one also as PTX)",
    )
    args = parser.parse_args()
    try:
        record = build_kernels(args.source, args.output_dir, args.cuda, args.cuda_architectures)
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")
    for name in ("cpu", "cuda"):
        state = "built" if record[name]["built"] else f"not built: {record[name]['reason']}"
        print(f"libsat_{name}.so: {state}")


if __name__ == "__main__":
    main()
