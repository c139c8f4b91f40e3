"""The head of an answer to a download that may go on from a byte."""

from http.server import BaseHTTPRequestHandler


def begin(
    handler: BaseHTTPRequestHandler, body: bytes, resumes: bool, promised: int | None
) -> int | None:
    """Send status and headers; -> the first byte to send, None when an error was all of the answer.

    promised: the length that is told, where it is not that of the body.
    """
    start = 0
    if resumes and (wanted := handler.headers.get("Range")):
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            handler.send_error(416)
            return None
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        handler.send_response(200)
    handler.send_header("Content-Length", str((promised or len(body)) - start))
    handler.end_headers()
    return start
