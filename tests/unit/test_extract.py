"""Extraction from archives in the layout of the release, whole and broken."""

import gzip
import hashlib
import io
import json
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import demo_archives
import extract
import pytest

LEVEL = "curv_contour_length_14"
INNER = "lra_release/lra_release"
OUTPUTS = sorted(
    [
        *(f"listops/basic_{split}.tsv" for split in ("train", "val", "test")),
        *(f"retrieval/new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test")),
        f"pathfinder/{LEVEL}.tar",
    ]
)


def members() -> dict[str, bytes]:
    """A small release: two copies of ListOps, other levels and sizes of Pathfinder."""
    files = {}
    for split in ("train", "val", "test"):
        files[f"{INNER}/listops-1000/basic_{split}.tsv"] = f"inner {split}".encode()
        files[f"lra_release/listops-1000/basic_{split}.tsv"] = b"outer"
    for split in ("train", "eval", "test"):
        files[f"{INNER}/tsv_data/new_aan_pairs.{split}.tsv"] = f"pairs {split}".encode() * 9999
    for level in (LEVEL, "curv_baseline"):
        for number in range(3):
            image = f"{INNER}/pathfinder32/{level}/imgs/{number}/sample_{number}.png"
            files[image] = f"{level} {number}".encode()
            files[f"{INNER}/pathfinder32/{level}/metadata/{number}.npy"] = b"lines"
    files[f"lra_release/pathfinder128/{LEVEL}/imgs/0/sample_0.png"] = b"broken"
    return files


def pack(path: Path, files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for info in extra:
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def outputs(folder: Path) -> list[str]:
    """The files below a folder, but for the record of their hashes."""
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return [name for name in found if name != extract.RECORD]


def refuses(archive: Path, folder: Path, match: str) -> None:
    """Extraction fails with this message and leaves nothing."""
    with pytest.raises(ValueError, match=match):
        extract.extract(archive, folder, LEVEL)
    assert not folder.exists() or outputs(folder) == []


def test_what_was_written_is_recorded(tmp_path):
    archive = pack(tmp_path / "a.gz", members())
    extract.extract(archive, tmp_path / "raw", LEVEL)
    recorded = json.loads((tmp_path / "raw" / extract.RECORD).read_text())["files"]
    assert sorted(recorded) == OUTPUTS
    for name, sha256 in recorded.items():
        assert hashlib.sha256((tmp_path / "raw" / name).read_bytes()).hexdigest() == sha256


def test_a_broken_archive_that_was_believed_is_got_again_as_the_message_says(tmp_path):
    archive = tmp_path / "archives/a.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"a page to log in")
    words = f"{archive} is cut or corrupt.*archives/.kept/a.gz and its line in .*checksums.json"
    refuses(archive, tmp_path / "raw", words)


@pytest.mark.parametrize("name", ["lra_release.gz", "lra_release.tar"])
def test_takes_what_is_needed_from_the_inner_copy(tmp_path, name):
    archive = pack(tmp_path / name, members())
    extract.extract(archive, tmp_path / "raw", LEVEL)
    assert outputs(tmp_path / "raw") == OUTPUTS
    assert (tmp_path / "raw/listops/basic_val.tsv").read_bytes() == b"inner val"
    with tarfile.open(tmp_path / f"raw/pathfinder/{LEVEL}.tar") as tar:
        assert tar.getnames() == [
            name for n in range(3) for name in (f"imgs/{n}/sample_{n}.png", f"metadata/{n}.npy")
        ]
        assert tar.extractfile("imgs/2/sample_2.png").read() == f"{LEVEL} 2".encode()
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}


def test_inner_copy_wins_in_any_order(tmp_path):
    files = members()
    outer = f"lra_release/pathfinder32/{LEVEL}/imgs/7/sample_7.png"
    for number, order in enumerate((list(files), list(files)[::-1])):
        archive = pack(
            tmp_path / f"{number}.gz", {outer: b"outer"} | {name: files[name] for name in order}
        )
        extract.extract(archive, tmp_path / f"{number}", LEVEL)
        assert (tmp_path / f"{number}/listops/basic_test.tsv").read_bytes() == b"inner test"
        with tarfile.open(tmp_path / f"{number}/pathfinder/{LEVEL}.tar") as tar:
            assert len(tar.getnames()) == 6


def test_gunzips_without_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr(extract.shutil, "which", lambda _: None)
    archive = pack(tmp_path / "a.gz", members())
    extract.extract(archive, tmp_path / "raw", LEVEL)
    assert outputs(tmp_path / "raw") == OUTPUTS
    archive.write_bytes(archive.read_bytes()[:-300])
    refuses(archive, tmp_path / "again", "cut or corrupt")


@pytest.mark.parametrize("name", ["a.gz", "a.tar"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_cut_archive(tmp_path, name, share):
    archive = pack(tmp_path / name, members())
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * share)])
    refuses(archive, tmp_path / "raw", "cut or corrupt")


def test_archive_cut_between_two_members(tmp_path):
    archive = pack(tmp_path / "a.tar", members())
    with tarfile.open(archive) as tar:
        edge = tar.getmembers()[-2].offset
    archive.write_bytes(archive.read_bytes()[:edge])
    refuses(archive, tmp_path / "raw", "cut or corrupt")


def test_last_byte_of_the_gzip_is_missing(tmp_path):
    archive = pack(tmp_path / "a.gz", members())
    archive.write_bytes(archive.read_bytes()[:-1])
    refuses(archive, tmp_path / "raw", "cut or corrupt")


def test_flipped_bit(tmp_path):
    archive = pack(tmp_path / "a.gz", members())
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 4
    archive.write_bytes(data)
    refuses(archive, tmp_path / "raw", "cut or corrupt|leads out|no member|no plain")


def test_broken_header_in_a_plain_tar(tmp_path):
    archive = pack(tmp_path / "a.tar", members())
    with tarfile.open(archive) as tar:
        offset = tar.getmembers()[-1].offset
    data = bytearray(archive.read_bytes())
    data[offset + 2] ^= 1
    archive.write_bytes(data)
    refuses(archive, tmp_path / "raw", "cut or corrupt")


@pytest.mark.parametrize(
    "content", [b"", b"<html>403 Forbidden</html>" * 99, gzip.compress(b"no tar")]
)
def test_no_archive_at_all(tmp_path, content):
    archive = tmp_path / "a.gz"
    archive.write_bytes(content)
    refuses(archive, tmp_path / "raw", "cut or corrupt")


@pytest.mark.parametrize(
    "missing", ["listops-1000/basic_val", "new_aan_pairs.eval", "pathfinder32"]
)
def test_missing_family(tmp_path, missing):
    files = {name: data for name, data in members().items() if missing not in name}
    refuses(pack(tmp_path / "a.gz", files), tmp_path / "raw", "has no member for")


def test_unknown_level(tmp_path):
    archive = pack(tmp_path / "a.gz", members())
    with pytest.raises(ValueError, match="pathfinder32/curv_none"):
        extract.extract(archive, tmp_path / "raw", "curv_none")


@pytest.mark.parametrize("name", ["../evil.tsv", "/etc/evil", "lra_release/../../evil"])
def test_name_that_climbs_out(tmp_path, name):
    refuses(pack(tmp_path / "a.gz", members() | {name: b"evil"}), tmp_path / "raw", "leads out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "raw") == ["a.gz"]


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../../etc/passwd"])
def test_link_that_leads_out(tmp_path, kind, target):
    archive = pack(tmp_path / "a.gz", members(), (link("lra_release/link", target, kind),))
    refuses(archive, tmp_path / "raw", "leads out")


def test_link_in_place_of_a_file(tmp_path):
    name = f"{INNER}/listops-1000/basic_train.tsv"
    files = members()
    del files[name]
    archive = pack(tmp_path / "a.gz", files, (link(name, "basic_test.tsv"),))
    refuses(archive, tmp_path / "raw", "no plain file")


def test_failure_leaves_earlier_files_alone_and_a_second_attempt_works(tmp_path):
    archive = pack(tmp_path / "a.gz", members())
    raw = tmp_path / "raw"
    extract.extract(archive, raw, LEVEL)
    before = {name: (raw / name).read_bytes() for name in outputs(raw)}
    cut = tmp_path / "cut.gz"
    cut.write_bytes(archive.read_bytes()[:200])
    (raw / ".extract.tmp").mkdir()
    (raw / ".extract.tmp" / "left").write_bytes(b"by a killed attempt")
    with pytest.raises(ValueError):
        extract.extract(cut, raw, LEVEL)
    assert {name: (raw / name).read_bytes() for name in outputs(raw)} == before
    extract.extract(archive, raw, LEVEL)
    assert outputs(raw) == OUTPUTS


def test_long_names_are_read(tmp_path):
    prefix = "folder-with-a-long-name/" * 9
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members().items():
                info = tarfile.TarInfo(prefix + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        extract.extract(path, tmp_path / str(format), LEVEL)
        assert outputs(tmp_path / str(format)) == OUTPUTS


def test_command_line(tmp_path):
    archive = tmp_path / "a.gz"
    demo_archives.write_tar_gz(archive, members().items())
    command = [sys.executable, extract.__file__, "--archive", archive, "--level", LEVEL]
    good = subprocess.run(
        [*command, "--output-dir", tmp_path / "raw"], capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    archive.write_bytes(archive.read_bytes()[:100])
    bad = subprocess.run(
        [*command, "--output-dir", tmp_path / "raw"], capture_output=True, text=True
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith(f"error: {archive} is cut or corrupt")
    assert len(bad.stderr.splitlines()) == 1


def tfds_members() -> dict[str, bytes]:
    """The TFDS form of Pathfinder: all levels in one folder."""
    names = [f"pathfinder32-{s}.tfrecord-00000-of-00001" for s in ("easy", "hard")]
    names += ["dataset_info.json", "features.json"]
    return {f"TFDS/pathfinder32/1.0.0/{name}": name.encode() * 99 for name in names} | {
        "TFDS/pathfinder64/1.0.0/dataset_info.json": b"another size"
    }


@pytest.mark.parametrize("name", ["pathfinder_tfds.gz", "pathfinder_tfds.tar"])
def test_tfds_form_of_pathfinder(tmp_path, name):
    archive = pack(tmp_path / name, tfds_members())
    left = tmp_path / "tfds" / "pathfinder32" / "1.0.0" / "left"
    left.parent.mkdir(parents=True)
    left.touch()
    extract.extract_tfds(archive, tmp_path / "tfds", "pathfinder32/1.0.0")
    found = {
        f"TFDS/{path.relative_to(tmp_path / 'tfds')}": path.read_bytes()
        for path in (tmp_path / "tfds").rglob("*")
        if path.is_file()
    }
    assert found == {name: data for name, data in tfds_members().items() if "32" in name}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"../TFDS/pathfinder32/1.0.0/evil": b""}, "leads out"),
        ({"TFDS/pathfinder32/1.0.0/dataset_info.json": None}, "has no member pathfinder32/1.0.0"),
    ],
)
def test_tfds_form_that_is_refused(tmp_path, change, match):
    files = tfds_members() | change
    archive = pack(tmp_path / "a.gz", {n: data for n, data in files.items() if data is not None})
    with pytest.raises(ValueError, match=match):
        extract.extract_tfds(archive, tmp_path / "tfds", "pathfinder32/1.0.0")
    assert outputs(tmp_path / "tfds") == []
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut or corrupt|leads out"):
        extract.extract_tfds(archive, tmp_path / "tfds", "pathfinder32/1.0.0")
    assert outputs(tmp_path / "tfds") == []


def test_folder_instead_of_an_archive(tmp_path):
    for name, data in members().items():
        path = tmp_path / "release" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    extract.extract(tmp_path / "release", tmp_path / "raw", LEVEL)
    assert outputs(tmp_path / "raw") == OUTPUTS
    assert (tmp_path / "raw/listops/basic_test.tsv").read_bytes() == b"inner test"


def limited(command: list, size: int) -> subprocess.CompletedProcess:
    """Run a command that can write no file beyond `size` bytes: a stand-in for a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)


@pytest.mark.parametrize("size", [1000, 50_000, 100_000])
def test_disk_that_fills_up_leaves_nothing_and_is_one_line(tmp_path, size):
    """The limit is reached in Pathfinder's tar, in a TSV file, at the end of one."""
    archive = pack(tmp_path / "a.tar", members())
    command = [sys.executable, extract.__file__, "--archive", archive, "--level", LEVEL]
    command += ["--output-dir", tmp_path / "raw"]
    done = limited(command, size)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert outputs(tmp_path / "raw") == []
    subprocess.run(command, check=True, capture_output=True)
    assert outputs(tmp_path / "raw") == OUTPUTS


def test_disk_that_fills_up_with_a_tfds_folder(tmp_path):
    archive = pack(tmp_path / "a.tar", tfds_members())
    command = [sys.executable, extract.__file__, "--archive", archive]
    command += ["--tfds", "pathfinder32/1.0.0", "--output-dir", tmp_path / "tfds"]
    assert limited(command, 1000).stderr.splitlines()[-1].startswith("error: ")
    assert outputs(tmp_path / "tfds") == []


@pytest.mark.parametrize("free", [0, 10_000])
def test_room_on_the_disk_is_checked_before_a_member_is_written(tmp_path, monkeypatch, free):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(extract.shutil, "disk_usage", lambda _: usage)
    archive = pack(tmp_path / "a.gz", members())
    refuses(archive, tmp_path / "raw", f"bytes in {tmp_path / 'raw'}, {free:,} are free: make room")
    pairs = f"new_aan_pairs.train.tsv needs {len('pairs train') * 9999:,} bytes"
    if free:
        refuses(archive, tmp_path / "raw", pairs)
    archive = pack(tmp_path / "b.gz", tfds_members())
    if not free:
        with pytest.raises(ValueError, match="0 are free"):
            extract.extract_tfds(archive, tmp_path / "tfds", "pathfinder32/1.0.0")
        assert outputs(tmp_path / "tfds") == []
