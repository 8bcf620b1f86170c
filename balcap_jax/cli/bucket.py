"""Objects of Google Cloud Storage, asked for one by one: gs:// paths, lists, whole objects and ranges.

An object is replaced in one step, a reader meets the old or the new one, and there is neither a directory nor a
renaming. gcsfs sends what is small, TensorStore reads ranges; both try again after errors of the server or the network,
and this module goes on for _PATIENCE seconds. Paths of this machine that stand for objects are below `root()`.
"""

import atexit
import base64
import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from balcap_jax.cli.errors import UserError

SCHEME = "gs://"
_URL = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/+(.*))?$", re.DOTALL)
_FOLDER = "balcap"  # in the directory of temporary files; the user's id follows
_PATIENCE = 300.0  # seconds, beyond gcsfs's own half minute, in which a bucket that fails is asked again
_PAUSE = 5.0
_PAGE = 1000
_FIELDS = "nextPageToken,prefixes,items(name,size,crc32c,generation)"
# The second is for Orbax, which asks what kind of bucket it is.
_ROLES = "the roles storage.objectUser and storage.legacyBucketReader"
MAKE_ROOM = "make room there, or set TMPDIR to a directory on another disk"
_LOOK_AT = "look at this machine's network, at the bucket's name, and at STORAGE_EMULATOR_HOST if that is set"
_INSTALL = "a gs:// path needs gcsfs; install it with `pip install 'balcap-jax[gcs]'`, or mount the bucket"


class BucketError(UserError):
    """A bucket that is not there, refuses, or does not answer."""


class Changed(Exception):
    """The object is not, or no longer, of the generation that was asked for."""


@dataclasses.dataclass(frozen=True)
class Object:
    """An object's place and what the server says of it; `crc` is its CRC-32C in base64."""

    url: str
    size: int
    crc: str
    generation: int


# ---- paths -----------------------------------------------------------------------------------------------------------


def is_url(text: str) -> bool:
    return text.startswith(SCHEME)


def split(url: str) -> tuple[str, str]:
    """(bucket, key) of gs://bucket/key. Raises UserError for what is none."""
    match = _URL.match(url)
    parts = (match[2] or "").split("/") if match else []
    if not match or any(part in (".", "..") for part in parts) or not all(map(str.isprintable, parts)):
        raise UserError(f"{url!r} is no place in a bucket; write gs://BUCKET/FOLDER, without . and ..")
    return match[1], "/".join(filter(None, parts))


def local(url: str) -> Path:
    """The path on this machine that stands for a gs:// path. Raises UserError for a URL that is none, or no gcsfs."""
    bucket, key = split(url)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{url}: {_INSTALL}")
    return root() / bucket / key


def url_of(path: str | os.PathLike) -> str | None:
    """The gs:// path that a path of this machine stands for; None for any other."""
    if _root is None or not Path(path).is_relative_to(_root) or Path(path) == _root:
        return None
    return SCHEME + Path(path).relative_to(_root).as_posix()


def shown(text: Any) -> str:
    """A text, such as a path or a message, in which gs:// paths have the names that users know."""
    return str(text) if _root is None else str(text).replace(f"{_root}/", SCHEME)


_root: Path | None = None
_is_kept = False


def root() -> Path:
    """The directory of this process, one level above its buckets; made at the first call, removed at the end.

    Raises:
      UserError: there is no room for temporary files.
    """
    global _root
    if _root is None:
        folder = Path(tempfile.gettempdir(), f"{_FOLDER}-{os.getuid()}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "it is another user's")
            _remove_dead(folder)
            # Hidden until it is held: other processes remove what nobody holds.
            new = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            alive = os.open(new / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Until the process ends, however it does.
            (new / "gs").mkdir()
            own = new.rename(folder / f"{os.getpid()}-{new.name[1:]}")
        except OSError as error:
            raise UserError(
                f"a gs:// path needs room for files on this machine, and {folder} cannot be used ({error.strerror}); "
                "set TMPDIR to a directory that can be written"
            ) from error
        _root = own / "gs"
        atexit.register(_remove_own, os.getpid())
    return _root


def copies() -> Path:
    """The directory of this machine, for all processes of the user, in which copies lie while a command runs."""
    return root().parents[1]


def _forget_root() -> None:
    global _root
    _root = None


os.register_at_fork(after_in_child=_forget_root)  # It is the parent's, who removes it.


def keep_root() -> Path:
    """Leaves the files of this process where they are when it ends: what could not be uploaded. -> where that is"""
    global _is_kept
    _is_kept, place = True, root().parent / "unsent"
    if not place.exists():
        place.symlink_to("gs")  # Another name than the one that `shown` takes for the bucket's.
    return place


def _remove_own(process: int) -> None:
    if os.getpid() == process and _root is not None and not _is_kept:
        shutil.rmtree(_root.parent, ignore_errors=True)


def _remove_dead(folder: Path) -> None:
    """Removes what killed processes have left; what is in their buckets is all that a later one reads."""
    for other in folder.glob("[!.]*"):
        with contextlib.suppress(OSError):
            if (other / "unsent").exists():
                continue
            descriptor = os.open(other / "alive", os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)
            finally:
                os.close(descriptor)


# ---- requests --------------------------------------------------------------------------------------------------------

_CONNECT, _SILENCE = 5.0, 15.0  # seconds in a block of `patience`: to reach the server, and without a byte of it


class _Block:
    """Of `patience`: how long a request is repeated, and the error of the first that was given up."""

    def __init__(self, seconds: float):
        self.seconds, self.given_up = seconds, None


_block: _Block | None = None


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """For the block: a request that fails is repeated for at most so many seconds, without gcsfs's own tries.

    After the first that is given up none is sent again: each fails at once, for the same reason.
    """
    global _block
    before, _block = _block, _Block(seconds)
    try:
        yield
    finally:
        _block = before


@functools.cache
def _client() -> Any:
    # Without this gcsfs asks another service of Google's first what kind of bucket each is, at every name.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec
    from gcsfs.core import GCSFileSystem

    # Other processes, and TensorStore in this one, change objects: no list may be remembered, neither by Orbax's own.
    for name in ("gs", "gcs"):
        settings = fsspec.config.conf.setdefault(name, {})
        settings["use_listings_cache"] = False
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            settings["token"] = "anon"  # As Google's own client does: to look for credentials takes seconds.
    for name in ("gcsfs", "gcsfs.retry", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # They log what is raised, too.
    client = GCSFileSystem(use_listings_cache=False)
    client._request = functools.partial(_request, client)
    return client


async def _request(client: Any, *args: Any, **query: Any) -> Any:
    """As gcsfs sends a request; in a block of `patience` once, and within seconds."""
    if _block is None:
        client.requests_timeout = None
        return await type(client)._request(client, *args, **query)
    import aiohttp

    # gcsfs tries six times with pauses of half a minute in all, and each lasts until the system gives up.
    client.requests_timeout = aiohttp.ClientTimeout(connect=_CONNECT, sock_read=_SILENCE)
    return await type(client)._request.__wrapped__(client, *args, **query)


def _asked(url: str, ask: Callable[[Any], Any]) -> Any:
    """What `ask(client)` gives, which is repeated while the server or the network fails.

    Raises:
      FileNotFoundError: the object is not there. Changed: a precondition does not hold.
      BucketError: the bucket is not there, refuses, or has not answered.
    """
    client, block = _client(), _block
    if block is not None and block.given_up is not None:
        raise _failure(url, block.given_up) from block.given_up
    seconds, pause = (_PATIENCE, _PAUSE) if block is None else (block.seconds, min(_PAUSE, 1.0))
    start = time.monotonic()
    while True:
        try:
            return ask(client)
        except FileExistsError as error:  # What gcsfs makes of status 412.
            raise Changed(url) from error
        except FileNotFoundError:
            raise
        except Exception as error:
            is_passing = _is_passing(error)
            if not is_passing or time.monotonic() - start >= seconds:
                if block is not None and is_passing:
                    block.given_up = error
                raise _failure(url, error) from error
        time.sleep(pause)


def _is_passing(error: Exception) -> bool:
    """Whether it may go away by itself."""
    from gcsfs.retry import is_retriable

    code = str(getattr(error, "code", ""))
    is_network = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("aiohttp")
    return code != "401" and (is_retriable(error) or is_network)


def _failure(url: str, error: Exception) -> BucketError:
    text, code = " ".join(str(error).split()), str(getattr(error, "code", ""))
    where = f"gs://{split(url)[0]}"
    if code == "401" or "default credentials" in text or type(error).__module__.startswith("google.auth"):
        return BucketError(
            f"{where} asks for credentials, and there are none that it takes; run `gcloud auth application-default "
            f"login`, or give this machine a service account with {_ROLES} ({text[:200]})"
        )
    if code == "403" or text.startswith("Forbidden"):
        return BucketError(f"{url}: access is denied; give this account {_ROLES} on {where} ({text[-200:]})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BucketError(f"{url}: a copy of it has no room in {copies()} ({error.strerror}); {MAKE_ROOM}")
    remedy = "what is in the bucket is whole, run the same command again" if _block is None else _LOOK_AT
    reason = ": ".join(filter(None, (type(error).__name__, text[:200])))  # A time limit has no text.
    return BucketError(f"{url} cannot be reached ({reason}); {remedy}")


def _missing(bucket: str) -> BucketError:
    return BucketError(f"there is no bucket gs://{bucket}; make it, or mend its name")


def check(url: str) -> None:
    """Raises BucketError where the bucket is not there, or does not let itself be read."""
    bucket, key = split(url)
    try:
        _asked(url, lambda client: client.call("GET", "b/{}/o", bucket, prefix=key, maxResults=1))
    except FileNotFoundError as error:
        raise _missing(bucket) from error


def objects(url: str, *, deep: bool = True) -> list[Object]:
    """The object `url` itself, and all below `url`/, or right below it, by name. Raises BucketError."""
    bucket, key = split(url)
    found, token = [], None
    while True:
        page = _page(bucket, url, prefix=f"{key}/" if key else "", delimiter=None if deep else "/", pageToken=token)
        # A name that ends in / stands for an empty folder: other programs make some.
        found += [_object(bucket, item) for item in page.get("items", ()) if not item["name"].endswith("/")]
        token = page.get("nextPageToken")
        if not token:
            break
    own = stat(url) if key else None
    return [own, *found] if own else found


def children(url: str) -> list[str]:
    """The names right below `url`/, those of objects and those that only begin others' names. Raises BucketError."""
    bucket, key = split(url)
    prefix, names, token = f"{key}/" if key else "", [], None
    while True:
        page = _page(bucket, url, prefix=prefix, delimiter="/", pageToken=token)
        names += [item["name"] for item in page.get("items", ())]
        names += [name.rstrip("/") for name in page.get("prefixes", ())]
        token = page.get("nextPageToken")
        if not token:
            return sorted({name.removeprefix(prefix) for name in names} - {""})


def _page(bucket: str, url: str, **query: Any) -> dict[str, Any]:
    query |= {"maxResults": _PAGE, "fields": _FIELDS}
    try:
        return _asked(url, lambda client: client.call("GET", "b/{}/o", bucket, json_out=True, **query))
    except FileNotFoundError as error:
        raise _missing(bucket) from error


def _object(bucket: str, item: Mapping[str, Any]) -> Object:
    url = f"{SCHEME}{bucket}/{item['name']}"
    return Object(url, int(item["size"]), item.get("crc32c", ""), int(item["generation"]))


def stat(url: str) -> Object | None:
    """The object; None where there is none. Raises BucketError."""
    bucket, key = split(url)
    try:
        return _object(bucket, _asked(url, lambda client: client.call("GET", "b/{}/o/{}", bucket, key, json_out=True)))
    except FileNotFoundError:
        return None


def read(url: str) -> bytes:
    """A whole object. Raises FileNotFoundError, BucketError."""
    return _asked(url, lambda client: client.cat_file(url))


def download(entry: Object, path: Path) -> int:
    """Copies an object to a file of this machine, which is there whole or not at all; returns its generation.

    The checksum is compared. Where the object was replaced since `entry` was seen, it is the newer one that is copied.

    Raises:
      FileNotFoundError: it is not there any more. BucketError, OSError.
    """
    url = entry.url
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=".fetched-", dir=path.parent)
    os.close(handle)
    try:
        while True:
            _asked(url, lambda client: client.get_file(url, aside, concurrency=1))
            if checksum(Path(aside)) == entry.crc:
                break
            now = stat(url)
            if now is None:
                raise FileNotFoundError(url)
            if now.generation == entry.generation:
                raise BucketError(f"{url} came with other bytes than the bucket holds; run the same command again")
            entry = now
        os.replace(aside, path)
        return entry.generation
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def read_range(url: str, start: int, size: int) -> bytes:
    """`size` bytes from `start` on. Raises FileNotFoundError, and BucketError where the object has fewer."""
    bucket, key = split(url)
    try:
        found = _store(bucket).read(key, byte_range=slice(start, start + size)).result()
    except ValueError as error:
        raise BucketError(f"{url} cannot be read ({' '.join(str(error).split())[:300]}); run it again") from error
    if found.state != "value":
        raise FileNotFoundError(url)
    return found.value


@functools.cache
def _store(bucket: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket}).result()


def write(url: str, content: bytes, generation: int | None = None) -> int:
    """Replaces an object in one step; returns its generation.

    `generation`: of the object that may be replaced, 0 = of none; None = whatever is there.

    Raises:
      Changed: another object is there. BucketError.
    """
    bucket, key = split(url)
    condition = {} if generation is None else {"ifGenerationMatch": str(generation)}
    query = {"name": key, "uploadType": "media"} | condition
    place = "/upload/storage/v1/b/{}/o"

    def ask(client: Any) -> dict[str, Any]:
        address = client._location + place
        return client.call("POST", address, bucket, data=content, json_out=True, **query)

    try:
        return int(_asked(url, ask)["generation"])
    except FileNotFoundError as error:
        raise _missing(bucket) from error


def upload(path: Path, url: str) -> None:
    """Replaces an object by a file, in one step; the server's checksum is compared. Raises OSError, BucketError."""
    try:
        _asked(url, lambda client: client.put_file(os.fspath(path), url, consistency="md5"))
    except FileNotFoundError as error:
        if not path.exists():
            raise
        raise _missing(split(url)[0]) from error


def delete(url: str, generation: int | None = None) -> None:
    """Deletes an object where it is there. Raises Changed where it is of another generation, BucketError."""
    bucket, key = split(url)
    condition = {} if generation is None else {"ifGenerationMatch": str(generation)}
    with contextlib.suppress(FileNotFoundError):
        _asked(url, lambda client: client.call("DELETE", "b/{}/o/{}", bucket, key, **condition))


def copy(source: str, target: str) -> None:
    """Copies an object within the buckets, however large. Raises FileNotFoundError, BucketError."""
    _asked(source, lambda client: client.cp_file(source, target))


def checksum(path: Path) -> str:
    """The CRC-32C of a file in base64, as `Object.crc`. Raises OSError."""
    import google_crc32c

    value = google_crc32c.Checksum()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value.update(piece)
    return base64.b64encode(value.digest()).decode()
