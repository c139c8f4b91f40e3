"""Configure and build llama.cpp with CMake: all of it, as `cmake -B build` and `cmake --build build` do.

    python workflow/scripts/llama_build.py --source data/lra/llama/source.json --build-type Debug \
        --folder results/lra/llama/build-Debug-0.3.36 --record results/lra/llama/build.json --threads 8

Run it with a Python whose environment has cmake and ninja (envs/llama.yaml). The folder stays: a second call goes on
from the objects that are there. build.log beside the record holds what CMake and the compiler said.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from build_kernels import (
    BuildError,
    NoCompilerError,
    excerpt,
    find_cxx,
    find_tool,
    how_to_install,
)
from lra.files import read_json, run_script, write_json

CMAKE_AT_LEAST = (3, 14)
PROGRAMS = ("llama-completion", "llama-cli", "llama-bench")
# llama.cpp would look for the web pages of its server on the network while it is compiled.
# It would also look for ccache itself, and keep on calling it when it is gone.
OPTIONS = {"LLAMA_USE_PREBUILT_UI": "OFF", "GGML_CCACHE": "OFF"}
CURL_OPTION = re.compile(r"^\s*option\(\s*LLAMA_CURL\b", re.MULTILINE)


def uses_curl(source: Path) -> bool:
    """Whether this version has the option LLAMA_CURL, which needs libcurl's headers; later ones only warn of it."""
    return CURL_OPTION.search((source / "CMakeLists.txt").read_text(errors="replace")) is not None


def cmake_version() -> tuple[int, ...] | None:
    try:
        done = subprocess.run([find_tool("cmake"), "--version"], text=True, capture_output=True)
    except BuildError:
        return None
    found = re.search(r"version (\d+)\.(\d+)", done.stdout)
    return tuple(map(int, found.groups())) if found else None


def has_header(compiler: str, header: str) -> bool:
    command = [compiler, "-E", "-x", "c++", "-", "-o", os.devnull]
    text = f"#include <{header}>\n"
    return not subprocess.run(command, input=text, text=True, capture_output=True).returncode


def check_prerequisites() -> None:
    """BuildError that names everything that is missing, and its packages."""
    missing = {}
    version = cmake_version()
    if version is None or version < CMAKE_AT_LEAST:
        found = f", found {'.'.join(map(str, version))}" if version else ""
        missing["cmake"] = f"CMake {'.'.join(map(str, CMAKE_AT_LEAST))} or newer{found}"
    try:
        find_cxx()
    except NoCompilerError:
        missing["compiler"] = "a C++ compiler (looked for $CXX, c++, g++ and clang++)"
    if missing:
        raise BuildError(
            f"llama.cpp needs {'; '.join(missing.values())}. {how_to_install(*missing)}"
        )


def curl_option(source: Path, compiler: str) -> dict[str, str]:
    """LLAMA_CURL where the version has it: OFF, and a note, without libcurl's headers, as nothing here downloads."""
    if not uses_curl(source):
        return {}
    if has_header(compiler, "curl/curl.h"):
        return {"LLAMA_CURL": "ON"}
    print(
        "llama.cpp: libcurl's headers (curl/curl.h) were not found, so it is built with LLAMA_CURL=OFF and cannot "
        f"download models. To have that: {how_to_install('curl headers')}",
        file=sys.stderr,
    )
    return {"LLAMA_CURL": "OFF"}


def run(command: list[str], log: Path) -> None:
    """Run a build step; what it says goes to `log` as it comes. BuildError with an excerpt when it fails.

    Ninja is asked to stop, not killed, when this process is stopped, so that it takes half-made objects away.
    """
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        # Without a folder of its own above the tree, git would find this project's commit there.
        above = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path.cwd())}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=above)
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        said = log.read_bytes()[start:].decode(errors="replace")
        raise BuildError(
            f"{Path(command[0]).name} failed; the full log is {log}\n{excerpt(said)}\n"
            "  Objects that were built stay: run this again to go on from them"
        )


def cache(folder: Path) -> dict[str, str]:
    """The entries of CMakeCache.txt."""
    path = folder / "CMakeCache.txt"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return dict(re.findall(r"^([\w.-]+):\w+=(.*)$", text, re.MULTILINE))


def steps(folder: Path) -> dict[str, set[tuple[str, ...]]]:
    """The steps that Ninja has done in `folder`, in this call and before.

    By the hash of its command, the newest row of each output of a step: (start, end, in ms; mtime; output; hash).
    """
    path = folder / ".ninja_log"
    rows = (
        [tuple(line.split("\t")) for line in path.read_text().splitlines()]
        if path.is_file()
        else []
    )
    newest = {row[3]: row for row in rows if len(row) == 5}
    found: dict[str, set[tuple[str, ...]]] = {}
    for row in newest.values():
        found.setdefault(row[4], set()).add(row)
    return found


def seconds_of(step: set[tuple[str, ...]]) -> float:
    return max(int(row[1]) - int(row[0]) for row in step) / 1000


def forget_other_compilers(folder: Path, compiler: str) -> None:
    """Drop CMake's cache when it is of another compiler, or one that is gone.

    CMake would drop it by itself, and the options of the call with it.
    """
    entries = cache(folder)
    c_compiler = entries.get("CMAKE_C_COMPILER")
    if entries.get("CMAKE_CXX_COMPILER", compiler) != compiler or (
        c_compiler and not shutil.which(c_compiler)
    ):
        (folder / "CMakeCache.txt").unlink()
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)


def build(found: dict, build_type: str, folder: Path, log: Path, threads: int) -> dict:
    """Build the tree that `found` (source.json) names in `folder`; returns the content of build.json."""
    source = Path(found["folder"]).resolve()
    check_prerequisites()
    compiler = find_cxx()
    if cache(folder).get("CMAKE_HOME_DIRECTORY", str(source)) != str(source):
        shutil.rmtree(folder)  # the project was moved, and CMake refuses a folder made elsewhere
    forget_other_compilers(folder, compiler)
    folder.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    before = steps(folder)
    ccache = shutil.which("ccache") or ""
    chosen = OPTIONS | curl_option(source, compiler)
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    options = {
        "CMAKE_BUILD_TYPE": build_type,
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_C_COMPILER_LAUNCHER": ccache,
        "CMAKE_CXX_COMPILER_LAUNCHER": ccache,
        "CMAKE_MAKE_PROGRAM": ninja,
        "LLAMA_BUILD_COMMIT": (found["commit"] or "unknown")[:12],
        "LLAMA_BUILD_NUMBER": "0",
        **chosen,
    }
    started = time.monotonic()
    defined = [f"-D{name}={value}" for name, value in options.items()]
    run([cmake, f"-S{source}", f"-B{folder.resolve()}", "-GNinja", *defined], log)
    if (configured := cache(folder).get("CMAKE_BUILD_TYPE")) != build_type:
        raise BuildError(
            f"CMake configured the build type {configured!r}, not {build_type!r} (llama.build_type). If it is not "
            f"the source that sets it, remove {folder} and run this again; the full log is {log}"
        )
    # What `cmake --build` calls; called by itself, it hears the signal that stops this process.
    run([ninja, "-C", str(folder.resolve()), "-j", str(threads)], log)
    seconds = time.monotonic() - started
    entries, after = cache(folder), steps(folder)
    earlier = sum(before.get(key) == step for key, step in after.items())
    said = subprocess.run([compiler, "--version"], text=True, capture_output=True).stdout
    flags = ("CMAKE_CXX_FLAGS", f"CMAKE_CXX_FLAGS_{build_type.upper()}")
    return {
        "schema_version": 1,
        **{key: found[key] for key in ("version", "commit", "from", "sha256")},
        "build_type": build_type,
        "folder": str(folder),
        "compiler": {"path": compiler, "version": said.partition("\n")[0]},
        "flags": " ".join(filter(None, (entries.get(name, "").strip() for name in flags))),
        "options": chosen | {n: entries[n] for n in ("GGML_NATIVE",) if n in entries},
        "cmake": ".".join(map(str, cmake_version())),
        "ccache": bool(ccache),
        "threads": threads,
        "seconds": round(seconds, 1),
        "steps": {"all": len(after), "earlier": earlier},
        "seconds_of_steps": round(sum(map(seconds_of, after.values())), 1),
        "programs": [name for name in PROGRAMS if (folder / "bin" / name).is_file()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="source.json")
    parser.add_argument("--build-type", required=True, help="as CMAKE_BUILD_TYPE")
    parser.add_argument("--folder", required=True, type=Path, help="where CMake builds")
    parser.add_argument("--record", required=True, type=Path, help="build.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    log = args.record.with_name("build.log")
    print(
        f"llama.cpp: building in {args.folder}; tail -f {log} shows how far it is", file=sys.stderr
    )
    record = build(read_json(args.source), args.build_type, args.folder, log, args.threads)
    write_json(args.record, record)


if __name__ == "__main__":
    run_script(main)
