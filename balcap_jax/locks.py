"""Files that one process at a time may hold, on disks that have locks."""

import errno
import fcntl
import functools
import logging
from pathlib import Path
from typing import IO

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre and NFS, as they are often mounted.
_log = logging.getLogger(__name__)


def hold(file: int | IO, path: Path) -> bool:
    """Locks the open file `path` until it is closed; False where another process holds it.

    Where the disk has no locks it counts as held by this process, and one line on stderr says so.

    Raises:
      OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _say_once(path.parent, error.strerror)
    return True


@functools.cache
def _say_once(folder: Path, reason: str) -> None:
    _log.warning("%s has no locks (%s): nothing keeps another process from writing there too", folder, reason)
