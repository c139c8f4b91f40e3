"""llama.cpp's steps without llama.cpp: where the source comes from, what is missing, the model, the results."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import build_kernels
import llama_build
import llama_run
import llama_source
import pytest

from sat import config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "workflow/scripts"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TREE = {
    "CMakeLists.txt": b"project(llama)\n",
    "ggml/CMakeLists.txt": b"",
    "src/a.cpp": b"int a;\n",
}


def pack(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_000_000_000
            tar.addfile(info, io.BytesIO(data))
    return path


def sdist(path: Path, commit: str = COMMIT) -> Path:
    """As llama-cpp-python's: a project around vendor/llama.cpp, with git's note of the commit."""
    files = {
        "p-1.0/.git/modules/vendor/llama.cpp/HEAD": f"{commit}\n".encode(),
        "p-1.0/CMakeLists.txt": b"project(around)\n",
        **{f"p-1.0/vendor/llama.cpp/{name}": data for name, data in TREE.items()},
        "p-1.0/vendor/llama.cpp/.git": b"gitdir: elsewhere\n",
        "p-1.0/zz.txt": b"around too\n",
    }
    return pack(path, files)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def get(tmp_path):
    """A function (keys of llama) -> the record; folder, archives and manual folder lie in tmp_path."""

    def run(**keys):
        llama = {"version": "1.0", "file": "p.tar.gz", "sha256": None, "commit": None} | keys
        llama.setdefault("sources", [])
        places = [tmp_path / name for name in ("tree", "archives", "manual")]
        return llama_source.get_source(llama, *places)

    return run


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    found.pop(llama_source.MARKER, None)
    return found


def test_an_archive_put_there_by_hand_comes_first(tmp_path, get):
    archive = sdist(tmp_path / "manual/p.tar.gz")
    found = get(sha256=sha256(archive), commit=COMMIT, sources=["file:///nowhere.tar.gz"])
    assert found["from"].startswith("manual: ") and found["commit"] == COMMIT
    assert tree(tmp_path / "tree") == TREE
    assert (tmp_path / "tree/src/a.cpp").stat().st_mtime == 1_000_000_000


def test_sources_are_tried_in_order(tmp_path, get, capsys):
    archive = pack(tmp_path / "b.tar.gz", {f"llama.cpp-b1/{name}": TREE[name] for name in TREE})
    sources = [f"{tmp_path.as_uri()}/none-{{version}}.tar.gz", archive.as_uri(), "file:///later.gz"]
    found = get(sources=sources)
    assert found == {"from": archive.as_uri(), "sha256": sha256(archive), "commit": None}
    assert tree(tmp_path / "tree") == TREE
    said = capsys.readouterr().err
    assert "none-1.0.tar.gz" in said and "later" not in said


def test_a_second_call_leaves_the_tree_as_it_is(tmp_path, get):
    archive = sdist(tmp_path / "a.tar.gz")
    keys = {"sha256": sha256(archive), "commit": COMMIT, "sources": [archive.as_uri()]}
    first = get(**keys)
    (tmp_path / "tree/src/mine.cpp").write_text("")
    archive.unlink()
    assert get(**keys) == first and (tmp_path / "tree/src/mine.cpp").exists()
    # With another commit the archive of the first call is there, and is not the one.
    with pytest.raises(ValueError, match="it is commit 0123.*expected ffff"):
        get(**keys | {"commit": "f" * 40})
    assert (tmp_path / "tree/src/mine.cpp").exists()


def test_the_archive_of_an_earlier_call_is_taken(tmp_path, get):
    archive = sdist(tmp_path / "a.tar.gz")
    keys = {"sha256": sha256(archive), "sources": [archive.as_uri()]}
    get(**keys)
    archive.rename(tmp_path / "gone.tar.gz")
    (tmp_path / "tree").rename(tmp_path / "old")
    get(**keys)
    assert tree(tmp_path / "tree") == TREE


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sha256": "0" * 64}, "has sha256 .*expected 0000"),
        ({"commit": "f" * 40}, "it is commit 0123.*expected ffff"),
        ({"sources": ["git+https://example.org/x@{commit}"]}, "llama.commit is null"),
        ({"sources": []}, "none is configured.*put it at .*manual/p.tar.gz"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, get, keys, expected):
    archive = sdist(tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match="(?s)llama.cpp 1.0: no source gave it.*" + expected):
        get(**{"sources": [archive.as_uri()]} | keys)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("name", ["p/../../evil", "/evil", "p/vendor/llama.cpp/../../../../evil"])
def test_members_that_climb_out_are_refused(tmp_path, get, name):
    members = {f"p/{file}": TREE[file] for file in TREE} | {name: b"evil"}
    archive = pack(tmp_path / "in/a.tar.gz", members)
    with pytest.raises(ValueError, match="leads out"):
        get(sources=[archive.as_uri()])
    assert not list(tmp_path.rglob("evil")) and not (tmp_path / "tree").exists()


def test_links_are_not_made(tmp_path, get):
    members = {f"p/{file}": TREE[file] for file in TREE}
    archive = pack(tmp_path / "a.tar.gz", members, links={"p/link": "src/a.cpp"})
    get(sources=[archive.as_uri()])
    assert tree(tmp_path / "tree") == TREE
    assert not (tmp_path / "tree/link").is_symlink()


def test_another_archive_is_refused(tmp_path, get):
    archive = pack(tmp_path / "a.tar.gz", {"p/README": b""})
    with pytest.raises(ValueError, match="it has no llama.cpp: CMakeLists.txt is missing"):
        get(sources=[archive.as_uri()])


@pytest.fixture
def repository(tmp_path):
    """(path, commit of the tag b1) of a git repository whose branch has gone on since."""
    folder = tmp_path / "repository"
    for name, data in TREE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]

    def git(*arguments):
        done = subprocess.run(
            ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    git("tag", "b1")
    commit = git("rev-parse", "HEAD")
    (folder / "src/a.cpp").write_text("int b;\n")
    git("commit", "--quiet", "-am", "two")
    return folder, commit


def test_git_at_a_tag(tmp_path, get, repository):
    folder, commit = repository
    source = f"git+{folder.as_uri()}@b1"
    assert get(sources=[source], commit=commit) == {
        "from": source,
        "sha256": None,
        "commit": commit,
    }
    assert tree(tmp_path / "tree") == TREE
    with pytest.raises(ValueError, match=f"it is commit {commit}, expected ffff"):
        get(sources=[source], commit="f" * 40)
    with pytest.raises(ValueError, match="git fetch failed"):
        get(sources=[f"git+{folder.as_uri()}@b2"])


def test_git_that_is_missing_names_the_package(get, repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="(?s)git was not found.*apt-get install git.*dnf install"):
        get(sources=[f"git+{repository[0].as_uri()}@b1"])


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in tmp_path/index whose package A.b 1.0 writes tmp_path/ran when it is built; its archive."""
    archive = sdist(tmp_path / "index/files/A_b-1.0.tar.gz")
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    files = {"A_b-1.0/setup.py": evil, "A_b-1.0/PKG-INFO": b"Name: A.b\nVersion: 1.0\n"}
    pack(archive, files | {f"A_b-1.0/vendor/llama.cpp/{name}": TREE[name] for name in TREE})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index/simple").as_uri())

    def write(fragment: str = "") -> Path:
        page = tmp_path / "index/simple/a-b/index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        links = [
            f"{name}" for name in ("A_b-1.0-py3-none-any.whl", "A.b-1.0.1.tar.gz", archive.name)
        ]
        rows = [
            f'<a data-requires-python="&gt;=3" href="../../files/{name}{fragment}">x</a>'
            for name in links
        ]
        page.write_text("<!DOCTYPE html><html><body>" + "<br>".join(rows))
        return archive

    return write


@pytest.mark.parametrize("known", [True, False])
def test_the_source_distribution_of_pips_index_is_not_built(tmp_path, get, index, known):
    archive = index()
    found = get(sources=["A.b=={version}"], sha256=sha256(archive) if known else None)
    assert found == {"from": "A.b==1.0", "sha256": sha256(archive), "commit": None}
    assert tree(tmp_path / "tree") == TREE and not (tmp_path / "ran").exists()
    assert sorted(path.name for path in (tmp_path / "archives").iterdir()) == [".kept", "p.tar.gz"]


@pytest.mark.parametrize("keys", [{"sha256": "0" * 64}, {}])
def test_pips_archive_of_another_hash_is_refused(tmp_path, get, index, keys):
    index("#sha256=" + "0" * 64)
    with pytest.raises(ValueError, match="has sha256 .*expected 0000"):
        get(sources=["A.b=={version}"], **keys)
    assert not (tmp_path / "tree").exists() and not (tmp_path / "archives/p.tar.gz").exists()


def test_pips_files_and_environment_say_where_to_look(tmp_path, get, index, monkeypatch):
    archive = index()
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = {(tmp_path / 'none').as_uri()}\nno-index = true\n"
        f"[download]\nno-index = false\nextra-index-url =\n    file:///nowhere\n    {os.environ['PIP_INDEX_URL']}\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.delenv("PIP_INDEX_URL")
    assert get(sources=["a-b=={version}"])["sha256"] == sha256(archive)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="a-b==1.0: not found where pip looks: no-index is set"):
        get(sources=["a-b=={version}"])
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    assert get(sources=["a-b=={version}"])["sha256"] == sha256(archive)


def test_a_package_pip_would_not_find_is_named_without_a_password(get, index, monkeypatch):
    index()
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://me:secret@127.0.0.1:1/simple")
    monkeypatch.setattr(llama_source.download, "NUM_ATTEMPTS", 1)
    monkeypatch.setattr(llama_source.download.time, "sleep", lambda seconds: None)
    with pytest.raises(
        ValueError, match="(?s)simple/a-b/: no a-b-2.0.tar.gz.*//127.0.0.1:1/"
    ) as error:
        get(sources=["a-b==2.0"])
    assert "secret" not in str(error.value)


def test_pip_that_fails_is_quoted(get, index, tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text("no section\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(ValueError, match="(?s)a==1.0: pip config list failed.*pip.conf"):
        get(sources=["a=={version}"])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("build_type", "debug", "'llama.build_type' is 'debug', allowed: Debug, Release"),
        ("version", "../up", "'llama.version'"),
        ("sources", ["ext::sh -c true"], "'llama.sources.0'"),
        ("sources", ["--index-url=x==1"], "'llama.sources.0'"),
        ("sources", ["git+https://example.org/x@--upload-pack=y"], "'llama.sources.0'"),
        ("sources", [], "'llama.sources'"),
        ("file", "../up.tar.gz", "'llama.file'"),
        ("model", "model.bin", "'llama.model'"),
        ("commit", "master", "'llama.commit'"),
        ("targets", "all", "unknown key 'llama.targets'"),
    ],
)
def test_wrong_configuration_is_refused(key, value, expected):
    with pytest.raises(config.ConfigError, match=expected):
        config.complete(config.load("demo") | {"llama": {key: value}})


@pytest.mark.parametrize(
    "source",
    [
        "llama-cpp-python=={version}",
        "git+https://example.org/llama.cpp@{commit}",
        "git+https://example.org/llama.cpp@b6000",
        "https://example.org/llama.cpp-{version}.tar.gz",
    ],
)
def test_sources_of_every_kind_can_be_configured(source):
    config.complete(config.load("demo") | {"llama": {"sources": [source]}})


def test_another_version_does_not_keep_the_hashes_of_the_default_one():
    own = {"sha256": "0" * 64, "commit": None}
    config.complete(config.load("demo") | {"llama": {"version": "b6000"} | own})
    for keys, expected in [
        ({}, "'llama.version' is 'b6000', but llama.sha256 and llama.commit are those of 0.3.36"),
        ({"sha256": None}, "'llama.version' is 'b6000', but llama.commit is that of 0.3.36"),
        ({"commit": COMMIT}, "'llama.version' is 'b6000', but llama.sha256 is that of 0.3.36"),
    ]:
        with pytest.raises(config.ConfigError, match=expected):
            config.complete(config.load("demo") | {"llama": {"version": "b6000"} | keys})


# ---------------------------------------------------------------- prerequisites and the build


def cmake_project(folder: Path, files: dict[str, str] | None = None) -> dict:
    """A small project with llama.cpp's names in the place of its tree; returns the content of source.json."""
    files = {
        "CMakeLists.txt": "cmake_minimum_required(VERSION 3.14)\nproject(p CXX)\n"
        "set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)\n"
        "add_library(one OBJECT one.cpp)\nadd_executable(llama-bench two.cpp)\n"
        "add_dependencies(llama-bench one)\n",
        "one.cpp": "int one;\n",
        "two.cpp": "int main() {}\n",
    } | (files or {})
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)
    about = {"version": "1.0", "commit": COMMIT, "from": "here", "sha256": None}
    return about | {"folder": str(folder)}


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture
def build(tmp_path):
    def run(found, build_type="Debug"):
        folder = tmp_path / f"build-{build_type}"
        return llama_build.build(found, build_type, folder, tmp_path / "build.log", 1)

    return run


def test_everything_missing_is_one_message(tmp_path, build, monkeypatch):
    found = cmake_project(tmp_path / "tree")
    monkeypatch.setattr(llama_build, "cmake_version", lambda: (3, 13))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    with pytest.raises(build_kernels.BuildError) as error:
        build(found)
    assert str(error.value) == (
        "llama.cpp needs CMake 3.14 or newer, found 3.13; "
        "a C++ compiler (looked for $CXX, c++, g++ and clang++). Install it and run this again:\n"
        "  Debian, Ubuntu: apt-get install cmake g++\n"
        "  Fedora:         dnf install cmake gcc-c++\n"
        "  conda:          conda install -c conda-forge cmake cxx-compiler\n"
        "  macOS:          xcode-select --install && brew install cmake"
    )


@pytest.mark.parametrize("value", ["ccache g++", "g++ -m64"])
def test_a_compiler_with_more_words_is_refused_and_one_with_a_space_taken(
    tmp_path, build, monkeypatch, value
):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(
        build_kernels.BuildError, match=re.escape(f"CXX is '{value}', expected one program")
    ):
        build(cmake_project(tmp_path / "tree"))
    path = program(tmp_path / "my tools/g++", "")
    monkeypatch.setenv("CXX", str(path))
    assert build_kernels.find_cxx() == str(path)


def test_without_the_headers_of_libcurl_it_is_built_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "CMakeLists.txt").write_text('option(LLAMA_CURL "llama: use libcurl" ON)\n')
    asked = []
    monkeypatch.setattr(llama_build, "has_header", lambda *what: asked.append(what))
    assert llama_build.curl_option(tmp_path, "c++") == {"LLAMA_CURL": "OFF"}
    assert asked == [("c++", "curl/curl.h")]
    said = capsys.readouterr().err
    assert "built with LLAMA_CURL=OFF" in said and "apt-get install libcurl4-openssl-dev" in said
    monkeypatch.setattr(llama_build, "has_header", lambda *what: True)
    assert llama_build.curl_option(tmp_path, "c++") == {"LLAMA_CURL": "ON"}
    (tmp_path / "CMakeLists.txt").write_text("")
    assert llama_build.curl_option(tmp_path, "c++") == {}


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ('option(LLAMA_CURL "llama: use libcurl" ON)', True),
        ("llama_option_depr(WARNING     LLAMA_CURL)", False),
        ("# option(LLAMA_CURL)", False),
    ],
)
def test_curl_is_asked_for_by_the_versions_that_use_it(tmp_path, text, uses):
    (tmp_path / "CMakeLists.txt").write_text(f"project(p)\n{text}\n")
    assert llama_build.uses_curl(tmp_path) == uses


def test_headers_are_looked_for_with_the_compiler():
    compiler = build_kernels.find_cxx()
    assert llama_build.has_header(compiler, "vector")
    assert not llama_build.has_header(compiler, "no/such/header.h")


def test_no_compiler_is_said_before_anything_is_fetched(tmp_path):
    llama = {"version": "1", "file": "f", "commit": None, "sha256": None, "sources": []}
    arguments = ["--llama", json.dumps(llama), "--folder", tmp_path / "tree"]
    arguments += ["--archives", tmp_path / "archives", "--record", tmp_path / "source.json"]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "llama_source.py", *arguments],
        env=os.environ | {"PATH": str(tmp_path), "CXX": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "error: no C++ compiler found" in done.stderr
    assert "xcode-select" in done.stderr and not any(tmp_path.iterdir())


def test_the_record_of_a_build(tmp_path, build):
    record = build(cmake_project(tmp_path / "tree"))
    assert record["version"] == "1.0" and record["commit"] == COMMIT
    assert record["build_type"] == "Debug" and "-g" in record["flags"].split()
    assert record["compiler"]["version"] and record["cmake"]
    assert record["programs"] == ["llama-bench"]
    assert record["steps"] == {"all": 3, "earlier": 0}
    assert "-DCMAKE_BUILD_TYPE=Debug" in (tmp_path / "build.log").read_text()


def test_a_failed_compile_shows_an_excerpt_and_the_next_call_goes_on(tmp_path, build):
    found = cmake_project(tmp_path / "tree", {"two.cpp": "int broken( { return 0; }\n"})
    with pytest.raises(build_kernels.BuildError) as error:
        build(found)
    assert f"the full log is {tmp_path / 'build.log'}" in str(error.value)
    assert "broken" in str(error.value) and len(str(error.value).splitlines()) < 25
    assert "two.cpp" in (tmp_path / "build.log").read_text()
    cmake_project(tmp_path / "tree")
    one = next((tmp_path / "build-Debug").rglob("one.cpp.o")).stat().st_mtime_ns
    record = build(found)
    assert record["steps"] == {"all": 3, "earlier": 1}
    assert next((tmp_path / "build-Debug").rglob("one.cpp.o")).stat().st_mtime_ns == one


def test_another_type_builds_beside_and_a_moved_project_anew(tmp_path, build):
    found = cmake_project(tmp_path / "tree")
    build(found)
    assert build(found, "Release")["steps"] == {"all": 3, "earlier": 0}
    assert build(found)["steps"] == {"all": 3, "earlier": 3}
    (tmp_path / "tree").rename(tmp_path / "moved")
    assert build(found | {"folder": str(tmp_path / "moved")})["programs"] == ["llama-bench"]


def wrapper(path: Path) -> Path:
    """A program that calls what it is given, or the compiler where that is no program."""
    text = (
        "import os, shutil\nwords = sys.argv[1:]\n"
        f"words[:0] = [] if shutil.which(words[0]) else [{build_kernels.find_cxx()!r}]\n"
    )
    return program(path, f"{text}os.execv(words[0], words)\n")


def test_another_compiler_keeps_the_build_type(tmp_path, build, monkeypatch):
    found = cmake_project(tmp_path / "tree")
    assert "-O3" in build(found, "Release")["flags"].split()
    other = wrapper(tmp_path / "other-c++")
    monkeypatch.setenv("CXX", str(other))
    record = build(found, "Release")
    assert record["compiler"]["path"] == str(other) and "-O3" in record["flags"].split()
    assert record["steps"] == {"all": 3, "earlier": 0}
    ninja = (tmp_path / "build-Release/build.ninja").read_text()
    assert "-O3" in ninja and str(other) in (tmp_path / "build-Release/CMakeCache.txt").read_text()
    other.unlink()
    monkeypatch.delenv("CXX")
    assert "-O3" in build(found, "Release")["flags"].split()


def test_a_build_type_of_the_source_is_not_recorded_as_ours(tmp_path, build):
    text = cmake_project(tmp_path / "tree")["folder"] + "/CMakeLists.txt"
    own = Path(text).read_text() + 'set(CMAKE_BUILD_TYPE MinSizeRel CACHE STRING "" FORCE)\n'
    with pytest.raises(
        build_kernels.BuildError, match="'MinSizeRel', not 'Debug' .llama.build_type"
    ):
        build(cmake_project(tmp_path / "tree", {"CMakeLists.txt": own}))


def test_the_compiler_cache_may_come_and_go(tmp_path, build, monkeypatch):
    found = cmake_project(tmp_path / "tree")
    ccache = wrapper(tmp_path / "bin/ccache")
    monkeypatch.setenv("PATH", f"{ccache.parent}{os.pathsep}{os.environ['PATH']}")
    assert build(found)["ccache"] is True
    assert str(ccache) in (tmp_path / "build-Debug/build.ninja").read_text()
    shutil.rmtree(ccache.parent)
    if shutil.which("ccache"):
        pytest.skip("there is a ccache besides")
    (tmp_path / "tree/one.cpp").write_text("int other;\n")
    assert build(found)["ccache"] is False
    assert "ccache" not in (tmp_path / "build-Debug/build.ninja").read_text()


def test_steps_that_were_done_again_are_not_earlier_ones(tmp_path, build):
    found = cmake_project(tmp_path / "tree")
    build(found)
    (tmp_path / "tree/one.cpp").write_text("int other;\n")
    assert build(found)["steps"] == {"all": 3, "earlier": 2}


def test_a_step_with_several_outputs_counts_once(tmp_path):
    log = "# ninja log v7\n0\t1500\t7\ta.o\tabc\n1500\t2000\t8\tlib.so\tdef\n1500\t2000\t8\tlib.so.0\tdef\n"
    (tmp_path / ".ninja_log").write_text(log)
    steps = llama_build.steps(tmp_path)
    assert sorted(map(llama_build.seconds_of, steps.values())) == [0.5, 1.5]


def test_a_stopped_build_goes_on(tmp_path):
    """SIGTERM reaches Ninja, which leaves no half-made object."""
    found = cmake_project(tmp_path / "tree")
    slow = (
        f"#!{sys.executable}\nimport os, pathlib, sys, time\n"
        f"if 'two.cpp' in ' '.join(sys.argv) and not pathlib.Path({str(tmp_path / 'fast')!r}).exists():\n"
        f"    pathlib.Path({str(tmp_path / 'waiting')!r}).touch()\n    time.sleep(600)\n"
        f"os.execv({build_kernels.find_cxx()!r}, ['c++', *sys.argv[1:]])\n"
    )
    (tmp_path / "cxx").write_text(slow)
    (tmp_path / "cxx").chmod(0o755)
    (tmp_path / "source.json").write_text(json.dumps(found))
    command = [sys.executable, SCRIPTS / "llama_build.py", "--source", tmp_path / "source.json"]
    command += ["--build-type", "Debug", "--folder", tmp_path / "build"]
    command += ["--record", tmp_path / "build.json"]
    environment = os.environ | {"CXX": str(tmp_path / "cxx")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert "interrupted by user" in (tmp_path / "build.log").read_text()
    assert not (tmp_path / "build.json").exists()
    (tmp_path / "fast").touch()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    record = json.loads((tmp_path / "build.json").read_text())
    assert record["steps"] == {"all": 3, "earlier": 1}


# ---------------------------------------------------------------- the model

MODEL = """
import json, sys
from pathlib import Path
import gguf, llama_run
folder = Path(sys.argv[1])
writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
writer.add_tokenizer_model("llama")
writer.add_token_list([b"<unk>", b"<s>", b"</s>", "\\u2581ü".encode(), b"a"])
writer.add_token_scores([0.0, 0.0, 0.0, -1.5, -2.5])
writer.add_token_types([2, 3, 3, 1, 1])
writer.add_bos_token_id(1)
writer.add_add_bos_token(True)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.close()
counts = [
    llama_run.write_random_model(folder / name, folder / "vocabulary.gguf", seed)
    for name, seed in (("a.gguf", 1), ("b.gguf", 1), ("c.gguf", 2))
]
reader = gguf.GGUFReader(folder / "a.gguf")
print(json.dumps({
    "count": counts[0],
    "fields": {name: field.contents() for name, field in reader.fields.items()},
    "tensors": {t.name: [t.shape.tolist(), float(t.data.mean()), float(t.data.std())] for t in reader.tensors},
}))
"""


@pytest.fixture(scope="module")
def llama_python():
    """The interpreter of the llama environment, which has gguf."""
    python = ROOT / ".venvs/llama/bin/python"
    if not python.exists():
        pytest.skip(f"no environment for llama.cpp: {python} does not exist (make test makes it)")
    return python


def test_the_model_reads_back(tmp_path, llama_python):
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(
        [llama_python, "-c", MODEL, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    fields = found["fields"]
    assert fields["general.architecture"] == "llama" and fields["llama.vocab_size"] == 5
    assert fields["tokenizer.ggml.tokens"] == ["<unk>", "<s>", "</s>", "▁ü", "a"]
    assert fields["tokenizer.ggml.scores"] == [0.0, 0.0, 0.0, -1.5, -2.5]
    assert fields["tokenizer.ggml.token_type"] == [2, 3, 3, 1, 1]
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is True
    tensors = found["tensors"]
    assert len(tensors) == 3 + 9 * fields["llama.block_count"]
    # GGUF counts dimensions from the innermost one.
    assert tensors["token_embd.weight"][0] == [llama_run.EMBEDDING, 5]
    assert tensors["blk.0.attn_k.weight"][0] == [llama_run.EMBEDDING, 64]
    assert tensors["blk.1.ffn_norm.weight"] == [[llama_run.EMBEDDING], 1.0, 0.0]
    _, mean, deviation = tensors["blk.1.ffn_up.weight"]
    assert abs(mean) < 0.001 and abs(deviation - 0.02) < 0.001
    sizes = {}
    for name, (shape, _, _) in tensors.items():
        sizes[name] = shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert found["count"] == sum(sizes.values())
    a, b, c = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b and a != c


def test_models_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="no.gguf is missing: this version has no such vocabulary"):
        llama_run.write_random_model(tmp_path / "model.gguf", tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_text("not one")
    with pytest.raises(ValueError, match="bad.gguf is no GGUF file"):
        llama_run.check_model(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match="gone.gguf is not a file"):
        llama_run.check_model(tmp_path / "gone.gguf")


# ---------------------------------------------------------------- running it

# What the programs of 0.3.36 printed for the model of random weights, the log without most of its lines.
SAID = """I generate: n_ctx = 256, n_batch = 2048, n_predict = 16, n_keep = 1
I common_perf_print:        load time =     542.28 ms
I common_perf_print: prompt eval time =      37.80 ms /     6 tokens (    6.30 ms per token,   158.74 tokens per second)
I common_perf_print:        eval time =    4854.61 ms /    15 runs   (  323.64 ms per token,     3.09 tokens per second)
I common_perf_print:       total time =    4919.49 ms /    21 tokens
"""


def test_timings_are_read():
    assert llama_run.parse_timings(SAID) == {"tokens": 16, "tokens_per_second": 3.09}
    fast = llama_run.parse_timings(SAID.replace("    3.09 tokens", "     inf tokens"))
    assert fast["tokens_per_second"] == float("inf")
    without = "\n".join(SAID.splitlines()[:3])
    with pytest.raises(ValueError, match="no line 'eval time = ...'"):
        llama_run.parse_timings(without)


def test_programs_that_fail_or_hang_are_named(tmp_path):
    fails = program(
        tmp_path / "fails", "print('error: no such flag', file=sys.stderr); sys.exit(3)"
    )
    with pytest.raises(ValueError, match=r"(?s)fails failed \(exit 3\).*error: no such flag"):
        llama_run.call([fails])
    hangs = program(tmp_path / "hangs", "time.sleep(60)")
    with pytest.raises(ValueError, match="hangs was stopped after 0 s.*Release"):
        llama_run.call([hangs], seconds=0.1)


BENCH = (
    "build_commit,build_number,cpu_info,gpu_info,backends,model_filename,model_type,"
    "model_size,model_n_params,n_batch,n_ubatch,n_threads,cpu_mask,cpu_strict,poll,"
    "type_k,type_v,n_gpu_layers,n_cpu_moe,split_mode,main_gpu,no_kv_offload,flash_attn,"
    "devices,tensor_split,tensor_buft_overrides,load_mode,lazy_mode,embeddings,"
    "no_op_offload,no_host,repack,fit_target,fit_min_ctx,n_prompt,n_gen,n_depth,"
    "test_time,avg_ns,stddev_ns,avg_ts,stddev_ts"
    "\n"
    '"0c1e57098bba","0","AMD EPYC","","CPU","/somewhere/random.gguf","llama ?B all F32",'
    '"33950208","8487552","2048","512","2","0x0","0","50","f16","f16","0","0","layer",'
    '"0","0","-1","auto","0.00","none","auto","auto","0","0","0","1","0","0","64","0",'
    '"0","2026-11-24T12:22:57Z","855746470","41888960","74.904994","3.569701"'
    "\n"
    '"0c1e57098bba","0","AMD EPYC","","CPU","/somewhere/random.gguf","llama ?B all F32",'
    '"33950208","8487552","2048","512","2","0x0","0","50","f16","f16","0","0","layer",'
    '"0","0","-1","auto","0.00","none","auto","auto","0","0","0","1","0","0","0","16",'
    '"0","2026-11-24T12:23:01Z","2114205078","158385762","7.597519","0.593974"'
    "\n"
)


def test_the_csv_of_llama_bench_is_read_and_written():
    rows = llama_run.parse_bench(f"a line of a backend\n{BENCH}")
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [("64", "0"), ("0", "16")]
    assert [row["avg_ts"] for row in rows] == ["74.904994", "7.597519"]
    assert llama_run.parse_bench(llama_run.as_csv(rows)) == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("error: no model\n", "has no rows"),
        (BENCH.splitlines()[0], "has no rows"),
        (BENCH.replace("avg_ts", "speed"), "lacks avg_ts"),
        (BENCH.replace("74.904994", "0.0"), "measured nothing"),
        (BENCH.rpartition(",")[0], "measured nothing"),
    ],
)
def test_a_csv_without_results_is_refused(text, expected):
    with pytest.raises(ValueError, match=expected):
        llama_run.parse_bench(text)


@pytest.fixture
def made_build(tmp_path, monkeypatch):
    """A build whose programs print what the real ones did; returns the arguments of llama_run."""
    bin_folder = tmp_path / "build/bin"
    program(
        bin_folder / "llama-completion",
        f"assert '-no-cnv' in sys.argv\nprint('three `odd` words')\nprint({SAID!r}, file=sys.stderr)",
    )
    program(bin_folder / "llama-bench", f"assert 'csv' in sys.argv\nprint({BENCH!r}, end='')")
    record = {
        **{"version": "1.0", "commit": COMMIT, "from": "here", "build_type": "Debug"},
        **{"compiler": {"version": "g++ 12"}, "flags": "-g", "ccache": False, "seconds": 12.3},
        **{"threads": 2, "steps": {"all": 9, "earlier": 4}, "seconds_of_steps": 20.0},
        **{"programs": ["llama-completion", "llama-bench"], "folder": str(bin_folder.parent)},
    }
    (tmp_path / "build.json").write_text(json.dumps(record))
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    names = ("build.json", "source.json", "bench.csv", "summary.md", "own.gguf")
    options = ("--build", "--source", "--bench", "--summary", "--model")
    arguments = [
        part for option, name in zip(options, names, strict=True) for part in (option, name)
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llama_run.py", *arguments])
    return tmp_path


def test_summary_and_table_of_a_model_of_ones_own(made_build):
    llama_run.main()
    assert not (made_build / ".run.tmp").exists()
    rows = llama_run.parse_bench((made_build / "bench.csv").read_text())
    assert [row["model_filename"] for row in rows] == ["own.gguf", "own.gguf"]
    text = (made_build / "summary.md").read_text()
    assert "**llama.cpp 1.0**, commit `0123456789ab`, from `here`, built as Debug" in text
    assert "9 steps, 4 of them by earlier calls" in text
    assert "Model: `own.gguf`" in text and "by 16 tokens, 3.1 a second" in text
    assert "`three 'odd' words`" in text
    assert "| llama ?B all F32 | 8,487,552 | 2 | prompt of 64 | 74.9 ± 3.6 |" in text
    assert "| generate 16 | 7.6 ± 0.6 |" in text
    assert "A Debug build is slow" in text


def test_what_a_terminal_would_obey_is_left_out_and_no_speed_is_infinite(made_build):
    program(
        made_build / "build/bin/llama-completion",
        "print('red\\x1b[31m \\x07\\u202ebell\\x9b')\n"
        f"print({SAID.replace('    3.09 tokens', '     inf tokens')!r}, file=sys.stderr)",
    )
    fast = BENCH.replace('"7.597519"', '"inf"').replace('"0.593974"', '"nan"')
    program(made_build / "build/bin/llama-bench", f"print({fast!r}, end='')")
    llama_run.main()
    text = (made_build / "summary.md").read_text()
    assert "`red [31m bell`" in text and text.replace("\n", "").isprintable()
    assert "by 16 tokens, too fast to time:" in text
    assert "| generate 16 | too fast to time |" in text and "inf" not in text


def test_a_failed_run_leaves_nothing(made_build):
    program(made_build / "build/bin/llama-bench", "sys.exit(1)")
    with pytest.raises(ValueError, match="llama-bench failed"):
        llama_run.main()
    assert not {"bench.csv", "summary.md", ".run.tmp"} & {p.name for p in made_build.iterdir()}
