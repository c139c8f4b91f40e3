"""Fetch one source archive, check it and record where it came from.

    python download.py --source JSON --output data/lra/archives/FILE \
        --record data/lra/archives/FILE.source.json [--manual-dir DIR]

JSON: {"name", "file", "urls": [...], "sha256": hex|null, "bytes": int|null, "licence", "provenance"}.

DIR/FILE, put there by hand, comes first, or the folder DIR/<FILE without its last suffix> into which the archive
was unpacked (it is packed into a plain tar); then what an earlier call left in .kept/ beside the output (a
hard link, for Snakemake deletes the output before it makes it anew), if its hash is still the expected
one; then the URLs in order, through curl. A download that was cut goes on where it stopped: its bytes
stay beside the output as FILE.<hash of the URL>.part. Where no sha256 is known, the first download's is
written to checksums.json beside the output and every later download is compared with it. Needs nothing
but Python and curl.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from lra.files import (
    folder_members,
    locked,
    parse_json,
    progress,
    read_json,
    run_script,
    sha256_file,
    write_json,
)

LEDGER = "checksums.json"
LEDGER_LOCK = ".checksums.lock"
KEPT = ".kept"
KEYS = {"name", "file", "urls", "sha256", "bytes", "licence", "provenance"}
NUM_ATTEMPTS = 5
LOG_SECONDS = 15  # between lines about a download's progress where there is no terminal
CUT = {18, 28, 52, 55, 56, 92}  # curl's codes for a connection that stopped midway
CANNOT_RESUME = {33, 36}
NO_ROOM = {23, 63}  # nothing could be written; the length that the server says is more than is free


def download(
    source: dict, output: Path, record: Path, manual_dir: Path | None, delay: float = 1.0
) -> None:
    """Put the archive of `source` at `output` and its record at `record`.

    `delay`: seconds before the first retry, doubled after each. Raises ValueError when no place
    gives the file or its hash is wrong, or another process downloads it; nothing is then at `output`.
    """
    if missing := KEYS - source.keys():
        raise ValueError(f"--source lacks the keys {sorted(missing)}")
    # curl holds the lock too: it goes on for a while when this process is killed, and two would mix their bytes.
    lock = output.with_name(f".{output.name}.lock")
    with locked(lock, f"downloading {output}") as descriptor:
        get(source, output, record, manual_dir, delay, descriptor)


def get(
    source: dict, output: Path, record: Path, manual_dir: Path | None, delay: float, lock: int
) -> None:
    """What `download` does while it holds the lock whose descriptor `lock` is."""
    ledger_path = output.parent / LEDGER
    ledger = read_json(ledger_path) if ledger_path.exists() else {}
    expected = source["sha256"] or ledger.get(source["file"])
    whose = "configuration" if source["sha256"] else f"first download, {ledger_path}"

    by_hand = manual_dir / source["file"] if manual_dir else None
    if by_hand and by_hand.is_file():
        print(f"{source['name']}: using {by_hand}", file=sys.stderr)
        sha256 = checked_hash(by_hand, expected, whose)
        link_or_copy(by_hand, output)
        url = f"manual: {by_hand}"
    elif by_hand and by_hand.with_suffix("").is_dir():
        by_hand = by_hand.with_suffix("")
        print(f"{source['name']}: packing {by_hand}", file=sys.stderr)
        sha256 = pack_folder(source, by_hand, output, expected, whose)
        url = f"manual: {by_hand}"
    elif (earlier := kept(output, expected)) is not None:
        url, sha256 = earlier
        print(f"{source['name']}: using the file of an earlier download", file=sys.stderr)
    else:
        url, sha256 = fetch(source, output, expected, whose, by_hand, delay, lock)
        keep(output, url)

    if not source["sha256"] and ledger.get(source["file"]) != sha256:
        with open(output.parent / LEDGER_LOCK, "w") as lock:  # downloads run side by side
            fcntl.flock(lock, fcntl.LOCK_EX)
            ledger = read_json(ledger_path) if ledger_path.exists() else {}
            write_json(ledger_path, ledger | {source["file"]: sha256})
    description = {key: source[key] for key in ("name", "file", "licence", "provenance")}
    write_json(
        record,
        description
        | {"url": url, "sha256": sha256, "bytes": output.stat().st_size, "data": "released"},
    )


def pack_folder(source: dict, folder: Path, output: Path, expected: str | None, whose: str) -> str:
    """Write the files of an unpacked archive as a plain tar; returns its sha256.

    The same files give the same bytes. (One file is what the next steps read and what can be hashed.)
    """
    part = output.with_name(f".{output.name}.tmp")
    block = tarfile.BLOCKSIZE
    try:
        needed = sum(block + info.size + -info.size % block for info, _ in folder_members(folder))
        check_space(source | {"bytes": needed}, output, part)
        with (
            progress(source["name"], "files packed") as add,
            tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar,
        ):
            for info, path in folder_members(folder):
                with open(path, "rb") as file:
                    tar.addfile(info, file)
                tar.members.clear()
                add(1)
        sha256 = checked_hash(part, expected, whose)
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return sha256


def keep(output: Path, url: str) -> None:
    """Leave a second name of the archive, and where it came from, for a later call."""
    folder = output.parent / KEPT
    folder.mkdir(exist_ok=True)
    link_or_copy(output, folder / output.name)
    write_json(folder / f"{output.name}.json", {"url": url})


def kept(output: Path, expected: str | None) -> tuple[str, str] | None:
    """URL and sha256 of what `keep` left, now at `output` too; None when it is not there or not as expected."""
    folder = output.parent / KEPT
    archive, note = folder / output.name, folder / f"{output.name}.json"
    if not (expected and archive.is_file() and note.is_file() and sha256_file(archive) == expected):
        return None
    link_or_copy(archive, output)
    return read_json(note)["url"], expected


def fetch(
    source: dict,
    output: Path,
    expected: str | None,
    whose: str,
    by_hand: Path | None,
    delay: float,
    lock: int,
) -> tuple[str, str]:
    """Try the URLs in order; returns the one that gave the file, and the file's sha256."""
    if not shutil.which("curl"):
        raise ValueError("curl was not found: install it, or put the file in place by hand")
    failures = []
    for url in source["urls"]:
        part = output.with_name(
            f"{output.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part"
        )
        check_space(source, output, part)
        print(f"{source['name']}: downloading {url}", file=sys.stderr)
        failure = fetch_url(url, part, expected, delay, lock)
        if failure is None:
            try:
                sha256 = checked_hash(part, expected, whose)
            except ValueError as error:
                part.unlink()
                failure = str(error)
            else:
                os.replace(part, output)
                return url, sha256
        print(f"{source['name']}: {failure}", file=sys.stderr)
        failures.append(f"\n  {url}: {failure}")
    place = by_hand or output
    raise ValueError(
        f"{source['name']}: no URL gave {source['file']}:{''.join(failures) or ' none is configured'}"
        f"\n  Get the file in another way and put it at {place}"
    )


def check_space(source: dict, output: Path, part: Path) -> None:
    """ValueError when the disk has no room for what is still to come."""
    present = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(output.parent).free
    if source["bytes"] and free < source["bytes"] - present:
        raise ValueError(
            f"{source['name']}: {source['bytes'] - present:,} bytes are needed in {output.parent}, "
            f"{free:,} are free: make room or link the folder to a larger disk"
        )


def fetch_url(
    url: str,
    part: Path,
    expected: str | None,
    delay: float,
    lock: int,
    environment: dict[str, str] | None = None,
) -> str | None:
    """Download `url` to `part`, going on where `part` ends; returns None or what went wrong.

    A cut that brought new bytes does not count as a failed attempt. `environment`: curl's, None for this process's.
    """
    failure = None
    attempt = 0
    while attempt < NUM_ATTEMPTS:
        before = part.stat().st_size if part.exists() else 0
        code, status, message = curl(url, part, lock, environment)
        if code == 0:
            # curl leaves no file behind when the server sends an empty body.
            part.touch()
            return None
        after = part.stat().st_size if part.exists() else 0
        failure = f"{message or 'curl failed'} (curl exit {code}, status {status})"
        if code in NO_ROOM:
            free = shutil.disk_usage(part.parent).free
            failure += f", {free:,} bytes are free in {part.parent}: make room and run this again"
        if code in CUT | CANNOT_RESUME or status == 416:
            # A part may be complete already: a length that lied, or a stop just before the rename.
            if expected and after and sha256_file(part) == expected:
                return None
        if before and (code in CANNOT_RESUME or status == 416):
            part.unlink(missing_ok=True)
            attempt += 1
            continue
        if code not in CUT and status < 500 and status not in (408, 429) and code not in (6, 7):
            break
        attempt = 0 if after > before else attempt + 1
        time.sleep(0 if after > before else delay * 2 ** (attempt - 1))
    if part.exists() and part.stat().st_size == 0:
        part.unlink()
    return failure


def curl(
    url: str, part: Path, lock: int, environment: dict[str, str] | None
) -> tuple[int, int, str]:
    """One run of curl: its exit code, the HTTP status (0 for none) and its message."""
    terminal = sys.stderr.isatty()
    command = ["curl", "--fail", "--location", "--continue-at", "-", "--output", str(part)]
    # Where the size is not configured, the server's word on it is compared with what is free.
    command += ["--max-filesize", str(shutil.disk_usage(part.parent).free)]
    command += ["--connect-timeout", "30", "--speed-limit", "1", "--speed-time", "60"]
    command += ["--proto", "=http,https,file", "--proto-redir", "=http,https"]
    command += ["--progress-bar"] if terminal else ["--silent"]
    command += ["--write-out", "%{http_code} %{errormsg}", url]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=None if terminal else subprocess.DEVNULL,
        text=True,
        pass_fds=[lock],
        env=environment,
    )
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=LOG_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if not terminal and part.exists():
                    print(f"{part.name}: {part.stat().st_size:,} bytes", file=sys.stderr)
    finally:
        process.kill()
        process.wait()
    status, _, message = output.partition(" ")
    return process.returncode, int(status or 0), message.strip()


def checked_hash(path: Path, expected: str | None, whose: str) -> str:
    """The file's sha256; ValueError when it is not the expected one."""
    sha256 = sha256_file(path)
    if expected and sha256 != expected:
        raise ValueError(f"{path} has sha256 {sha256}, expected {expected} ({whose})")
    return sha256


def link_or_copy(path: Path, output: Path) -> None:
    """A hard link where the file system allows one, else a copy; renamed into place."""
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path.resolve(), temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="the source's row of configuration, JSON")
    parser.add_argument("--output", required=True, type=Path, help="where the archive goes")
    parser.add_argument("--record", required=True, type=Path, help="where its record goes")
    parser.add_argument("--manual-dir", type=Path, help="folder of files put there by hand")
    args = parser.parse_args()
    download(parse_json(args.source, "--source"), args.output, args.record, args.manual_dir)


if __name__ == "__main__":
    run_script(main)
