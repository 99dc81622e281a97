"""One run at a time in an `output_dir`: a lock on `output_dir/dataflex/lock`, which the system releases when the process dies.

The file also says who holds it. That decides where the lock does not reach: on a shared folder another machine may not see it, so a record
of another machine is watched for a while. A living run touches its file every few seconds; one that does not has died, and a requeued job
takes over.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dataflex.errors import TrainingError
from dataflex.utils.files import remove_temporaries
from dataflex.utils.logging import logger

NAME = "lock"
_BEAT = 5.0
_PATIENCE = 4 * _BEAT

_held: dict[str, _Lock] = {}


@contextmanager
def run_lock(output_dir: str | Path, *, active: bool = True) -> Iterator[None]:
    """Keep other runs out of `output_dir` within the block. A block inside another of the same process does nothing.

    Args:
        active: whether this process is the one of its run that locks.

    Raises:
        TrainingError: another run is in there, or the folder cannot be written.
    """
    key = _key(output_dir)
    if not active or key in _held:
        yield
        return
    lock = _held[key] = _Lock(Path(output_dir).expanduser())
    try:
        yield
    finally:
        del _held[key]
        lock.release()


def _key(output_dir: str | Path) -> str:
    return os.path.realpath(os.path.expanduser(output_dir))


def refuse_if_locked(output_dir: str | Path) -> None:
    """Raise what `run_lock` would, and leave nothing behind."""
    if (Path(output_dir).expanduser() / "dataflex" / NAME).exists():
        with run_lock(output_dir):
            pass


def check_still_there(output_dir: str | Path) -> None:
    """Notice that the folder this process has locked is gone: writing on would silently begin a new one.

    Raises:
        TrainingError: it is.
    """
    lock = _held.get(_key(output_dir))
    if lock is not None and not lock.in_place():
        message = f"output_dir '{output_dir}' was removed or replaced while the run was going on; what the run had written there is lost"
        raise TrainingError(message)


def any_record(output_dir: str | Path) -> bool:
    """Whether a run has left something in `output_dir/dataflex` beside its lock, which a killed one leaves."""
    folder = Path(output_dir) / "dataflex"
    return folder.is_dir() and any(path.name != NAME for path in folder.iterdir())


class _Lock:
    """The lock while it is held."""

    def __init__(self, output_dir: Path):
        self.output_dir, self.path = output_dir, output_dir / "dataflex" / NAME
        self._made_folder = not output_dir.exists()
        self.handle = self._acquire()
        self._released = threading.Event()
        try:
            self._refuse_living()
        except BaseException:
            os.close(self.handle)
            raise
        self._record()
        remove_temporaries(self.path.parent)
        threading.Thread(target=self._beat, daemon=True).start()

    def _acquire(self) -> int:
        """The opened file, locked where the file system has locks."""
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise TrainingError(f"output_dir '{self.output_dir}' cannot be written: {error.strerror}") from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(handle)
                os.close(handle)
                raise self._refusal(holder) from None
            except OSError:  # this file system has no locks: the record decides alone
                pass
            if _same(handle, self.path):
                return handle
            os.close(handle)  # the run before deleted it while we opened it

    def _refuse_living(self) -> None:
        """A record that nobody deleted: its run has died, unless it runs where our lock is not seen."""
        holder = _read(self.handle)
        if holder is None or (holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname()):
            return
        if holder.get("host") == socket.gethostname():
            if _without_locks(self.handle) and _alive(holder.get("pid")):
                raise self._refusal(holder)
            return
        logger.warning("%s was held by %s; waiting up to %d seconds to see whether that run lives", self.output_dir, _words(holder), _PATIENCE)
        seen, deadline = self._touched(), time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            time.sleep(_BEAT / 5)
            if self._touched() != seen:
                raise self._refusal(holder)

    def _touched(self) -> int | None:
        """When the file was touched last, by its server's clock; opened anew, since a network file system then asks the server."""
        with suppress(OSError), open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
        return None

    def _refusal(self, holder: dict[str, Any] | None) -> TrainingError:
        by = "another run" if holder is None else f"another run, {_words(holder)}"
        return TrainingError(f"output_dir '{self.output_dir}' is in use by {by}. Wait for it, stop it, or use another output_dir")

    def _record(self) -> None:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, json.dumps(record).encode(), 0)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with suppress(OSError):
                os.utime(self.handle)

    def in_place(self) -> bool:
        """Whether the file is still where it was."""
        return _same(self.handle, self.path)

    def release(self) -> None:
        """Give the folder free, and leave nothing in it."""
        self._released.set()
        with suppress(OSError):
            if self.in_place():
                self.path.unlink()
                self.path.parent.rmdir()  # unless something is in it
                if self._made_folder:
                    self.output_dir.rmdir()
        with suppress(OSError):
            fcntl.flock(self.handle, fcntl.LOCK_UN)  # a loader's worker may have the file open, too
        os.close(self.handle)


def _read(handle: int) -> dict[str, Any] | None:
    try:
        record = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _without_locks(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _drop_in_child() -> None:
    """A forked process, such as a loader's worker, must not keep the lock when the run has died."""
    for lock in _held.values():
        with suppress(OSError):
            os.close(lock.handle)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
