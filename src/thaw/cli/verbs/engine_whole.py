"""`thaw engine snapshot`, `show` and `restore`: a whole engine, stored while it works and brought back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from thaw.cli import admin, options, output, place, speak, words
from thaw.cli.progress import Progress

if TYPE_CHECKING:
    from thaw.repo.repository import Repository
    from thaw.snapshot import EngineSnapshot, QueuedRequest

SNAPSHOT_EXAMPLE = """
thaw engine snapshot
thaw engine snapshot http://127.0.0.1:8790 --name deploy/1
"""
SHOW_EXAMPLE = """
thaw engine show
thaw engine show deploy/1 --json
"""
RESTORE_EXAMPLE = """
thaw engine restore
thaw engine restore deploy/1 --model ~/models/Qwen3-8B
thaw engine restore deploy/1 --fork --json
"""
NAME = "engine"
LIMIT_S = 600.0
INCOMPLETE = 8
"""As `Stopped`: something was missed."""
KINDS = ("running", "waiting", "parked", "idle")


@options.verb("snapshot", SNAPSHOT_EXAMPLE)
@click.argument("url", required=False)
@click.option("--name", default=NAME, show_default=True, metavar="NAME", help="The branch that names the snapshot.")
@click.option("--replace", is_flag=True, help="Replace a snapshot of that name.")
@admin.key
@options.as_json
def snapshot(named: str | None, url: str | None, name: str, replace: bool, key: str | None, as_json: bool) -> int:
    """Store every open session of a gateway's engines while they work: a snapshot per namespace.

    URL is the address of a `thaw serve`; default: http://127.0.0.1:8790. Nothing stops. A program with an engine of its
    own calls thaw.snapshot.snapshot(repo). `thaw push NAME` sends a snapshot, `thaw engine restore NAME` resumes it.

    Exit code 8: a session could not be captured, or a request was so new that no session had its prompt; the output
    names them.
    """
    del named  # the gateway's repository
    where = url or admin.DEFAULT_URL
    told = admin.ask(where, "snapshot", {"name": name, "replace": replace}, LIMIT_S, key)
    missed = [f"not captured: {one['why']}" for each in told["snapshots"] for one in each["missed"]]
    missed += [f"not in it: request {one['id'] or one['request']}: {one['why']}" for one in told["lost"]]
    if as_json:
        output.print_json({"url": where, **told})
        return INCOMPLETE if missed else 0
    for one in told["snapshots"]:
        counts = ", ".join(f"{one[kind]} {kind}" for kind in KINDS if one[kind])
        within = f" in {one['namespace']}" if one["namespace"] else ""
        output.line(f"{output.style(one['name'], 'bold', 'green')} {one['commit'][3:15]}{within}: {counts}")
    for why in missed:
        output.line(output.style(why, "red"))
    return INCOMPLETE if missed else 0


@options.verb("show", SHOW_EXAMPLE)
@click.argument("name", default=NAME)
@options.as_json
def show(named: str | None, name: str, as_json: bool) -> None:
    """Show what a snapshot of an engine holds: sessions, requests, the engine, and whether it was restored."""
    from thaw.snapshot import manifest

    with place.open_repository(named) as repo:
        found = manifest.read(repo.store, name)
    if as_json:
        output.print_json(plain(found))
        return
    record = found.record
    output.line(f"{output.style(found.name, 'bold', 'green')} {found.commit[3:15]}: {record.engine} {record.version}, "
                f"{record.model}, policy {record.policy}")  # fmt: skip
    for one in found.sessions:
        request = f"  request {one.request.id}, {one.request.given.num} given out" if one.request else ""
        output.line(f"  {output.style(one.commit[3:15], 'yellow')}  {one.was.ljust(7)}  "
                    f"{words.count(one.num_tokens, 'token')}{request}")  # fmt: skip
    for missed in found.missed:
        output.line(output.style(f"  not in it: {missed.why}", "red"))
    if found.restored is not None:
        output.note("restored, and its streams continue there" if found.restored.taken else "forked, not taken over")


@options.verb("restore", RESTORE_EXAMPLE)
@click.argument("name", default=NAME)
@click.option("--fork", is_flag=True, help="Restore it again, with other seeds.")
@click.option("--max-num-seqs", type=click.IntRange(1, 1 << 16), metavar="N",
              help="Requests that run at once; default: as in the snapshot.")  # fmt: skip
@click.option("--recompute", is_flag=True, help="Prefill again where the stored KV does not match.")
@options.engine
@options.as_json
def restore(
    named: str | None,
    name: str,
    fork: bool,
    max_num_seqs: int | None,
    recompute: bool,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Bring a snapshot back in a fresh engine, finish its requests, and commit each as NAME/0, NAME/1, …

    Requests that were running continue at once, in one step; the others wait their turn. What a client received after
    the capture is generated again, and must be the same tokens. Sessions without a request stay in the
    snapshot: fork their points.

    Exit code 8: something could not be restored or finished; the output names it.
    """
    from thaw.snapshot import restore as bring_back

    with speak.opened(named, engine_name, model, dtype, device) as repo:
        with Progress("restoring the engine"):
            back = bring_back(repo, name, fork=fork, max_num_seqs=max_num_seqs,
                              policy="recompute" if recompute else "exact")  # fmt: skip
        with back.queue:
            prefix = _free_prefix(repo, name)
            told = [_finished(one, f"{prefix}/{i}") for i, one in enumerate(back.queue.known())]
    missed = [{"session": one.session, "request": one.request, "why": one.why} for one in back.missed]
    code = INCOMPLETE if missed or any(one["error"] for one in told) else 0
    if as_json:
        output.print_json({"name": name, "sessions": len(back.sessions), "requests": told, "missed": missed,
                           "recomputed_tokens": back.num_recomputed_tokens, "seconds": back.seconds})  # fmt: skip
        return code
    for one in told:
        output.line(f"{output.style(one['branch'] or one['id'], 'bold', 'green')}  {one['error'] or one['text']}")
    for lost in missed:
        output.line(output.style(f"not restored: {lost['why']}", "red"))
    output.note(f"{words.count(len(back.sessions), 'session')} restored in {words.seconds(back.seconds)}, "
                f"{words.count(back.num_recomputed_tokens, 'token')} computed again")  # fmt: skip
    return code


def _free_prefix(repo: Repository, name: str) -> str:
    """NAME, or NAME-2 and so on where branches below it are there: of an earlier restore."""
    taken, number = {ref.name.rpartition("/")[0] for ref in repo.store.refs()}, 1
    while (prefix := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return prefix


def _finished(request: QueuedRequest, branch: str) -> dict[str, Any]:
    """Its end, committed as a branch of its own. What ends it is told and does not stop the others."""
    from thaw.core.errors import ThawError

    told: dict[str, Any] = {"id": request.id, "branch": None, "point": None, "error": None}
    try:
        tokens = request.result()
        done = request.session.commit("finished after a restore", branch=branch, expect=None)
        told |= {"branch": branch, "point": done.commit}
    except ThawError as error:
        tokens, told["error"] = request.token_ids, f"{error.kind}: {error}"
    return told | {"text": request.text, "token_ids": list(tokens), "finish_reason": request.finish_reason}


def plain(found: EngineSnapshot) -> dict[str, Any]:
    """As JSON has it; prompts that wait are counted, not told."""
    import msgspec

    sessions = []
    for one in found.sessions:
        told = msgspec.to_builtins(one)
        if one.request is not None:
            told["request"] = {
                "id": one.request.id,
                "priority": one.request.priority,
                "number": one.request.number,
                "num_prompt_left": len(one.request.prompt) // 4,
                "num_given": one.request.given.num,
            }
        sessions.append(told)
    restored = None if found.restored is None else msgspec.to_builtins(found.restored)
    return {"name": found.name, "commit": found.commit, "engine": msgspec.to_builtins(found.record),
            "sessions": sessions, "prefixes": found.prefixes, "restored": restored}  # fmt: skip
