"""Folders that are written as a whole or not at all, by one process, and errors that say what could not be written."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from atst_fast.files import TEMPORARY, sync_folder, write_atomically
from atst_fast.train.config import UserError

__all__ = [
    "LOCK",
    "TEMPORARY",
    "explain",
    "make_folder",
    "new_folder",
    "only_one",
    "sync_folder",
    "write_atomically",
]

LOCK = ".lock"


@contextlib.contextmanager
def explain(doing: str, hint: str = "") -> Iterator[None]:
    """Turn the errors of writing files into a UserError: "cannot <doing>: No space left on device; <hint>"."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot {doing}: {error.strerror or error}{'; ' * bool(hint)}{hint}") from error


def make_folder(folder: Path) -> None:
    with explain(f"make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against a second process that would write into it; the lock ends with the process."""
    import fcntl

    path = folder / LOCK
    with explain(f"write into {folder}"):
        lock = open(path, "w")  # noqa: SIM115 (held while the caller works)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                raise BlockingIOError  # its owner was done and took the file away while it was being locked
        except (BlockingIOError, FileNotFoundError):
            raise UserError(f"another process is writing into {folder}") from None
        yield


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, beside ``folder``, whose name it gets at the end; on any error nothing stays.

    It is held against a second process, and emptied of what a killed one left.
    """
    if folder.name in ("", ".."):
        raise UserError(f"the name of a new folder is needed, got {folder}")
    temporary = folder.with_name(folder.name + TEMPORARY)
    temporary.mkdir(parents=True, exist_ok=True)
    with only_one(temporary):
        try:
            for left in temporary.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK:
                    left.unlink()
            yield temporary
            os.rename(temporary, folder)
            (folder / LOCK).unlink()  # only now: without it another process could start over
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
