"""Take what the tasks need out of lra_release.gz, in one pass and without unpacking the rest.

    python extract.py --archive data/lra/archives/lra_release.gz --output-dir data/lra/raw \
        --level curv_contour_length_14
    python extract.py --archive data/lra/archives/pathfinder_tfds.gz --output-dir data/lra/tfds \
        --tfds pathfinder32/1.0.0

The first writes listops/basic_{train,val,test}.tsv, retrieval/new_aan_pairs.{train,eval,test}.tsv and
pathfinder/<level>.tar: the level's images and metadata stay packed in a plain tar, because 200,000 small
files are slow to make and slow to delete. files.json holds the sha256 of all of them. The second writes the
folder of a TFDS data set. The archive is a tar, gzipped or not (recognised by content), or a folder into which
one was unpacked. Where the archive holds a member twice, the copy in the deepest folder counts (the release
repeats some folders, partly broken, one level up). Needs nothing but Python; gunzips in a process of its own
where pigz or gzip exists.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lra.files import folder_members, progress, run_script, scratch_folder, write_json

sys.path.append(str(Path(__file__).resolve().parents[2]))
from sat import seal  # noqa: E402

LISTOPS = tuple(f"listops/basic_{split}.tsv" for split in ("train", "val", "test"))
RETRIEVAL = tuple(f"retrieval/new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test"))
CHUNK = 1 << 20
RECORD = "files.json"


def extract(archive: Path, output_dir: Path, level: str) -> None:
    """Write the raw files of listops, retrieval and pathfinder (one level) below `output_dir`.

    Raises ValueError, and leaves `output_dir` as it was, when the archive is cut or corrupt, lacks a
    file, or holds a name that climbs out of its folder.
    """
    outputs = [*LISTOPS, *RETRIEVAL, f"pathfinder/{level}.tar"]
    with scratch_folder(output_dir / ".extract.tmp") as scratch:
        hashes = copy_members(archive, scratch, level)
        missing = [name for name in outputs if not (scratch / name).exists()]
        if missing:
            raise ValueError(
                f"{archive} has no member for {', '.join(missing)}: it is not the LRA release, or not "
                f"all of it (expected listops-1000/, tsv_data/ and pathfinder32/{level}/)"
            )
        # An old record must not describe new files, should this be stopped half way.
        (output_dir / RECORD).unlink(missing_ok=True)
        for name in outputs:
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, output_dir / name)
        write_json(output_dir / RECORD, seal.add({seal.FILES: hashes}))


def again(archive: Path) -> str:
    """What to do about a broken archive: a download that was believed when it came is still known by its hash."""
    folder = archive.parent
    return (
        f"Delete it, and {folder}/.kept/{archive.name} and its line in {folder}/checksums.json where they are, and get "
        "it again"
    )


def extract_tfds(archive: Path, output_dir: Path, name: str) -> None:
    """Write the folder `name` (data set/version) of an archive below `output_dir`; errors as in `extract`."""
    pattern = re.compile(rf"(?P<root>(?:.*/)?){re.escape(name)}/(?P<file>\w[\w.-]*)")
    depths: dict[str, int] = {}
    with scratch_folder(output_dir / f".{name.split('/')[0]}.tmp") as scratch:
        for info, stream in members(archive):
            match = pattern.fullmatch(check_name(archive, info))
            if not match or info.isdir():
                continue
            check_plain(archive, info)
            depth = match["root"].count("/")
            if depth >= depths.get(match["file"], -1):
                depths[match["file"]] = depth
                check_space(archive, info, scratch)
                with open(scratch / match["file"], "wb") as file:
                    copy_bytes(archive, info, stream, file)
        if "dataset_info.json" not in depths:
            raise ValueError(
                f"{archive} has no member {name}/dataset_info.json: it is not the TFDS form of Pathfinder"
            )
        folder = output_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(scratch, folder)


class Hashing:
    """A file open for writing that knows the sha256 of what was written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.file.write(data)


def copy_members(archive: Path, scratch: Path, level: str) -> dict[str, str]:
    """Copy the wanted members of the archive to `scratch`, the deepest copy of each; -> sha256 by file."""
    pattern = re.compile(
        r"(?P<root>(?:.*/)?)(?:listops-1000/(?P<listops>basic_(?:train|val|test)\.tsv)"
        r"|tsv_data/(?P<retrieval>new_aan_pairs\.(?:train|eval|test)\.tsv)"
        rf"|pathfinder32/{re.escape(level)}/"
        r"(?P<pathfinder>imgs/\d+/sample_\d+\.png|metadata/\d+\.npy))"
    )
    depths: dict[str, int] = {}
    hashing: dict[str, Hashing] = {}
    num_images = num_metadata = 0
    tar_path = scratch / "pathfinder" / f"{level}.tar"
    with contextlib.ExitStack() as stack:
        packed = None
        for info, stream in members(archive):
            match = pattern.fullmatch(check_name(archive, info))
            if not match:
                continue
            check_plain(archive, info)
            family = match.lastgroup
            name = match[family]
            path = tar_path if family == "pathfinder" else scratch / family / name
            depth = match["root"].count("/")
            known = depths.get(str(path), -1)
            if depth < known:
                continue
            depths[str(path)] = depth
            path.parent.mkdir(exist_ok=True)
            check_space(archive, info, scratch)
            if family != "pathfinder":
                with open(path, "wb") as file:
                    hashing[f"{family}/{name}"] = Hashing(file)
                    copy_bytes(archive, info, stream, hashing[f"{family}/{name}"])
                continue
            if depth > known:
                if packed:
                    packed.file.close()
                packed = Hashing(stack.enter_context(open(path, "wb")))
                hashing[f"pathfinder/{level}.tar"] = packed
                num_images = num_metadata = 0
            num_images += name.endswith(".png")
            num_metadata += name.endswith(".npy")
            append(archive, info, stream, name, packed)
        if packed:
            packed.write(bytes(2 * tarfile.BLOCKSIZE))
    if tar_path.exists() and not (num_images and num_metadata):
        raise ValueError(
            f"{archive}: pathfinder32/{level} has {num_images} images and {num_metadata} metadata "
            "files, expected both"
        )
    return {name: file.sha256.hexdigest() for name, file in hashing.items()}


def append(
    archive: Path, info: tarfile.TarInfo, stream: BinaryIO, name: str, packed: Hashing
) -> None:
    """Add one member to the plain tar, its header free of dates and owners."""
    header = tarfile.TarInfo(name)
    header.size = info.size
    packed.write(header.tobuf(tarfile.USTAR_FORMAT))
    copy_bytes(archive, info, stream, packed)
    packed.write(bytes(-info.size % tarfile.BLOCKSIZE))


def copy_bytes(
    archive: Path, info: tarfile.TarInfo, stream: BinaryIO, file: BinaryIO | Hashing
) -> None:
    remaining = info.size
    while remaining:
        chunk = stream.read(min(CHUNK, remaining))
        if not chunk:
            raise ValueError(
                f"{archive} is cut or corrupt: it ends in {info.name}. {again(archive)}"
            )
        file.write(chunk)
        remaining -= len(chunk)


def check_space(archive: Path, info: tarfile.TarInfo, folder: Path) -> None:
    """ValueError when the disk has no room for a member, before any of it is written.

    How much all members need is known at the end of the archive only: gzip does not say how large a tar is.
    """
    free = shutil.disk_usage(folder).free
    if free < info.size:
        raise ValueError(
            f"{archive}: {info.name} needs {info.size:,} bytes in {folder.parent}, {free:,} are free: "
            "make room or link the folder to a larger disk"
        )


def check_plain(archive: Path, info: tarfile.TarInfo) -> None:
    if not info.isreg() or info.issparse():
        raise ValueError(f"{archive}: {info.name} is no plain file (a link, for example)")


def check_name(archive: Path, info: tarfile.TarInfo) -> str:
    """The member's name without leading './'; ValueError when it, or a link, leads out of the archive."""
    name = PurePosixPath(info.name)
    target = None
    if info.issym():
        target = name.parent / info.linkname
    elif info.islnk():
        target = PurePosixPath(info.linkname)
    for path in filter(None, (name, target)):
        depth = 0
        for part in path.parts:
            depth += -1 if part == ".." else 1
            if path.is_absolute() or depth < 0 or (path is name and part == ".."):
                raise ValueError(
                    f"{archive}: the member {info.name!r}"
                    f"{f' (a link to {info.linkname!r})' if target else ''} leads out of the archive: "
                    "it is not the LRA release"
                )
    return str(name)


def members(archive: Path) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    """Each member of a tar, gzipped or not, or each file of a folder, with the stream at its first byte.

    Reads the archive once, front to back, keeps no list of members, and goes on to the last byte, so
    that gzip's checksum of the whole is verified. ValueError when the archive is cut or corrupt.
    """
    with progress(archive.name, "members read") as add:
        for member in folder_files(archive) if archive.is_dir() else tar_members(archive):
            add(1)
            yield member


def folder_files(folder: Path) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    for info, path in folder_members(folder):
        with open(path, "rb") as file:
            yield info, file


def tar_members(archive: Path) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    with open_stream(archive) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar:
                info = tar.next()
                while info:
                    yield info, tar.fileobj
                    tar.fileobj.seek(tar.offset)
                    try:
                        # TarFile.next would keep every member (3 million in the release) in a list,
                        # and would take a broken header for the end.
                        info = tarfile.TarInfo.fromtarfile(tar)
                    except tarfile.EOFHeaderError:
                        break
            while stream.read(CHUNK):
                pass
        except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{archive} is cut or corrupt: {error}. {again(archive)}") from None


@contextlib.contextmanager
def open_stream(archive: Path) -> Iterator[BinaryIO]:
    """The bytes of the archive, gunzipped when they are gzip; EOFError when gunzip complains."""
    # Unbuffered, so that the position is also that of the process which inherits the file.
    with open(archive, "rb", buffering=0) as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        program = shutil.which("pigz") or shutil.which("gzip")
        if not is_gzip:
            yield file
        elif not program:
            with gzip.open(file) as stream:
                yield stream
        else:
            process = subprocess.Popen(
                [program, "-dc"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            try:
                yield process.stdout
                message = process.stderr.read().decode(errors="replace").strip()
                # Exit 2 is a warning: bytes after the end of the gzip data, which nobody reads.
                if process.wait() not in (0, 2):
                    raise ValueError(f"{archive} is cut or corrupt: {message}. {again(archive)}")
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
                process.stderr.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", required=True, type=Path, help="archive or folder")
    parser.add_argument(
        "--output-dir", required=True, type=Path, help="data/<run>/raw or data/<run>/tfds"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--level", help="Pathfinder level, e.g. curv_contour_length_14")
    what.add_argument("--tfds", help="TFDS data set, e.g. pathfinder32/1.0.0")
    args = parser.parse_args()
    if args.tfds:
        extract_tfds(args.archive, args.output_dir, args.tfds)
    else:
        extract(args.archive, args.output_dir, args.level)


if __name__ == "__main__":
    run_script(main)
