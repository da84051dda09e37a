"""Telling the demo's story on a terminal or into a pipe: its events as they come, then the proof.

Only what was measured in this run is said. Nothing is claimed in advance: a sentence is printed after its event.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.cli import output, view, words
from thaw.cli.children import Board
from thaw.cli.progress import Progress
from thaw.core.ids import short
from thaw.demo import events, prompts

if TYPE_CHECKING:
    from thaw.demo.story import Story

MARGIN = "   "
TITLES = {
    "reader": "A process reads a document, once",
    "hydrator": "A fresh process continues from the snapshot, four times at once",
}


class Narrator:
    """Takes the events of both processes; `close` ends whatever is being drawn."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._busy: Progress | Board | None = None
        self._far = ""
        self._chapter = 0
        self._role = ""

    def __call__(self, event: events.Event) -> None:
        if not isinstance(event, (events.ChildSaid, events.Reading)):
            self.close()
        if not self._quiet:
            self._tell(event)

    def close(self) -> None:
        if self._busy is not None:
            self._busy.__exit__(None, None, None)
            self._busy = None

    def _tell(self, event: events.Event) -> None:
        match event:
            case events.WorkerStarted():
                self._role = event.role
                self.chapter(f"{TITLES[event.role]} (process {event.pid})")
                self._wait("loading the model")
            case events.ModelLoaded():
                name = event.model.rstrip("/").rpartition("/")[2]
                say(f"loaded {name} ({event.engine}, {event.device}) in {words.seconds(event.seconds)}")
                self._wait("reading" if self._role == "reader" else "hydrating")
            case events.Reading():
                self._far = f"{event.done:,} of {words.count(event.total, 'token')}"
            case events.DocumentRead():
                say(f"read {words.count(event.num_tokens, 'token')} in {bold(words.seconds(event.seconds))}")
                self._wait("committing")
            case events.Committed():
                say(
                    f"committed {view.commit_id(event.commit)} to {event.branch}: {words.nbytes(event.nbytes)} "
                    f"written and synced in {words.seconds(event.seconds)}"
                )
                self._wait("continuing, to compare later")
            case events.Answered():
                self._answered(event)
            case events.Ended():
                tail = "; its memory is gone, the snapshot is on disk" if event.role == "reader" else ""
                say(f"the process ended{tail}")
            case _:
                self._tell_children(event)

    def _answered(self, event: events.Answered) -> None:
        n = words.count(len(event.token_ids), "token")
        if self._role == "reader":
            say(f"continued by itself for {n}, to compare later")
        else:
            say(f"resumed the parent too, for {n}")

    def _tell_children(self, event: events.Event) -> None:
        if isinstance(event, events.ChildrenHydrated):
            proof = event.proof
            say(
                f"hydrated {event.num_children} children in {bold(words.seconds(event.seconds))}: "
                f"{words.nbytes(proof.nbytes)} read and hashed, once for all"
            )
            self._open(Board([f"answer/{i}" for i in range(event.num_children)]))
        elif isinstance(event, events.ChildSaid) and isinstance(self._busy, Board):
            self._busy.add(event.index, event.text)
        elif isinstance(event, events.ChildAnswered):
            output.line()
            name = output.style(event.branch, "bold", "green")
            output.line(f"{MARGIN}{name}  {output.style(output.clean(event.question), 'bold')}")
            view.block(event.text.strip(), indent=f"{MARGIN}          ")
            if event.index == len(prompts.QUESTIONS) - 1:
                output.line()
                self._wait("resuming the parent, to compare")

    def chapter(self, title: str) -> None:
        self._chapter += 1
        output.line()
        output.line(f"{output.style(str(self._chapter), 'bold', 'cyan')}  {bold(title)}")

    def _wait(self, what: str) -> None:
        self._far = ""
        self._open(Progress(what, lambda: self._far, margin=MARGIN))

    def _open(self, busy: Progress | Board) -> None:
        sys.stdout.flush()
        self._busy = busy
        busy.__enter__()


def say(text: str) -> None:
    output.line(f"{MARGIN}{text}")


def bold(text: str) -> str:
    return output.style(text, "bold")


def proof(narrator: Narrator, story: Story) -> None:
    """What the engine counted, what was compared, and the times of this run."""
    narrator.chapter("The proof")
    total = story.committed.num_tokens
    last = total - story.hydrated.num_kv
    head = ("", "engine's count of cached", "prefilled", "first token after")
    table = [tuple(output.style(cell, "dim") for cell in head)]
    table += [
        (
            output.style(child.branch, "bold", "green"),
            f"{child.num_cached_tokens:,} of {total:,} tokens",
            f"{child.num_prefilled_tokens} (its question{' and the token before' if last else ''})",
            words.seconds(story.hydrated.seconds + child.ttft_s),
        )
        for child in story.children
    ]
    output.rows(table, indent=MARGIN)
    output.line()
    for check in story.checks:
        mark = output.style("held  ", "green") if check.held else output.style("FAILED", "bold", "red")
        _with_detail(f"{mark}  {check.name}", check.seen)
    output.line()
    _times(story)


def _with_detail(text: str, detail: str) -> None:
    """The detail behind the text where it fits, else below it."""
    fits = len(MARGIN) + output.seen(text) + 2 + len(detail) <= output.width()
    if fits:
        say(f"{text}  {output.style(detail, 'dim')}")
    else:
        say(text)
        say(f"        {output.style(detail, 'dim')}")


def _times(story: Story) -> None:
    read, hydrated = story.prefill_first_token_s, story.hydrate_first_token_s
    output.rows(
        [
            (
                "first token, reading the document",
                bold(words.seconds(read)),
                f"prefill {words.seconds(story.read.seconds)}, then one question",
            ),
            (
                "first tokens, hydrating it",
                bold(words.seconds(hydrated)),
                f"hydrate {words.seconds(story.hydrated.seconds)}, then {len(story.children)} questions",
            ),
        ],
        indent=MARGIN,
    )
    if story.ok:
        gain = read / hydrated
        verdict = f"{gain:.1f} × sooner" if gain >= 1 else f"{1 / gain:.1f} × later: prefilling again is faster here"
        say(f"{bold(verdict)}, both measured in this run with the model loaded")


def ending(narrator: Narrator, story: Story) -> None:
    """The verdict and what to type next; every command works as it stands."""
    if not story.ok:
        failed = "; ".join(check.name for check in story.checks if not check.held)
        output.line()
        output.line(output.style(f"thaw did NOT keep its guarantees. Failed: {failed}.", "bold", "red"))
        place = shlex.quote(story.folder)
        output.line(f"Repository and receipt are in {story.folder}; `thaw -C {place} fsck` checks the bytes.")
        return
    place = shlex.quote(story.folder)
    narrator.chapter("What to run next")
    first = _path_first(sys.argv[0])
    output.rows(
        [
            *([(first, "once")] if first else []),
            (f"thaw -C {place} log --graph --all", "the tree"),
            (f"thaw -C {place} serve", "the tree in a browser; fork it there"),
            (f"thaw -C {place} diff answer/0 answer/1", "where two diverge"),
            (f"thaw -C {place} show answer/2", "one in full"),
            (f"thaw -C {place} verify {short(story.committed.commit)}", "which laws hold"),
            (f"thaw -C {place} adopt answer/1 main", "the winner"),
            (f"thaw -C {place} run --chat 'And why?' --temperature 0", "continue"),
            (f"thaw receipt verify {shlex.quote(story.receipt)}", "recompute the figures"),
        ],
        indent=MARGIN,
    )


def _path_first(script: str) -> str | None:
    """How to make `thaw` the command that is running, where the shell would not find it (a clone's own .venv)."""
    running, found = Path(script), shutil.which("thaw")
    if running.name != "thaw" or (found is not None and Path(found).samefile(running)):
        return None
    folder = running.absolute().parent
    here = Path.cwd()
    shown = f"$PWD/{folder.relative_to(here)}" if folder.is_relative_to(here) else str(folder)
    return f'export PATH="{shown}:$PATH"'
