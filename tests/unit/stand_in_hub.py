"""A stand-in for the Hugging Face hub: the part of its protocol that a download uses, with faults to order.

Model info at a revision (sizes, git sha1 and LFS sha256), `resolve` with ETag, X-Repo-Commit and X-Linked-*, large
files by redirect to another path, byte ranges, X-Error-Code. It serves bytes that the test made and knows no other.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class File:
    """A file of the repository, and what is to go wrong with it."""

    data: bytes
    lfs: bool = False
    cut_after: int = 0  # close the connection after so many bytes of an answer ...
    cuts: int = 0  # ... that many times
    flip: bool = False  # serve one byte of it wrong
    claimed_size: int = 0  # what the listing says instead of the real size
    errors: list[int] = field(default_factory=list)  # answer these statuses first

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1


@dataclass
class StandInHub:
    repository: str
    revision: str
    files: dict[str, File]
    token: str = ""  # gated: only this token may read the files
    names_only: bool = False  # list names without sizes and checksums, as simple mirrors do
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, Range)

    def ranges(self, name: str) -> list[str]:
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(name)]

    @contextmanager
    def running(self, address: str = "127.0.0.1") -> Iterator["StandInHub"]:
        hub = self

        class Handler(_Handler):
            served = hub

        server = ThreadingHTTPServer((address, 0), Handler)
        self.url = f"http://{address}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name it has in the base class
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.served
        path = unquote(urlsplit(self.path).path).lstrip("/")
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("large/"):  # where the redirect leads; a signed address, no token
            self._file(path.removeprefix("large/"), hub.files[path.removeprefix("large/")])
        elif path.startswith("api/models/"):
            repository, _, revision = path.removeprefix("api/models/").partition("/revision/")
            if self._known(repository, revision, token):
                self._json(self._info())
        else:
            repository, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            if self._known(repository, revision, token):
                self._resolve(name, token)

    def _known(self, repository: str, revision: str, token: str) -> bool:
        hub = self.served
        if repository != hub.repository:
            # Strangers do not learn whether a repository exists.
            self._error(404 if token else 401, "RepoNotFound" if token else "")
        elif revision not in {hub.revision, "main"}:
            self._error(404, "RevisionNotFound")
        else:
            return True
        return False

    def _info(self) -> dict[str, Any]:
        hub = self.served
        siblings: list[dict[str, Any]] = []
        for name, file in hub.files.items():
            entry: dict[str, Any] = {"rfilename": name}
            if not hub.names_only:
                size = file.claimed_size or len(file.data)
                entry |= {"size": size, "blobId": file.git_sha1}
                if file.lfs:
                    entry["lfs"] = {"sha256": file.sha256, "size": size, "pointerSize": 134}
            siblings.append(entry)
        return {"id": hub.repository, "modelId": hub.repository, "sha": hub.revision, "siblings": siblings}

    def _resolve(self, name: str, token: str) -> None:
        hub = self.served
        file = hub.files.get(name)
        if file is None:
            self._error(404, "EntryNotFound")
        elif hub.token and token != hub.token:
            self._error(403 if token else 401, "GatedRepo")
        elif file.errors and self.command == "GET":
            self._error(file.errors.pop(0), "")
        elif file.lfs:
            self.send_response(302)
            self.send_header("Location", f"/large/{name}" if self.command == "GET" else f"{hub.url}/large/{name}")
            self.send_header("X-Repo-Commit", hub.revision)
            self.send_header("X-Linked-Size", str(len(file.data)))
            self.send_header("X-Linked-Etag", f'"{file.etag}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._file(name, file)

    def _file(self, name: str, file: File) -> None:
        data = file.data
        if file.flip:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", self.served.revision)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.cuts > 0 and len(body) > file.cut_after:
            file.cuts -= 1
            body = body[: file.cut_after]
            self.close_connection = True
        self.wfile.write(body)

    def _json(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
