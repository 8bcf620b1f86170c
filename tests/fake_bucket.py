"""A server of Google Cloud Storage's JSON API in this process, with objects in memory and faults on demand.

It has what the clients of the commands ask for: objects with generations and their preconditions, lists by prefix and
delimiter, downloads of ranges, uploads in one piece, of two parts or resumable, copies, deletions, batches.
https://cloud.google.com/storage/docs/json_api/v1 describes each of them.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import random
import re
import shutil
import socket
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# As the commands have it, and before anything imports gcsfs.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
gcsfs = pytest.importorskip("gcsfs", reason="gs:// paths need the extra gcs")
google_crc32c = pytest.importorskip("google_crc32c")

_OBJECTS = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.*))?$")
_MOVES = re.compile(r"([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)$")
_CHANGES = ("POST", "PUT", "DELETE", "PATCH")


@dataclasses.dataclass
class Object:
    content: bytes
    generation: int
    kind: str = "application/octet-stream"
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    time: str = ""

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        crc = google_crc32c.value(self.content).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": self.kind,
            "size": str(len(self.content)),
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "crc32c": base64.b64encode(crc).decode(),
            "etag": f"E{self.generation}",
            "storageClass": "STANDARD",
            "timeCreated": self.time,
            "updated": self.time,
            **({"metadata": self.metadata} if self.metadata else {}),
        }


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass
class Faults:
    """What goes wrong. share: of requests that get a 503 or lose their connection, before or after they are done.

    delay: seconds before each answer. stop_at: the number of the change, from 1, after which nothing is answered any
    more; it is done itself if `stop_done`. on_stop: called then. refuse: requests get this status and reason.
    """

    share: float = 0.0
    delay: float = 0.0
    stop_at: int = 0
    stop_done: bool = False
    on_stop: Callable[[], None] = lambda: None
    refuse: tuple[int, str] | None = None


class Bucket:
    """The server: `url`, the `objects` of its `buckets`, counted `requests` and how many of them were `changes`."""

    def __init__(self, *buckets: str, seed: int = 0):
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets or ("bucket",)}
        self.faults, self.requests, self.changes, self.failed = Faults(), Counter(), 0, 0
        self.bytes: Counter[str] = Counter()
        self._uploads: dict[str, dict[str, Any]] = {}
        self._lock, self._random, self._generation = threading.RLock(), random.Random(seed), 1_700_000_000_000_000
        self._stopped = False
        outer = self

        class Handler(_Handler):
            bucket = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # Clients that are killed reset their connections.
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What points the clients here: gcsfs and Google's own by the first, TensorStore by the others."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "project",
        }

    # ---- for tests

    def __getitem__(self, name: str) -> bytes:
        return self.buckets["bucket"][name].content

    def names(self, prefix: str = "") -> list[str]:
        with self._lock:
            return sorted(name for name in self.buckets["bucket"] if name.startswith(prefix))

    def put(self, name: str, content: bytes) -> None:
        with self._lock:
            self._store("bucket", name, content, {}, "application/octet-stream", {})

    def state(self) -> dict[str, bytes]:
        """All objects as they are now."""
        with self._lock:
            return {name: held.content for name, held in self.buckets["bucket"].items()}

    @contextlib.contextmanager
    def failing(self, **faults: Any) -> Iterator[Faults]:
        before, self.faults, self.changes, self._stopped = self.faults, Faults(**faults), 0, False
        try:
            yield self.faults
        finally:
            self.faults, self._stopped = before, False

    # ---- one request

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body). Raises Refused, or ConnectionError where the connection breaks."""
        url = urllib.parse.urlsplit(target)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        with self._lock:
            if self._stopped:
                raise ConnectionError
            self.requests[method] += 1
            self.bytes["in"] += len(body)
            faults = self.faults
            chance = self._random.random()
            broken = chance < faults.share
            way = self._random.randrange(3) if broken else -1
            self.failed += broken
            if faults.refuse:
                raise Refused(*faults.refuse)
            if way == 0:
                raise Refused(503, "Backend Error")
            if way == 1:
                raise ConnectionError
            if method in _CHANGES:
                self.changes += 1
                if self.changes == faults.stop_at:
                    self._stopped = True
                    if faults.stop_done:
                        with contextlib.suppress(Refused):  # Some ask to delete what is not there.
                            self._route(method, url.path, query, headers, body)
                    faults.on_stop()
                    raise ConnectionError
            found = self._route(method, url.path, query, headers, body)
            if way == 2:
                raise ConnectionError
        if faults.delay:
            time.sleep(faults.delay)
        self.bytes["out"] += len(found[2])
        return found

    def _route(self, method, path, query, headers, body):
        if path.startswith("/batch/"):
            return self._batch(headers, body)
        if path.startswith("/upload/"):
            bucket = urllib.parse.unquote(path.split("/b/")[1].split("/")[0])
            return self._upload(method, bucket, query, headers, body)
        if match := _OBJECTS.match(path):
            bucket = urllib.parse.unquote(match[1])
            if bucket not in self.buckets:
                raise Refused(404, "The specified bucket does not exist.")
            if not match[2]:
                return self._list(bucket, query)
            if method == "POST":
                return self._copy(bucket, match[2], query)
            return self._object(method, bucket, urllib.parse.unquote(match[2]), query, headers, body, path)
        if match := re.match(r"/storage/v1/b/([^/]+)(/storageLayout)?$", path):
            if match[1] not in self.buckets:
                raise Refused(404, "The specified bucket does not exist.")
            return _json({"kind": "storage#bucket", "name": match[1], "id": match[1], "locationType": "region"})
        raise Refused(400, f"{method} {path} is unknown here")

    def _check(self, held: Object | None, query: dict[str, str]) -> None:
        found = held.generation if held else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != found:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "generation" in query and int(query["generation"]) != found:
            raise Refused(404, "No such object")

    def _store(self, bucket, name, content, query, kind, metadata) -> Object:
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        self._check(self.buckets[bucket].get(name), query)
        self._generation += 1
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        held = self.buckets[bucket][name] = Object(bytes(content), self._generation, kind, metadata, now)
        return held

    def _object(self, method, bucket, name, query, headers, body, path):
        held = self.buckets[bucket].get(name)
        if method == "DELETE":
            self._check(held, query)
            if held is None:
                raise Refused(404, f"No such object: {bucket}/{name}")
            del self.buckets[bucket][name]
            return 204, {}, b""
        if held is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        self._check(held, query)
        if query.get("ifGenerationNotMatch") == str(held.generation):
            return 304, {}, b""
        if method == "PATCH":
            held.metadata |= json.loads(body or b"{}").get("metadata") or {}
        elif query.get("alt") == "media" or path.startswith("/download/"):
            return self._media(held, headers)
        return _json(held.resource(bucket, name))

    def _media(self, held: Object, headers):
        crc = base64.b64encode(google_crc32c.value(held.content).to_bytes(4, "big")).decode()
        md5 = base64.b64encode(hashlib.md5(held.content).digest()).decode()
        found = {
            "Content-Type": held.kind,
            "x-goog-generation": str(held.generation),
            "x-goog-hash": f"crc32c={crc},md5={md5}",
            "x-goog-stored-content-length": str(len(held.content)),
            "ETag": f"E{held.generation}",
        }
        asked = re.match(r"bytes=(\d*)-(\d*)$", headers.get("Range", ""))
        if not asked:
            return 200, found, held.content
        size = len(held.content)
        if asked[1]:
            start, end = int(asked[1]), min(int(asked[2]), size - 1) if asked[2] else size - 1
        else:
            start, end = max(0, size - int(asked[2])), size - 1
        if start >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        return 206, found | {"Content-Range": f"bytes {start}-{end}/{size}"}, held.content[start : end + 1]

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after, until = query.get("startOffset", ""), query.get("endOffset", "")
        entries: dict[str, Any] = {}
        for name in sorted(self.buckets[bucket]):
            if not name.startswith(prefix) or name < after or (until and name >= until):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            if cut >= 0:
                entries[name[: cut + len(delimiter)]] = None
            else:
                entries[name] = self.buckets[bucket][name].resource(bucket, name)
        limit = int(query.get("maxResults") or 1000)
        keys = [key for key in entries if key > query.get("pageToken", "")]
        page = keys[:limit]
        found: dict[str, Any] = {"kind": "storage#objects"}
        if items := [entries[key] for key in page if entries[key]]:
            found["items"] = items
        if prefixes := [key for key in page if not entries[key]]:
            found["prefixes"] = prefixes
        if len(keys) > limit:
            found["nextPageToken"] = page[-1]
        return _json(found)

    def _copy(self, bucket, rest, query):
        if match := _MOVES.match(rest):
            source, target, name = map(urllib.parse.unquote, match.groups())
            held = self.buckets[bucket].get(source)
            if held is None:
                raise Refused(404, f"No such object: {bucket}/{source}")
            made = self._store(target, name, held.content, query, held.kind, dict(held.metadata))
            size = str(len(held.content))
            resource = made.resource(target, name)
            if "/copyTo/" in rest:
                return _json(resource)
            return _json({"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": resource})
        raise Refused(400, "neither a copy nor a rewrite")

    # ---- uploads

    def _upload(self, method, bucket, query, headers, body):
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        kind = query.get("uploadType")
        if "upload_id" in query:
            return self._piece(method, query["upload_id"], headers, body)
        if kind == "media":
            content_type = headers.get("Content-Type", "application/octet-stream")
            return self._stored(bucket, query["name"], body, query, content_type, {})
        if kind == "multipart":
            about, (part_type, content) = _parts(headers, body)
            about = json.loads(about[1] or b"{}")
            name = about.get("name") or query["name"]
            return self._stored(bucket, name, content, query, part_type, about.get("metadata") or {})
        if kind == "resumable":
            about = json.loads(body or b"{}")
            name = about.get("name") or query["name"]
            self._check(self.buckets[bucket].get(name), query)
            number = f"upload{len(self._uploads)}"
            self._uploads[number] = {"bucket": bucket, "name": name, "query": query, "about": about, "content": b""}
            path = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return 200, {"Location": f"{self.url}{path}"}, b""
        raise Refused(400, f"uploadType={kind} is none")

    def _piece(self, method, number, headers, body):
        upload = self._uploads.get(number)
        if upload is None:
            raise Refused(410, "The upload session is gone.")
        if method == "DELETE":
            del self._uploads[number]
            return 499, {}, b""
        where = headers.get("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
        match = re.match(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$", where)
        done = len(upload["content"])
        if match[1] is not None:
            start = int(match[1])
            if start > done:
                raise Refused(400, f"Invalid request. Byte {start} is sent, and {done} are there.")
            upload["content"] += body[done - start :]  # What was sent twice counts once.
        done = len(upload["content"])
        if match[3] != "*" and done == int(match[3]):
            about = upload["about"]
            found = self._stored(
                upload["bucket"],
                upload["name"],
                upload["content"],
                upload["query"],
                about.get("contentType", "application/octet-stream"),
                about.get("metadata") or {},
            )
            upload["query"] = {"ifGenerationMatch": json.loads(found[2])["generation"]}  # Asked again: the same object.
            return found
        return 308, {"Range": f"bytes=0-{done - 1}"} if done else {}, b""

    def _stored(self, bucket, name, content, query, kind, metadata):
        return _json(self._store(bucket, name, content, query, kind, metadata).resource(bucket, name))

    def _batch(self, headers, body):
        boundary = re.search(r'boundary="?([^";]+)"?', headers["Content-Type"])[1]
        answers = []
        for part in body.split(f"--{boundary}".encode())[1:-1]:
            outer, inner = part.strip(b"\r\n").replace(b"\r\n", b"\n").split(b"\n\n", 1)
            number = re.search(rb"Content-ID: <?([^>\n]+)>?", outer, re.I)
            method, target, *_ = inner.split(b"\n", 1)[0].decode().split()
            url = urllib.parse.urlsplit(target)
            query = dict(urllib.parse.parse_qsl(url.query))
            try:
                status, _, text = self._route(method, url.path, query, {}, b"")
            except Refused as error:
                status, text = error.status, _error(error)
            identity = f"response-{number[1].decode()}" if number else "response"
            answers.append(
                f"--answer\r\nContent-Type: application/http\r\nContent-ID: <{identity}>\r\n\r\n"
                f"HTTP/1.1 {status} {'OK' if status < 400 else 'Not'}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(text)}\r\n\r\n{text.decode()}\r\n"
            )
        text = "".join([*answers, "--answer--\r\n"]).encode()
        return 200, {"Content-Type": "multipart/mixed; boundary=answer"}, text


def _parts(headers, body: bytes) -> list[tuple[str, bytes]]:
    """[(type, content)] of a body of type multipart/related."""
    boundary = re.search(r"boundary=['\"]?([^'\";]+)['\"]?", headers["Content-Type"])[1].encode()
    found = []
    for part in re.split(b"\r?\n?--" + re.escape(boundary) + b"(?:--)?\r?\n?", body):
        if part.strip():
            head, _, content = re.split(rb"(\r\n\r\n|\n\n)", part, maxsplit=1)
            kind = re.search(rb"content-type:\s*([^\r\n]+)", head, re.I)
            found.append((kind[1].decode() if kind else "application/octet-stream", content))
    return found


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode()


def _error(error: Refused) -> bytes:
    entry = {"message": error.message, "domain": "global", "reason": "error"}
    return json.dumps({"error": {"code": error.status, "message": error.message, "errors": [entry]}}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def _do(self) -> None:
        body = self._body()
        try:
            status, headers, content = self.bucket.answer(self.command, self.path, self.headers, body)
        except Refused as error:
            status, headers, content = error.status, {"Content-Type": "application/json"}, _error(error)
        except ConnectionError:
            self.close_connection = True
            with contextlib.suppress(OSError):
                # A reset, not an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            return
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _do

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(*buckets: str, seed: int = 0) -> Iterator[Bucket]:
    """A server for the block, which the clients of this process and of those that it starts talk to."""
    import fsspec
    from etils.epath import backend

    from balcap_jax.cli import bucket, storage

    def forget() -> None:
        for cached in (bucket._client, bucket._store):
            cached.cache_clear()
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        gcsfs.core.GCSFileSystem.clear_instance_cache()
        fsspec.config.conf.clear()
        storage._remote.clear()
        storage._here.clear()
        if bucket._root is not None:
            for path in bucket._root.iterdir():
                shutil.rmtree(path)

    server = Bucket(*buckets, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        forget()
        try:
            yield server
        finally:
            forget()
            server.close()
