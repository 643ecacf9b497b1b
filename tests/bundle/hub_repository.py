"""The repositories of the hub on loopback: commits of files, and the checksums that the hub has for each file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGE = {".safetensors", ".bin"}  # kept under git-LFS, as the hub does


@dataclass
class Repository:
    """Commits lie in folders of their own: `folder/<commit>/<file>`."""

    folder: Path
    gated: bool = False
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)

    def commit(self, branch: str, changes: Mapping[str, bytes | Path | None]) -> str:
        """A new commit with the files of the branch's last one and these, without those that are None; its hash."""
        changed = {**(self.files(self.branches[branch]) if branch in self.branches else {}), **changes}
        files = {name: content for name, content in changed.items() if content is not None}
        digests = {name: git_sha1(read(content)) for name, content in files.items()}
        state = json.dumps([sorted(digests.items()), self.branches.get(branch)])
        commit = hashlib.sha1(state.encode()).hexdigest()
        for name, content in files.items():
            path = self.folder / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read(content))
        self.branches[branch] = commit
        return commit

    def files(self, commit: str) -> dict[str, Path]:
        folder = self.folder / commit
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def describe(name_key: str, digest_key: str, name: str, path: Path) -> dict[str, Any]:
    """A file in a listing, with the checksum of what git-LFS keeps."""
    content, size = path.read_bytes(), path.stat().st_size
    about = {name_key: name, "size": size, "blobId": git_sha1(content), "oid": git_sha1(content)}
    large = {"lfs": {digest_key: sha256(content), "size": size, "pointerSize": 134}}
    return {**about, **(large if path.suffix in LARGE else {})}


def read(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
