"""A web server on the loopback interface that serves a folder with range requests, a log, and faults on request."""

import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class RangeServer:
    """Runs inside `with`. `log` has (method, path, range) of each request, the range as "first-last" or ""."""

    folder: Path
    log: list[tuple[str, str, str]] = field(default_factory=list)
    ignores_ranges: bool = False
    failures: int = 0  # of the next GET requests, answered with 503

    def __enter__(self) -> "RangeServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(self.folder)))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def ranges(self, suffix: str) -> list[tuple[str, str]]:
        """Path and range of each GET request for files of that suffix."""
        return [(path, given) for method, path, given in self.log if method == "GET" and path.endswith(suffix)]


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: RangeServer, *arguments, **options) -> None:
        self.owner = owner
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        given = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.owner.log.append(("GET", self.path, f"{given[1]}-{given[2]}" if given else ""))
        if self.owner.failures:
            self.owner.failures -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if given is None or self.owner.ignores_ranges or not path.is_file():
            super().do_GET()
            return
        size = path.stat().st_size
        first, last = int(given[1]), min(int(given[2]), size - 1)
        if first > last:
            self.send_error(416)
            return
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
        self.send_response(206)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.owner.log.append(("HEAD", self.path, ""))
        super().do_HEAD()

    def log_message(self, *_: object) -> None:
        pass
