"""Too little memory: found before it is used where a limit says so, and told from other errors where it shows later."""

import errno
import os
import resource

TOO_LITTLE = (
    "there is too little memory for this; free some, raise the limit that is set (ulimit, or a container's), or lower "
    "sizes such as those of batches"
)
_SIGNS = ("RESOURCE_EXHAUSTED", "can't start new thread", "Cannot allocate memory", "std::bad_alloc")

# GB of address space that the smallest run of a command takes, beside those of each core's threads: VmPeak with jax
# 0.10 on 2 cores was 3.0 for train, 2.4 for caption, 2.2 for convert; about half of it was data.
_LEAST = {"train": 2.8, "ablate": 2.8, "aot": 2.8, "caption": 2.2, "convert": 2.0}
_PER_CORE = 0.1
_LIMITS = (("address space (ulimit -v)", resource.RLIMIT_AS, 1.0), ("data (ulimit -d)", resource.RLIMIT_DATA, 0.55))


def problem(command: str) -> str | None:
    """One line about a limit that the command cannot live with; None where there is none.

    Where no thread can be started, JAX and array_record wait for ever, or crash, and no error can be caught.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for what, kind, share in _LIMITS:
        limit = resource.getrlimit(kind)[0]
        least = (_LEAST.get(command, 0) + _PER_CORE * cores) * share * 1e9
        if command in _LEAST and limit != resource.RLIM_INFINITY and limit < least:
            return (
                f"this process is limited to {limit / 1e9:.2f} GB of {what}, and {command} takes at least "
                f"{least / 1e9:.2f} GB on {cores} cores; raise the limit"
            )
    return None


def is_too_little(error: BaseException) -> bool:
    """Whether Python, XLA or the system says that there is no memory, or no room for another thread."""
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))
    )
