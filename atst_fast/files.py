"""Writing a file so that a crash, a kill or a full disk never leaves half of one under its final name."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".partial"


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
