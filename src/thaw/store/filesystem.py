"""Where a repository may live: not on a network file system.

SQLite's WAL needs shared memory and locks that mean the same to every process; network file systems give neither.
The type comes from /proc/self/mountinfo (Linux; elsewhere nothing is refused).
"""

from __future__ import annotations

import os
from pathlib import Path

from thaw.core.errors import StorageFailed

NETWORK = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre",
        "ncp", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "pvfs2", "smb", "smb2", "smb3", "smbfs", "wekafs",
    }
)  # fmt: skip
NETWORK_FUSE = (
    "blobfuse", "ceph", "davfs", "gcs", "glusterfs", "goofys", "juicefs", "mountpoint", "rclone", "s3", "sshfs",
)  # fmt: skip


def is_network(kind: str) -> bool:
    """Whether a mount of this type (`nfs4`, `fuse.sshfs` …) is a network file system."""
    return kind in NETWORK or (kind.startswith("fuse.") and kind[5:].startswith(NETWORK_FUSE))


def mount_type(path: Path, mountinfo: str) -> str:
    """The file system type of the mount that holds `path` (resolved), by the text of mountinfo; "" if unknown."""
    best, found = -1, ""
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split()
        if len(fields) < 5 or not tail:
            continue
        point = fields[4].encode().decode("unicode_escape", "replace") if "\\" in fields[4] else fields[4]
        inside = point == "/" or str(path) == point or str(path).startswith(point + "/")
        if inside and len(point) >= best:
            best, found = len(point), tail.split()[0]
    return found


def refuse_network(path: Path) -> None:
    """Raises `StorageFailed` when `path` (or the folder it will be made in) is on a network file system."""
    resolved = Path(os.path.realpath(path))
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text("utf-8", "replace")
    except OSError:
        return
    kind = mount_type(resolved, mountinfo)
    if is_network(kind):
        raise StorageFailed(
            f"{path} is on a network file system ({kind}); a repository's database would be damaged there. "
            "Make the repository on a local disk."
        )
