"""What a demo is asked, and what happened in it: plain values."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thaw.demo.events import (
    Answered,
    ChildAnswered,
    ChildrenHydrated,
    Committed,
    Described,
    DocumentRead,
    ModelLoaded,
)


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`model` None: the demo's own (or THAW_MODEL), built when it is missing; an engine without a model needs none.

    `out` None: `thaw-demo` in the current folder, or the first free `thaw-demo-N`. `force` replaces a demo's folder.
    """

    out: Path | None = None
    force: bool = False
    engine: str = "transformers"
    model: str | None = None
    max_tokens: int = 40
    parent_max_tokens: int = 24
    seed: int = 20


class StoryCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was promised, whether it held, and what was seen."""

    name: str
    held: bool
    seen: str


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """What happened. `folder` holds the repository in `.thaw` and the receipt."""

    folder: str
    receipt: str
    loaded: ModelLoaded
    described: Described
    read: DocumentRead
    committed: Committed
    parent: Answered
    hydrated: ChildrenHydrated
    children: tuple[ChildAnswered, ...]
    resumed: Answered
    checks: tuple[StoryCheck, ...]

    @property
    def ok(self) -> bool:
        return all(check.held for check in self.checks)

    @property
    def prefill_first_token_s(self) -> float:
        """Reading the document and answering: what a question costs without the snapshot, measured in the reader."""
        return self.read.seconds + self.parent.ttft_s

    @property
    def hydrate_first_token_s(self) -> float:
        """Hydrating and answering: until the last of the children, all in one batch, had its first token."""
        return self.hydrated.seconds + max(child.ttft_s for child in self.children)
