"""What the Hugging Face hub answers to huggingface_hub about models whose large files are under git-LFS."""

import base64
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.bundle.hub_repository import LARGE, Repository, describe, git_sha1, sha256

if TYPE_CHECKING:
    from tests.bundle.hub_server import Hub

PIECE = 1 << 16


class Refusal(Exception):
    """An answer that is an error, as the hub words it in its headers."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    hub: "Hub"
    protocol_version = "HTTP/1.1"
    routes = (
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "store"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    )

    def handle_request(self) -> None:
        self.body = self.read_body()
        self.hub.log.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        try:
            if self.hub.faults.status:
                raise Refusal(self.hub.faults.status, "", "the hub is being mended")
            if self.hub.faults.listing is not None:
                return self.send_json(self.hub.faults.listing)
            for method, pattern, name in self.routes:
                if method == self.command and (match := re.fullmatch(pattern, urlsplit(self.path).path)):
                    return getattr(self, name)(*(part and unquote(part) for part in match.groups()))
            raise Refusal(404, "", "no such page")
        except Refusal as refusal:
            self.send_json({"error": refusal.message}, refusal.status, **refusal.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET = do_POST = do_PUT = handle_request

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.find(repo_id)
        if repository.gated and self.user() not in repository.granted:
            message = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise Refusal(403 if self.user() else 401, "GatedRepo", message)
        commit = self.find_commit(repository, revision)
        path = repository.files(commit).get(name)
        if path is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(path.read_bytes())}"', "Accept-Ranges": "bytes"}
        faults, size, start = self.hub.faults, path.stat().st_size, 0
        if path.suffix in LARGE:
            digest = "0" * 64 if faults.wrong_sha256 else sha256(path.read_bytes())
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(size)}
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(span[1])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        troubled = self.command == "GET" and path.suffix in LARGE
        end = size - (faults.missing or 0) if troubled else size
        self.send_response(206 if start else 200)
        self.send_headers(end - start, **headers)
        if self.command == "GET":
            self.send_file(path, start, end, troubled)

    def send_file(self, path: Path, start: int, end: int, troubled: bool) -> None:
        faults, cut, hold = self.hub.faults, None, None
        if troubled:
            cut, hold = faults.cut_after, faults.hold_after
            faults.cut_after = faults.hold_after = faults.missing = None
        stop = min(end, start + next((count for count in (cut, hold) if count is not None), end))
        with path.open("rb") as file:
            file.seek(start)
            while file.tell() < stop:
                self.wfile.write(file.read(min(PIECE, stop - file.tell())))
            if hold is not None:
                faults.held.set()
                faults.release.wait(60)
                self.wfile.write(file.read(end - file.tell()))
        if cut is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def info(self, repo_id: str, revision: str | None) -> None:
        repository = self.find(repo_id)
        commit = self.find_commit(repository, revision or "main") if revision or repository.branches else None
        files = repository.files(commit) if commit else {}
        siblings = [describe("rfilename", "sha256", name, path) for name, path in files.items()]
        about = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
        self.send_json({**about, "private": repository.private, "gated": "manual" if repository.gated else False})

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self.find(repo_id)
        files = repository.files(self.find_commit(repository, revision))
        self.send_json([{"type": "file", **describe("path", "oid", name, path)} for name, path in files.items()])

    def validate(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or self.user()}/{asked['name']}"
        self.check_writer(repo_id)
        known = repo_id in self.hub.repositories
        if not known:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[repo_id] = Repository(self.hub.folder / repo_id, private=private)
        problem = {"error": "You already created this model repo"} if known else {}
        self.send_json({"url": f"{self.hub.endpoint}/{repo_id}", **problem}, 409 if known else 200)

    def branch(self, repo_id: str, branch: str) -> None:
        self.check_writer(repo_id)
        repository = self.find(repo_id)
        if branch in repository.branches:
            raise Refusal(409, "", "Reference already exists")
        if "main" in repository.branches:
            repository.branches[branch] = repository.branches["main"]
        self.send_json({})

    def preupload(self, repo_id: str, branch: str) -> None:
        self.check_writer(repo_id)
        repository = self.find(repo_id)
        held = repository.files(repository.branches[branch]) if branch in repository.branches else {}
        files = []
        for asked in json.loads(self.body)["files"]:
            name, mode = asked["path"], "lfs" if Path(asked["path"]).suffix in LARGE else "regular"
            digest = (sha256 if mode == "lfs" else git_sha1)(held[name].read_bytes()) if name in held else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": digest})
        self.send_json({"files": files})

    def batch(self, repo_id: str) -> None:
        self.check_writer(repo_id)
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if not (self.hub.folder / "lfs" / each["oid"]).exists():
                each["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def store(self, digest: str) -> None:
        if sha256(self.body) != digest:
            raise Refusal(400, "", "the bytes are not those of the checksum")
        folder = self.hub.folder / "lfs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / digest).write_bytes(self.body)
        self.send_json({})

    def commit(self, repo_id: str, branch: str) -> None:
        self.check_writer(repo_id)
        files: dict[str, bytes | Path | None] = {}
        for line in self.body.splitlines():
            key, value = (part := json.loads(line))["key"], part["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.folder / "lfs" / value["oid"]
            elif key == "deletedFile":
                files[value["path"]] = None
        commit = self.find(repo_id).commit(branch, files)
        self.send_json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}", "commitOid": commit})

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def check_writer(self, repo_id: str) -> None:
        if self.user() is None:
            raise Refusal(401, "", "Invalid username or password.")
        if self.user() != repo_id.partition("/")[0]:
            raise Refusal(403, "", f"You don't have the rights to write to {repo_id}")

    def find(self, repo_id: str) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.partition("/")[0]):
            # To strangers the hub does not tell what is private from what is not there.
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def find_commit(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if not (repository.folder / commit).is_dir():
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_headers(len(text), **headers, **{"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(text)

    def send_headers(self, length: int, **headers: str) -> None:
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """The hub's own log takes its place."""
