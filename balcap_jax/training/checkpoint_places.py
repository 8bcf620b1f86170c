"""Where the steps of a run's checkpoints lie, a disk or a bucket, and what makes one of them whole there.

On a disk a step is written under a temporary name, synced, and renamed when it is whole. A bucket cannot rename: Orbax
writes a step under its own name there, and the object `sums.json`, written last, makes it one. Nobody reads a step
without it, and the next start clears what a killed process has left of one.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from balcap_jax.cli import bucket, json_text, storage
from balcap_jax.cli.disk_errors import for_tensorstore, reason_of, remove_unfinished
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import make_directory, rename_directory, sync
from balcap_jax.training.checksums import CRC32C, SUMS, find_damage, seal

_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of directories that Orbax clears at the next start
_INCOMPLETE = "incomplete-"
_DELETERS = 16


class Disk:
    """Steps below a directory of a disk. The methods raise OSError as it does."""

    def __init__(self, directory: Path):
        self.directory = directory

    @property
    def for_orbax(self) -> Path:
        return for_tensorstore(self.directory)

    def prepare(self) -> None:
        """Makes the place. Raises UserError where nothing can be written to it."""
        try:
            make_directory(self.directory)
            with tempfile.TemporaryFile(dir=self.directory):
                pass  # A read-only disk is better found now than after the first fifty steps.
        except OSError as error:
            raise UserError(
                f"can't write checkpoints in {self.directory}: {reason_of(error)}; choose another workdir"
            ) from error

    def look(self) -> None:
        """Raises OSError where the place is gone: Orbax would make it anew."""
        self.directory.stat()

    def steps(self) -> list[int]:
        """All steps there, ascending; they may be torn."""
        return [step for step, _ in directories(self.directory)]

    def damage(self, step: int, *, content: bool = True, share: tuple[int, int] = (0, 1)) -> str:
        """As `checksums.find_damage`."""
        return find_damage(self.directory / str(step), content=content, share=share)

    def set_aside(self, step: int) -> str:
        """Gives a torn step a name that nobody takes for a step; returns it."""
        path, aside = self.directory / str(step), self.directory / f"{_INCOMPLETE}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        rename_directory(path, aside)
        return aside.name

    def clear_unfinished(self) -> None:
        """Removes what a save that failed has left."""
        for path in self.directory.glob(f"*{_TEMPORARY}*"):
            remove_unfinished(path)  # Half a step is of no use, and may fill the disk.

    def sync_own(self) -> None:
        """Puts on disk what this process wrote."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.glob(f"*{_TEMPORARY}/**/*process_{jax.process_index()}"):
                if path.is_file():
                    sync(path)
                elif not (path / SUMS).exists():
                    seal(path)

    def temporary_paths(self, beside: Collection[Path], lasting: Callable[[Sequence[int]], Collection[int]]) -> type:
        """Orbax's temporary directory of a step, the last step of which makes it whole.

        Orbax changes files of a step until it has renamed it, so it renames to one more temporary name.

        Args:
          beside: files that must be on disk before a step counts.
          lasting: which of the whole steps stay; the others are deleted.
        """
        commit = self._commit

        class Committed(ocp.path.atomicity.AtomicRenameTemporaryPath):
            async def finalize(self) -> None:
                final = Path(self._final_path)
                if not is_step(final.name):  # of a part of a step
                    await super().finalize()
                    return
                self._final_path = self.get().with_name(f"{self.get().name}-whole")
                await super().finalize()
                commit(Path(self._final_path), final, beside, lasting)

        return Committed

    def _commit(self, written: Path, final: Path, beside: Collection[Path], lasting: Callable) -> None:
        """Puts a step on disk, names it, and deletes what it replaces: names go first, as after a kill none is torn."""
        for path in beside:
            if path.exists():
                sync(path)
                sync(path.parent)
        seal(written)
        rename_directory(written, final)
        whole = [step for step in self.steps() if not self.damage(step, content=False)]
        stay = lasting(whole)
        for step, path in directories(self.directory):
            if step < whole[-1] and step not in stay:
                outdated = path.with_name(f"{step}{_TEMPORARY}-old")
                path.rename(outdated)
                shutil.rmtree(outdated)
        for step, path in directories(self.directory, _INCOMPLETE):
            if step <= whole[-1]:
                shutil.rmtree(path)


class Bucket:
    """Steps below a gs:// path. Sizes and checksums are the server's; nothing is read. They raise BucketError."""

    def __init__(self, directory: Path):
        self.url = storage.url_of(directory)

    @property
    def for_orbax(self) -> epath.Path:
        return epath.Path(self.url)

    def prepare(self) -> None:
        """Clears what is no step, or not whole: nobody knows it, and it costs."""
        bucket.check(self.url)
        whole = set(self.steps())
        for name in bucket.children(self.url):
            if (is_step(name) and int(name) not in whole) or _TEMPORARY in name:
                _delete(f"{self.url}/{name}")

    def look(self) -> None:
        """Nothing: a bucket that is gone refuses the first object."""

    def steps(self) -> list[int]:
        """The steps that have been whole, ascending."""
        names = bucket.children(self.url)
        with ThreadPoolExecutor(_DELETERS) as pool:
            sealed = pool.map(lambda name: is_step(name) and bucket.stat(f"{self.url}/{name}/{SUMS}"), names)
            return sorted(int(name) for name, found in zip(names, sealed, strict=True) if found)

    def damage(self, step: int, *, content: bool = True, share: tuple[int, int] = (0, 1)) -> str:
        """The first difference to the objects that were there when the step was written; "" where there is none."""
        del content
        if share[0]:  # One look shows everything.
            return ""
        url = f"{self.url}/{step}"
        try:
            sums = json_text.decode(bucket.read(f"{url}/{SUMS}"))
        except FileNotFoundError:
            return f"{SUMS} is missing"
        except ValueError:
            return f"{SUMS} is damaged"
        if not isinstance(sums, dict) or not sums:
            return f"{SUMS} is damaged"
        found = {entry.url.removeprefix(f"{url}/"): entry for entry in bucket.objects(url)}
        for name in sorted(sums):
            size, crc = sums[name]
            if name not in found:
                return f"{name} is missing"
            if found[name].size != size:
                return f"{name} has {found[name].size} bytes of {size}"
            # Copied from a disk, it has sums of another kind.
            if isinstance(crc, str) and crc != CRC32C + found[name].crc:
                return f"{name} is damaged"
        return ""

    def set_aside(self, step: int) -> str:
        """Copies a torn step under a name that nobody takes for a step, and deletes it; returns the name."""
        name = f"{_INCOMPLETE}{step}"
        _delete(f"{self.url}/{name}")
        for entry in bucket.objects(f"{self.url}/{step}"):
            bucket.copy(entry.url, entry.url.replace(f"{self.url}/{step}/", f"{self.url}/{name}/", 1))
        _delete(f"{self.url}/{step}")
        return name

    def clear_unfinished(self) -> None:
        """Removes what a save that failed has left."""
        with contextlib.suppress(UserError):  # Else the next start does.
            self.prepare()

    def sync_own(self) -> None:
        """Nothing: an object is there once it is written."""

    def temporary_paths(self, beside: Collection[Path], lasting: Callable[[Sequence[int]], Collection[int]]) -> type:
        """As of `Disk`: Orbax's directory of a step, which is no temporary one, and what seals it."""
        del beside  # Part of what is kept.
        commit = self._commit

        class Committed(ocp.path.atomicity.CommitFileTemporaryPath):
            async def finalize(self) -> None:
                await super().finalize()
                final = self.get_final()
                if is_step(final.name):
                    commit(int(final.name), lasting)

        return Committed

    def _commit(self, step: int, lasting: Callable) -> None:
        """Sends the logs, seals a step, and deletes what it replaces: seals go first, as after a kill none is torn."""
        storage.send_kept()
        url = f"{self.url}/{step}"
        found = {entry.url.removeprefix(f"{url}/"): entry for entry in bucket.objects(url)}
        sums = {name: [entry.size, CRC32C + entry.crc] for name, entry in found.items() if name != SUMS}
        bucket.write(f"{url}/{SUMS}", json_text.dumps(sums, indent=0).encode())
        whole = self.steps()
        stay = lasting(whole)
        for other in whole:
            if other < step and other not in stay:
                _delete(f"{self.url}/{other}")
        for name in bucket.children(self.url):
            aside = name.removeprefix(_INCOMPLETE)
            if name.startswith(_INCOMPLETE) and is_step(aside) and int(aside) <= step:
                _delete(f"{self.url}/{name}")


def place_of(directory: Path) -> Disk | Bucket:
    return Bucket(directory) if storage.url_of(directory) else Disk(directory)


def _delete(url: str) -> None:
    """Deletes all below a gs:// path, its seal first."""
    bucket.delete(f"{url}/{SUMS}")
    with ThreadPoolExecutor(_DELETERS) as pool:
        list(pool.map(lambda entry: bucket.delete(entry.url), bucket.objects(url)))


def is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name  # not 007, nor digits of other scripts


def directories(folder: Path, prefix: str = "") -> list[tuple[int, Path]]:
    """(step, path) of all in `folder` that are called `prefix` and a step, ascending; none where there is no folder."""
    names = (path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*") if path.is_dir())
    return [(step, folder / f"{prefix}{step}") for step in sorted(map(int, filter(is_step, names)))]
