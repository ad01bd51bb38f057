"""Writing files so that a crash, a kill or a full disk never leaves half of one under its final name."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from atst_fast.train.config import UserError

TEMPORARY = ".partial"
LOCK = ".lock"


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to the disk, then give it its name.

    On any error the temporary file goes and what had the name before stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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
