"""An HTTP server with one file, which misbehaves as the path says: /<kind>/<seed>/<number of bad answers>."""

from __future__ import annotations

import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter

import ranged


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, seed, bad = (*self.path.strip("/").split("/"), "0", "0")[:3]
        self.server.tries[self.path] += 1
        tries = self.server.tries[self.path]
        draw = random.Random(f"{seed} {tries}")
        body = self.server.body
        try:
            if kind == "slow":
                self.answer(body, pause=0.03)
            elif tries > int(bad):
                self.answer(body)
            else:
                getattr(self, kind)(body, draw)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed

    # kinds of bad answers

    def cut(self, body: bytes, draw: random.Random) -> None:
        self.answer(body, limit=draw.randrange(len(body)))

    def cut_from_the_start(self, body: bytes, draw: random.Random) -> None:
        self.answer(body, limit=draw.randrange(len(body)), resumes=False)

    def reset(self, body: bytes, draw: random.Random) -> None:
        self.answer(body, limit=draw.randrange(len(body)))
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def stall(self, body: bytes, draw: random.Random) -> None:
        self.answer(body, limit=draw.randrange(len(body)))
        self.wfile.flush()
        time.sleep(draw.uniform(0.5, 1.5))

    def shorter(self, body: bytes, draw: random.Random) -> None:
        """A part with a length that says that it is all."""
        self.answer(body[: draw.randrange(1, len(body))], resumes=False)

    def longer(self, body: bytes, draw: random.Random) -> None:
        self.answer(body, promised=len(body) + draw.randrange(1, 10_000))

    def flipped(self, body: bytes, draw: random.Random) -> None:
        changed = bytearray(body)
        changed[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        self.answer(bytes(changed), resumes=False)

    def page(self, body: bytes, draw: random.Random) -> None:
        self.answer(b"<html>Please log in</html>", resumes=False)

    def empty(self, body: bytes, draw: random.Random) -> None:
        self.answer(b"", resumes=False)

    def refusal(self, body: bytes, draw: random.Random) -> None:
        self.send_error(draw.choice([403, 404, 410, 416, 429, 500, 503]))

    def silence(self, body: bytes, draw: random.Random) -> None:
        self.close_connection = True

    def answer(
        self,
        body: bytes,
        *,
        limit: int | None = None,
        promised: int | None = None,
        resumes: bool = True,
        pause: float = 0,
    ) -> None:
        start = ranged.begin(self, body, resumes, promised)
        if start is None:
            return
        part = body[start : None if limit is None else start + limit]
        size = len(body) // 20 if pause else len(body) + 1
        for at in range(0, len(part), size):
            self.wfile.write(part[at : at + size])
            self.wfile.flush()
            time.sleep(pause)

    def log_message(self, *_) -> None:
        pass


BAD = [
    *("cut", "cut_from_the_start", "reset", "stall", "shorter", "longer", "flipped", "page"),
    *("empty", "refusal", "silence"),
]


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, body: bytes = b""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.tries = body, Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def handle_error(self, *_) -> None:
        pass  # a connection that was reset

    def close(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()
