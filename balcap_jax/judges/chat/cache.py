"""Keeps answers of judges on disk, so that no question is paid for twice: a resumed run asks none of them again.

One SQLite file that several processes of a machine may use at once. It must lie on a disk of that machine: SQLite's
write-ahead log needs shared memory, which network disks do not give.
"""

import contextlib
import logging
import sqlite3
import time

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved

_FILE = "answers.sqlite3"
_BUSY_SECONDS = 5.0  # Requests under way stand still meanwhile.
_PAUSE = 60.0  # seconds for which a cache that failed is left alone
_CHECK_SHARE = 0.05  # of the allowed size that is put in between looks at the size
_KEPT_SHARE = 0.9  # of the allowed size, when it has been passed
_USED_AGAIN = 3600.0  # seconds after which a use is noted: a write for each read would be dear
_OVERHEAD = 200  # bytes of a row beside its text: key, indices, page fill

_log = logging.getLogger(__name__)


class AnswerFile:
    """At most `gigabytes` of answers, as JSON text by key, in the directory `folder`. Failures are never put in.

    The answers not used for longest are dropped first.

    Raises UserError when the directory cannot be written to, or holds another file under the name. A disk that fails
    later costs answers kept, not the run: one line on stderr says so.
    """

    def __init__(self, folder: str, gigabytes: float):
        self.path = resolved(folder) / _FILE
        storage.refuse(self.path, "the judge's answers (judge.cache_dir)")
        self._limit = gigabytes * 1e9
        self._since_check = 0.0
        self._failed = False
        self._left_alone_until = 0.0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Used from the client's thread, made and closed in the caller's; never at once.
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")  # A killed process loses nothing, a power cut the last ones.
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers"
                " (key TEXT PRIMARY KEY, value TEXT NOT NULL, size INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS answers_used ON answers (used, size)")
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(
                f"the judge's cache {self.path} cannot be used ({reason}); delete it, or name another directory of "
                "this machine in judge.cache_dir (empty = no cache)"
            ) from error

    def get(self, key: str) -> str | None:
        """The answer, None where there is none."""
        if self._left_alone:
            return None
        with self._disk():
            row = self._db.execute("SELECT value, used FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            if time.time() - row[1] > _USED_AGAIN:
                self._db.execute("UPDATE answers SET used = ? WHERE key = ?", (time.time(), key))
            return row[0]
        return None

    def put(self, key: str, value: str) -> None:
        if self._left_alone:
            return
        with self._disk():
            size = len(value.encode()) + _OVERHEAD
            row = (key, value, size, time.time())
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", row)
            self._since_check += size
            if self._since_check >= _CHECK_SHARE * self._limit:
                self._since_check = 0.0
                self._trim()

    def close(self) -> None:
        with self._disk():
            self._trim()
        self._db.close()

    @property
    def _left_alone(self) -> bool:
        return time.monotonic() < self._left_alone_until

    def _trim(self) -> None:
        """Drops the answers not used for longest until the rest is well within the limit; new ones take their place."""
        size = self._db.execute("SELECT COALESCE(SUM(size), 0) FROM answers").fetchone()[0]
        if size <= self._limit:
            return
        drop = size - _KEPT_SHARE * self._limit
        self._db.execute(
            "DELETE FROM answers WHERE key IN (SELECT key FROM"
            " (SELECT key, SUM(size) OVER (ORDER BY used, key) - size AS before FROM answers) WHERE before < ?)",
            (drop,),
        )

    @contextlib.contextmanager
    def _disk(self):
        try:
            yield
        except sqlite3.Error as error:
            self._left_alone_until = time.monotonic() + _PAUSE
            if not self._failed:
                _log.warning("the judge's cache %s fails (%s); answers are asked for again", self.path, error)
            self._failed = True
