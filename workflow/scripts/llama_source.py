"""Get the source tree of llama.cpp and record where it came from.

    python workflow/scripts/llama_source.py --llama JSON --folder data/lra/llama/source-0.3.36 \
        --archives data/lra/archives --record data/lra/llama/source.json [--manual-dir DIR]

JSON: {"version", "file", "sha256": hex|null, "commit": hex|null, "sources": [...]}. DIR/<file>, put there by hand,
comes first, then the archive of an earlier call, then the sources in order:

    llama-cpp-python==0.3.36                 its source distribution, from where pip is set to look (index-url,
                                             extra-index-url, find-links, no-index, cert, proxy; no netrc, no keyring)
    git+https://host/llama.cpp@REF           git, one commit deep; REF is a tag or a commit
    https://host/llama.cpp-b1234.tar.gz      an archive of the tree, or of one with it in vendor/llama.cpp

{version} and {commit} in them stand for the values of these keys. An archive is compared with sha256, the tree with
commit; null takes what comes and records it. A tree that is there and fits is left as it is, so that a build goes on
from its objects. Needs Python, and pip, git or curl for the sources of that kind.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urljoin, urlsplit

import build_kernels
import download
from extract import check_name, check_space, copy_bytes, members
from lra.files import locked, parse_json, read_json, run_script, scratch_folder, write_json

MARKER = ".source.json"  # in the tree: what it is; it comes with the tree, by one rename
PYPI = "https://pypi.org/simple"  # where pip looks when no setting names an index
GIT = ["git", "-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=60"]


def get_source(
    llama: dict, folder: Path, archives: Path, manual_dir: Path | None
) -> dict[str, str | None]:
    """Put the tree of llama.cpp at `folder`; returns {from, sha256 of the archive, commit}.

    Raises ValueError when no source gives a tree that fits; `folder` is then as it was.
    """
    if fits(folder, llama):
        return read_json(folder / MARKER)
    archive = archives / llama["file"]
    failures = []
    for source in ["at hand", *llama["sources"]]:
        try:
            if source == "at hand":
                if not at_hand(llama, archive, manual_dir):
                    continue
                found = from_archive(llama, [], archive, manual_dir)
            else:
                source = filled(source, llama)
                print(f"llama.cpp: trying {source}", file=sys.stderr)
                if source.startswith("git+"):
                    return from_git(source, llama, folder)
                if "://" in source:
                    found = from_archive(llama, [source], archive, None)
                else:
                    found = from_pip(source, llama, archive)
            return unpack(archive, llama, folder, found)
        except ValueError as error:
            print(f"llama.cpp: {error}", file=sys.stderr)
            failures.append(f"\n  {source}: {error}")
    place = (manual_dir or archives) / llama["file"]
    raise ValueError(
        f"llama.cpp {llama['version']}: no source gave it:{''.join(failures) or ' none is configured'}\n"
        f"  Get the archive in another way and put it at {place}, or change llama.sources"
    )


def fits(folder: Path, llama: dict) -> bool:
    """Whether the tree at `folder` is known to be the one that is asked for."""
    if not (folder / MARKER).is_file():
        return False
    there = read_json(folder / MARKER)
    pairs = [(llama[key], there[key]) for key in ("sha256", "commit") if llama[key] and there[key]]
    return bool(pairs) and all(wanted == found for wanted, found in pairs)


def filled(source: str, llama: dict) -> str:
    """A source with {version} and {commit} put in; ValueError where the key is null."""
    if "{commit}" in source and not llama["commit"]:
        raise ValueError("it names {commit}, and llama.commit is null")
    return source.replace("{version}", llama["version"]).replace("{commit}", llama["commit"] or "")


def at_hand(llama: dict, archive: Path, manual_dir: Path | None) -> bool:
    """Whether the archive was put there by hand, or an earlier call left it."""
    if manual_dir and (manual_dir / llama["file"]).is_file():
        return True
    return archive.parent.is_dir() and download.kept(archive, llama["sha256"]) is not None


def from_archive(llama: dict, urls: list[str], archive: Path, manual_dir: Path | None) -> dict:
    """The archive through download.py, checked: {from, sha256}."""
    about = {"licence": "MIT", "provenance": "llama.cpp, its authors", "bytes": None}
    source = {"name": "llama.cpp", "urls": urls, **about}
    record = archive.with_name(f"{archive.name}.source.json")
    source |= {key: llama[key] for key in ("file", "sha256")}
    download.download(source, archive, record, manual_dir)
    found = read_json(record)
    return {"from": found["url"], "sha256": found["sha256"]}


def from_pip(requirement: str, llama: dict, archive: Path) -> dict:
    """The source distribution from where pip would look for it: {from, sha256}.

    `pip download` is not called: it runs the archive's build backend, with packages of no pinned version. Raises
    ValueError when no place has it, or with another hash than llama.sha256 or, where that is null, than the index says.
    """
    name, _, version = requirement.partition("==")
    settings = pip_settings()
    proxies = ("http_proxy", "https_proxy")
    environment = os.environ | ({"CURL_CA_BUNDLE": settings["cert"]} if "cert" in settings else {})
    environment |= dict.fromkeys(proxies, settings["proxy"]) if "proxy" in settings else {}
    failures = []
    with (
        locked(archive.with_name(f".{archive.name}.lock"), f"downloading {archive}") as lock,
        scratch_folder(archive.with_name(f".{archive.name}.pip")) as scratch,
    ):
        for place in places(settings, name):
            file = scratch / archive.name
            file.unlink(missing_ok=True)
            try:
                links = listed(place, scratch / "page.html", lock, environment)
                link = next((link for link in links if is_sdist(link, name, version)), None)
                if link is None:
                    raise ValueError(f"no {name}-{version}.tar.gz")
                link, _, fragment = link.partition("#")
                expected = llama["sha256"] or dict(parse_qsl(fragment)).get("sha256")
                if failure := download.fetch_url(link, file, expected, 1.0, lock, environment):
                    raise ValueError(failure)
                whose = "configuration" if llama["sha256"] else "the index"
                sha256 = download.checked_hash(file, expected, whose)
            except ValueError as error:
                failures.append(f"\n    {re.sub('//[^/@]*@', '//', place)}: {error}")
                continue
            os.replace(file, archive)
            download.keep(archive, requirement)
            return {"from": requirement, "sha256": sha256}
    raise ValueError(f"not found where pip looks:{''.join(failures) or ' no-index is set'}")


def pip_settings() -> dict[str, str]:
    """The settings of `pip download` from pip's files and environment. ValueError when pip does not tell them."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise ValueError(f"pip config list failed\n{build_kernels.excerpt(done.stderr)}")
    rows = re.findall(r"^(global|download|:env:)\.([\w-]+)=(.+)$", done.stdout, re.MULTILINE)
    order = ["global", "download", ":env:"]  # later ones win; what is empty counts as not set
    rows = [
        (key, ast.literal_eval(value))
        for _, key, value in sorted(rows, key=lambda row: order.index(row[0]))
    ]
    return {key: value for key, value in rows if value}


def places(settings: dict[str, str], name: str) -> list[str]:
    """URLs and folders that may list files of the package `name`."""
    found = settings.get("find-links", "").split()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        return found
    indexes = [settings.get("index-url", PYPI), *settings.get("extra-index-url", "").split()]
    return found + [f"{index.rstrip('/')}/{normal(name)}/" for index in indexes]


class Links(HTMLParser):
    """The addresses of the links of a page, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]


def listed(place: str, page: Path, lock: int, environment: dict[str, str]) -> list[str]:
    """URLs of the files of a folder, or of those a page links to; `page` is where the page is kept meanwhile."""
    if "://" not in place:
        place = Path(place).expanduser().absolute().as_uri()
    folder = Path(unquote(urlsplit(place).path))
    if place.startswith("file://") and folder.is_dir():
        if not (folder / "index.html").is_file():
            return [path.as_uri() for path in sorted(folder.iterdir())]
        place = f"{place.rstrip('/')}/index.html"
    page.unlink(missing_ok=True)
    if failure := download.fetch_url(place, page, None, 1.0, lock, environment):
        raise ValueError(failure)
    return [urljoin(place, link) for link in Links(page.read_text(errors="replace")).found]


def normal(name: str) -> str:
    """A package's name as an index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_sdist(link: str, name: str, version: str) -> bool:
    file = unquote(urlsplit(link).path).rpartition("/")[2]
    return file.endswith(".tar.gz") and normal(file) == normal(f"{name}-{version}.tar.gz")


def from_git(source: str, llama: dict, folder: Path) -> dict:
    """The tree of git+URL@REF at `folder`."""
    url, _, ref = source.removeprefix("git+").rpartition("@")
    if not re.fullmatch(r"\w[\w./-]*", ref) or "://" not in url:
        raise ValueError("expected git+URL@REF, REF a tag or a commit")
    if not shutil.which("git"):
        raise ValueError(f"git was not found. {build_kernels.how_to_install('git')}")
    surroundings = os.environ | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "https:http:file",
    }
    with scratch_folder(folder.with_name(f".{folder.name}.tmp")) as scratch:

        def git(*arguments: str) -> str:
            done = subprocess.run(
                [*GIT, "-C", scratch, *arguments], text=True, capture_output=True, env=surroundings
            )
            if done.returncode:
                raise ValueError(f"git {arguments[0]} failed: {done.stderr.strip()}")
            return done.stdout.strip()

        git("init", "--quiet")
        git("fetch", "--quiet", "--depth", "1", "--end-of-options", url, ref)
        git("checkout", "--quiet", "--detach", "FETCH_HEAD")
        commit = git("rev-parse", "HEAD")
        shutil.rmtree(scratch / ".git")
        return place(scratch, folder, {"from": source, "sha256": None, "commit": commit}, llama)


def unpack(archive: Path, llama: dict, folder: Path, found: dict) -> dict:
    """The files of the archive's llama.cpp at `folder`, with their dates, so that old objects stay good.

    Only plain files are written: links, of which the build needs none, are left out.
    """
    commit = None
    with scratch_folder(folder.with_name(f".{folder.name}.tmp")) as scratch:
        vendored = False
        for info, stream in members(archive):
            name = check_name(archive, info).partition("/")[2]
            if name == ".git/modules/vendor/llama.cpp/HEAD":
                commit = stream.read(info.size).decode(errors="replace").strip()
            if not info.isreg() or info.issparse():
                continue
            inside = name.removeprefix("vendor/llama.cpp/")
            if inside != name and not vendored:
                # What came before belongs to the project around it.
                vendored = True
                shutil.rmtree(scratch)
            if (vendored and inside == name) or not inside or inside.split("/")[0] == ".git":
                continue
            path = scratch / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            check_space(archive, info, path.parent)
            with open(path, "wb") as file:
                copy_bytes(archive, info, stream, file)
            path.chmod(0o755 if info.mode & 0o100 else 0o644)
            os.utime(path, (info.mtime, info.mtime))
        if commit and not re.fullmatch(r"[0-9a-f]{40}", commit):
            commit = None
        return place(scratch, folder, found | {"commit": commit}, llama)


def place(scratch: Path, folder: Path, found: dict, llama: dict) -> dict:
    """Check the tree and rename it into place; returns `found`."""
    for name in ("CMakeLists.txt", "ggml/CMakeLists.txt"):
        if not (scratch / name).is_file():
            raise ValueError(f"it has no llama.cpp: {name} is missing")
    if llama["commit"] and found["commit"] and found["commit"] != llama["commit"]:
        raise ValueError(
            f"it is commit {found['commit']}, expected {llama['commit']} (llama.commit)"
        )
    write_json(scratch / MARKER, found)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(scratch, folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", required=True, help="the block llama of configuration, JSON")
    parser.add_argument("--folder", required=True, type=Path, help="where the tree goes")
    parser.add_argument("--archives", required=True, type=Path, help="where the archive goes")
    parser.add_argument("--record", required=True, type=Path, help="where the record goes")
    parser.add_argument("--manual-dir", type=Path, help="folder of files put there by hand")
    args = parser.parse_args()
    llama = parse_json(args.llama, "--llama")
    llama["file"] = filled(llama["file"], llama)
    # Before 76 MB are fetched for nothing. CMake comes with the environment of the next step, which looks for the rest.
    build_kernels.find_cxx()
    found = get_source(llama, args.folder, args.archives, args.manual_dir)
    write_json(args.record, found | {"version": llama["version"], "folder": str(args.folder)})


if __name__ == "__main__":
    run_script(main)
