"""A Hugging Face hub on loopback, for tests and for trying things out without the network.

`python -m tests.bundle.hub_server owner/name=FOLDER ...` serves those folders as models until it is interrupted.
"""

import os
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.bundle.hub_protocol import Handler
from tests.bundle.hub_repository import Repository


@dataclass
class Faults:
    """What goes wrong with the downloads of large files; numbers of bytes are for the next one only."""

    cut_after: int | None = None  # the connection breaks
    hold_after: int | None = None  # nothing more comes until `release` is set; `held` says that it is so
    missing: int | None = None  # the answer ends so many bytes early, and calls that its length
    wrong_sha256: bool = False  # another checksum is announced
    status: int | None = None  # every request is answered so
    listing: Any = None  # what every request is answered, as JSON
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Hub:
    """The server; it runs between `start` and `stop`, or inside `with`.

    `tokens` maps a token to its user; a user may write to `user/...`. `log` holds a line for each request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_ana": "ana", "hf_ben": "ben"}
        self.faults = Faults()
        self.log: list[str] = []

    def add(
        self, repo_id: str, folder: Path, revision: str = "main", *, gated: bool = False, private: bool = False
    ) -> str:
        """Make the files of a folder the next commit of a branch; the commit's hash."""
        repository = self.repositories.setdefault(repo_id, Repository(self.folder / repo_id))
        repository.gated, repository.private = gated, private
        files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir()}
        return repository.commit(revision, files)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The variables for a process whose hub this is and whose cache and login are in `home`."""
        others = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        # Xet is a protocol of its own, which this server does not speak; without it files travel as git-LFS has them.
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**kept, **ours, **more}

    def start(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        self.faults.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, Hub(Path(folder)) as hub:
        for argument in arguments:
            repo_id, _, source = argument.partition("=")
            hub.add(repo_id, Path(source))
        print(f"export HF_ENDPOINT={hub.endpoint} HF_HUB_DISABLE_XET=1 NO_PROXY=127.0.0.1", flush=True)
        hub.thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
