"""Folders that other users of the host can neither read nor replace: ours, 0700, on a path that only we can change.

The owner of a folder, and anyone who may write to it, can replace what is in it. So the whole path is checked from the
root down: once a part was found safe, others cannot change it before the next part is checked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from thaw.core.errors import StorageFailed
from thaw.data.files import storage_errors

OTHERS = stat.S_IRWXG | stat.S_IRWXO
WRITERS = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path, *, close: bool = False) -> None:
    """`folder` is a folder of this user's, 0700 whatever the umask, in which and on whose way nobody else (but root)
    can change anything. What is missing is made. `close`: one that others may only read is made 0700 as well; it must
    be a folder that thaw itself names.

    Raises `StorageFailed` naming the first part of the way that is not so; nothing else is changed.
    """
    _make_way(folder.parent)
    _make(folder)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise _refusal(folder, found)
    if not stat.S_IMODE(found.st_mode) & OTHERS:
        return
    if found.st_mode & WRITERS or not close:
        mode = stat.S_IMODE(found.st_mode)
        raise StorageFailed(
            f"{folder} is open to others (mode {mode:04o}), who may have put something there: look into it, then "
            f"chmod 700 {folder}, or choose another folder"
        )
    with storage_errors(folder, "change the mode of"):
        folder.chmod(0o700)


def is_own(folder: Path) -> bool:
    """Whether it is a folder of this user's in which this process may write."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and os.access(folder, os.W_OK)


def _make_way(way: Path) -> None:
    """From the root down: folders of ours or root's, to which nobody else may write unless none can take away what is
    another's (the sticky bit of /tmp). Symbolic links are root's own only, and lead to such a way."""
    for folder in (*reversed(way.parents), way):
        _make(folder)
        found = folder.lstat()
        if stat.S_ISLNK(found.st_mode) and found.st_uid == 0:
            _make_way(Path(os.path.realpath(folder)))
            continue
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.getuid()):
            raise _refusal(folder, found)
        if found.st_mode & WRITERS and not found.st_mode & stat.S_ISVTX:
            mode = stat.S_IMODE(found.st_mode)
            raise StorageFailed(
                f"others may write to {folder} (mode {mode:04o}), and could put their own in the place of what lies "
                f"in it: chmod go-w {folder}, or choose a folder elsewhere"
            )


def _make(folder: Path) -> None:
    try:
        with storage_errors(folder, "make"):
            os.mkdir(folder, 0o700)
    except StorageFailed:
        if not os.path.lexists(folder):
            raise


def _refusal(folder: Path, found: os.stat_result) -> StorageFailed:
    if stat.S_ISLNK(found.st_mode):
        return StorageFailed(f"{folder} is a symbolic link: name the folder that is meant ({os.path.realpath(folder)})")
    if not stat.S_ISDIR(found.st_mode):
        return StorageFailed(f"{folder} is not a folder; choose another")
    return StorageFailed(f"{folder} belongs to another user (uid {found.st_uid}, not {os.getuid()}); choose another")
