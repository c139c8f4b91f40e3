"""Downloads from a real server that cuts, lies and refuses; files put there by hand."""

import hashlib
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import download
import pytest
import ranged

BODY = bytes(range(256)) * 400
SHA256 = hashlib.sha256(BODY).hexdigest()
SCRIPT = Path(download.__file__)


class Handler(http.server.BaseHTTPRequestHandler):
    """Behaves as the path says; the server remembers every request as (path, Range header)."""

    def do_GET(self) -> None:
        requests = self.server.requests
        requests.append((self.path, self.headers.get("Range")))
        tries = sum(path == self.path for path, _ in requests)
        kind = self.path.split("/")[1]
        if kind.isdigit():
            self.send_error(int(kind))
        elif kind == "busy" and tries < 3:
            self.send_error(503)
        elif kind == "other":
            self.answer(b"other bytes")
        elif kind == "cut":
            # Resumes, but stops after 30,000 bytes each time.
            self.answer(BODY, resumes=True, limit=30_000)
        elif kind == "random":
            cut = random.Random(tries).randrange(1, 40_000)
            self.answer(BODY, resumes=True, limit=cut)
        elif kind == "slow":
            self.answer(BODY, limit=30_000, pause=0.4)
        elif kind == "orphan" and tries == 1:
            self.answer(BODY, limit=30_000, wait=self.server.go_on)
        elif kind == "shorter":
            self.answer(BODY[:-1000])
        elif kind == "restart":
            self.answer(BODY, limit=30_000 if tries == 1 else None)
        elif kind == "longer":
            self.answer(BODY, resumes=True, promised=len(BODY) + 1000)
        elif kind == "huge":
            self.answer(BODY, promised=10**15)
        elif kind == "silent":
            self.close_connection = True
        else:
            self.answer(BODY, resumes=True)

    def answer(
        self,
        body: bytes,
        resumes: bool = False,
        limit: int | None = None,
        promised: int | None = None,
        pause: float | None = None,
        wait: threading.Event | None = None,
    ) -> None:
        start = ranged.begin(self, body, resumes, promised)
        if start is None:
            return
        self.wfile.write(body[start : start + limit if limit else None])
        if pause or wait:
            self.wfile.flush()
            wait.wait(60) if wait else time.sleep(pause)
            self.wfile.write(body[limit:])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.go_on = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def source(*urls: str, **changes) -> dict:
    row = {
        "name": "set",
        "file": "set.gz",
        "urls": list(urls),
        "sha256": SHA256,
        "bytes": len(BODY),
    }
    return row | {"licence": "MIT", "provenance": "a paper"} | changes


def fetch(row: dict, tmp_path: Path, manual_dir: Path | None = None) -> tuple[Path, Path]:
    output = tmp_path / "archives" / row["file"]
    record = tmp_path / "archives" / f"{row['file']}.source.json"
    download.download(row, output, record, manual_dir, delay=0.01)
    return output, record


def left(tmp_path: Path) -> list[str]:
    names = {path.name for path in (tmp_path / "archives").iterdir()}
    return sorted(names - {download.LEDGER_LOCK})


def test_record_says_what_was_used(server, tmp_path):
    output, record = fetch(source(f"{server.url}/good"), tmp_path)
    assert output.read_bytes() == BODY
    assert json.loads(record.read_text()) == {
        "name": "set",
        "file": "set.gz",
        "url": f"{server.url}/good",
        "sha256": SHA256,
        "bytes": len(BODY),
        "data": "released",
        "licence": "MIT",
        "provenance": "a paper",
    }
    assert left(tmp_path) == [".kept", "set.gz", "set.gz.source.json"]


@pytest.mark.parametrize("kind", ["cut", "restart", "busy", "longer"])
def test_awkward_server_gives_the_right_bytes(server, tmp_path, kind):
    output, _ = fetch(source(f"{server.url}/{kind}"), tmp_path)
    assert output.read_bytes() == BODY
    assert left(tmp_path) == [".kept", "set.gz", "set.gz.source.json"]


def test_cut_download_goes_on_where_it_stopped(server, tmp_path):
    fetch(source(f"{server.url}/cut"), tmp_path)
    assert [wanted for _, wanted in server.requests] == [
        None,
        *(f"bytes={start}-" for start in (30_000, 60_000, 90_000)),
    ]


def test_download_killed_earlier_goes_on(server, tmp_path):
    url = f"{server.url}/good"
    (tmp_path / "archives").mkdir()
    name = f"set.gz.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part"
    (tmp_path / "archives" / name).write_bytes(BODY[:50_000])
    output, _ = fetch(source(url), tmp_path)
    assert output.read_bytes() == BODY
    assert server.requests == [("/good", "bytes=50000-")]


def test_a_download_waits_for_the_curl_of_one_that_was_killed(server, tmp_path):
    """Two would write into the same file; where the hash is not known yet, nobody would see that."""
    row = source(f"{server.url}/orphan", sha256=None)
    output = tmp_path / "archives/set.gz"
    arguments = ["--source", json.dumps(row), "--output", output, "--record", tmp_path / "record"]
    with subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], stderr=subprocess.DEVNULL
    ) as process:
        while not list(output.parent.glob("*.part")):
            time.sleep(0.01)
        process.kill()
    with pytest.raises(ValueError, match="another process is downloading .*set.gz"):
        fetch(row, tmp_path)
    server.go_on.set()
    while True:
        try:
            output, _ = fetch(row, tmp_path)
            break
        except ValueError as error:
            assert "another process" in str(error)
            time.sleep(0.01)
    assert output.read_bytes() == BODY


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_download_killed_before_the_rename_ends_right(server, tmp_path, sha256):
    url = f"{server.url}/good"
    (tmp_path / "archives").mkdir()
    name = f"set.gz.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part"
    (tmp_path / "archives" / name).write_bytes(BODY)
    output, _ = fetch(source(url, sha256=sha256), tmp_path)
    assert output.read_bytes() == BODY


def test_urls_are_tried_in_order(server, tmp_path):
    urls = [f"{server.url}/{kind}" for kind in ("404", "other", "good", "never")]
    _, record = fetch(source(*urls), tmp_path)
    assert json.loads(record.read_text())["url"] == urls[2]
    assert "/never" not in [path for path, _ in server.requests]


def test_all_failures_are_listed(server, tmp_path):
    urls = [f"{server.url}/{kind}" for kind in ("403", "404", "500", "silent")]
    with pytest.raises(ValueError) as error:
        fetch(source(*urls), tmp_path, tmp_path / "by_hand")
    message = str(error.value)
    for url, reason in zip(urls, ("403", "404", "500", "Empty reply"), strict=True):
        line = next(line for line in message.splitlines() if url in line)
        assert reason in line
    assert str(tmp_path / "by_hand" / "set.gz") in message
    assert left(tmp_path) == []


def test_wrong_hash_names_both_and_leaves_nothing(server, tmp_path):
    with pytest.raises(ValueError) as error:
        fetch(source(f"{server.url}/other"), tmp_path)
    assert SHA256 in str(error.value)
    assert hashlib.sha256(b"other bytes").hexdigest() in str(error.value)
    assert left(tmp_path) == []


def test_unknown_hash_is_recorded_and_compared(server, tmp_path):
    fetch(source(f"{server.url}/good", sha256=None), tmp_path)
    ledger = tmp_path / "archives" / "checksums.json"
    assert json.loads(ledger.read_text()) == {"set.gz": SHA256}
    (tmp_path / "archives" / "set.gz").unlink()
    shutil.rmtree(tmp_path / "archives" / ".kept")
    with pytest.raises(ValueError, match=f"expected {SHA256}.*checksums.json"):
        fetch(source(f"{server.url}/other", sha256=None), tmp_path)
    assert not (tmp_path / "archives" / "set.gz").exists()


def test_downloads_side_by_side_are_all_recorded(tmp_path):
    """Two wrote the same temporary file once, and one of them failed."""
    rows = []
    for number in range(12):
        path = tmp_path / f"archive{number}"
        path.write_bytes(b"%d" % number)
        rows.append(source(path.as_uri(), file=f"set{number}.gz", sha256=None, bytes=None))
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda row: fetch(row, tmp_path), rows))
    recorded = json.loads((tmp_path / "archives" / "checksums.json").read_text())
    assert sorted(recorded) == sorted(row["file"] for row in rows)


def test_second_call_fetches_nothing_while_the_hash_is_as_expected(server, tmp_path):
    output, record = fetch(source(f"{server.url}/good", sha256=None), tmp_path)
    output.unlink()  # as Snakemake does before it makes an output anew
    record.unlink()
    fetch(source(f"{server.url}/404", licence="other"), tmp_path)
    assert output.read_bytes() == BODY
    assert json.loads(record.read_text())["url"] == f"{server.url}/good"
    assert json.loads(record.read_text())["licence"] == "other"
    output.unlink()
    with pytest.raises(ValueError, match="404"):
        fetch(source(f"{server.url}/404", sha256="0" * 64), tmp_path)


def test_file_put_there_by_hand_comes_first(server, tmp_path):
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    (by_hand / "set.gz").write_bytes(BODY)
    output, record = fetch(source(f"{server.url}/good"), tmp_path, by_hand)
    assert output.read_bytes() == BODY
    assert json.loads(record.read_text())["url"] == f"manual: {by_hand / 'set.gz'}"
    assert server.requests == []


def test_wrong_file_put_there_by_hand_is_refused(server, tmp_path):
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    (by_hand / "set.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"expected {SHA256}"):
        fetch(source(f"{server.url}/good"), tmp_path, by_hand)
    assert left(tmp_path) == []


def test_file_url(tmp_path):
    (tmp_path / "mirror.gz").write_bytes(BODY)
    output, _ = fetch(source((tmp_path / "mirror.gz").as_uri()), tmp_path)
    assert output.read_bytes() == BODY


def test_full_disk_is_found_before_the_download(server, tmp_path):
    with pytest.raises(ValueError, match="are needed .* are free"):
        fetch(source(f"{server.url}/good", bytes=10**18), tmp_path)
    assert server.requests == []


def test_full_disk_is_found_where_the_server_alone_knows_the_size(server, tmp_path):
    with pytest.raises(ValueError, match=r"curl exit 63.*bytes are free in .*make room"):
        fetch(source(f"{server.url}/huge", bytes=None), tmp_path)
    assert left(tmp_path) == []


def test_command_line_reports_in_one_piece(server, tmp_path):
    command = [sys.executable, SCRIPT, "--output", tmp_path / "a" / "set.gz"]
    command += ["--record", tmp_path / "a" / "set.gz.source.json", "--source"]
    good = subprocess.run(
        [*command, json.dumps(source(f"{server.url}/good"))], capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    bad = subprocess.run(
        [*command, json.dumps(source(f"{server.url}/404", sha256="0" * 64))],
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 1
    assert "error: set: no URL gave set.gz" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_unpacked_folder_put_there_by_hand_is_packed(server, tmp_path):
    folder = tmp_path / "by_hand" / "set"
    for name in ("b/2", "a/1", "a/10"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    row = source(f"{server.url}/good", sha256=None)
    output, record = fetch(row, tmp_path, tmp_path / "by_hand")
    with tarfile.open(output, "r:") as tar:
        assert tar.getnames() == ["set/a/1", "set/a/10", "set/b/2"]
        assert tar.extractfile("set/a/10").read() == b"a/10"
    first = output.read_bytes()
    assert json.loads(record.read_text())["sha256"] == hashlib.sha256(first).hexdigest()
    assert json.loads(record.read_text())["url"] == f"manual: {folder}"
    os.utime(folder / "a/1", (0, 0))
    fetch(row, tmp_path, tmp_path / "by_hand")  # the hash of the first time still holds
    assert output.read_bytes() == first
    (folder / "a/1").write_text("other")
    with pytest.raises(ValueError, match="expected .*checksums.json"):
        fetch(row, tmp_path, tmp_path / "by_hand")
    assert not list((tmp_path / "archives").glob(".*.tmp"))
    assert server.requests == []


def test_server_that_cuts_at_random_bytes(server, tmp_path):
    output, _ = fetch(source(f"{server.url}/random"), tmp_path)
    assert output.read_bytes() == BODY
    assert len(server.requests) > 3


def test_server_that_promises_less_than_it_has(server, tmp_path):
    """curl stops at the promised length: the hash tells, and what came is not taken for the file."""
    with pytest.raises(ValueError, match=f"expected {SHA256}"):
        fetch(source(f"{server.url}/shorter"), tmp_path)
    assert left(tmp_path) == []


def test_disk_that_fills_up_during_the_download(server, tmp_path):
    """/dev/full stands in for the disk: curl ends with 23. What is there stays for the next attempt."""
    url = f"{server.url}/good"
    (tmp_path / "archives").mkdir()
    name = f"set.gz.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part"
    part = tmp_path / "archives" / name
    part.symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"curl exit 23.*bytes are free in .*make room"):
        fetch(source(url), tmp_path)
    assert not (tmp_path / "archives" / "set.gz").exists()
    part.write_bytes(BODY[:1000])
    server.requests.clear()
    output, _ = fetch(source(url), tmp_path)
    assert output.read_bytes() == BODY
    assert server.requests == [("/good", "bytes=1000-")]


def test_log_says_how_far_a_long_download_is(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "LOG_SECONDS", 0.1)
    output, _ = fetch(source(f"{server.url}/slow"), tmp_path)
    assert output.read_bytes() == BODY
    assert re.search(r"\.part: [\d,]+ bytes\n", capsys.readouterr().err)
