"""A proxy before an S3 server that fails every tenth request: in turn before it is done, and after, its answer lost."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}
_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>try again</Message></Error>"


class FlakyStore:
    """Serves at `url`; `requests` and `failures` count."""

    def __init__(self, upstream: str, every: int = 10) -> None:
        self.upstream, self.every = urlsplit(upstream).netloc, every
        self.requests = self.failures = 0
        self._lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                failure = store.next_failure(self.command, self.path)
                if failure == "before":
                    return self._answer(503, [], _ERROR)
                connection = http.client.HTTPConnection(store.upstream, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if failure == "after":
                    return self._answer(500, [], _ERROR)
                length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
                return self._answer(answer.status, answer.getheaders(), content, length)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

            def _answer(
                self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None
            ) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_failure(self, command: str, path: str) -> str:
        """How this request fails: "before" it is passed on, "after", or not at all."""
        with self._lock:
            self.requests += 1
            if self.requests % self.every:
                return ""
            self.failures += 1
            return "before" if self.failures % 2 else "after"

    def __enter__(self) -> FlakyStore:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class LosesAnswers(FlakyStore):
    """Takes every commit of a Delta table and loses its answer, once each."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self._lost: set[str] = set()

    def next_failure(self, command: str, path: str) -> str:
        place = path.split("?")[0]
        if command != "PUT" or "/_delta_log/" not in place or place in self._lost:
            return ""
        self._lost.add(place)
        self.failures += 1
        return "after"
