"""What `fsck` returns."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written. `file` is relative to the repository; `ids` are damaged or missing
    blobs and objects; `commits` are the snapshots that need them."""

    file: str
    what: str
    ids: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


@dataclass
class FsckReport:
    """`problems` are those left at the end; `repaired` those that a rebuild did away with; `notes` need no action.

    `exit_code` is what the command line returns: 0, or 5 (damaged).
    """

    problems: list[Problem] = field(default_factory=list)
    repaired: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rebuilt: bool = False
    deep: bool = True
    num_packs: int = 0
    num_blobs: int = 0
    num_objects: int = 0
    num_commits: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 5

    def add(self, file: str, what: str, ids: tuple[str, ...] = ()) -> None:
        self.problems.append(Problem(file, what, ids))
