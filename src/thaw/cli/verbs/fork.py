"""`thaw fork`: several children from one point, in one engine batch, a branch each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from thaw.cli import children, conversation, options, output, prompts, speak, view
from thaw.cli.progress import Progress
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.base import Completion
    from thaw.repo.commit import CommitResult
    from thaw.repo.group import Group
    from thaw.repo.repository import Repository
    from thaw.repo.resolve import ResolvedPoint

EXAMPLE = """
thaw fork main "Why?" "How?" "Who?" --max-tokens 40
thaw fork main:turn=1 "Why?" -n 8 --name try
thaw fork main --prompts questions.jsonl --json
"""
DEFAULT_N = 4


@dataclass(frozen=True)
class Child:
    """One child's prompt, as text and (in a chat) as tokens and messages, and how it samples."""

    prompt: str
    sampling: Any
    token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, object], ...] = ()


@options.verb("fork", EXAMPLE)
@click.argument("point")
@click.argument("prompt", nargs=-1)
@click.option("-n", "n", type=click.IntRange(min=1), metavar="N", help="Children; default: one a prompt, else 4.")
@click.option("--prompts", "file", metavar="FILE.jsonl", help='One child a line: "text" or {"prompt": …, "seed": …}.')
@click.option("--name", metavar="NAME", help="Branches are NAME/0, NAME/1, …; default: fork, or the first free forkN.")
@click.option("--chat", is_flag=True, help="A prompt is the user's next message, in the model's own template.")
@click.option("--replay", is_flag=True, help="Children keep the parent's seed instead of one of their own.")
@click.option("--recompute", is_flag=True, help="Prefill again where the stored KV does not fit the running model.")
@click.option("-m", "message", metavar="TEXT", help="The commits' message; default: the start of each prompt.")
@options.sampling
@options.engine
@options.as_json
def command(
    named: str | None,
    point: str,
    prompt: tuple[str, ...],
    n: int | None,
    file: str | None,
    name: str | None,
    chat: bool,
    replay: bool,
    recompute: bool,
    message: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Go on from POINT as several children: loaded once, run as one batch, a branch each.

    One PROMPT is for all children, several are one each; with none each child goes on by itself. Children draw from
    seeds of their own, derived from the parent's.
    """
    wanted = _children(prompt, n, file, options.given_sampling(values))
    with speak.opened(named, engine_name, model, dtype, device) as repo:
        where = repo.resolve(point)
        prefix = _free_name(repo, name, len(wanted))
        if chat:
            wanted = _as_chat(repo, where, wanted)
        repo.require_room(sum(child.sampling.max_tokens for child in wanted))
        with Progress("bringing the session back"):
            group = repo.fork(where, len(wanted), replay=replay, policy="recompute" if recompute else "exact")
        with group:
            completions = _generate(group, wanted, prefix, as_json)
            commits = _commit(group, wanted, completions, prefix, message)
            _report(group, wanted, completions, commits, as_json)


def _children(prompt: tuple[str, ...], n: int | None, file: str | None, given: dict[str, Any]) -> list[Child]:
    if file is not None and prompt:
        raise click.UsageError("give prompts as words or with --prompts, not both.")
    lines = prompts.from_jsonl(file) if file is not None else [(text, {}) for text in prompt]
    if len(lines) <= 1 and file is None:
        lines = (lines or [("", {})]) * (n or DEFAULT_N)
    if n is not None and n != len(lines):
        raise click.UsageError(f"-n {n} does not fit {len(lines)} prompts; leave -n out.")
    return [Child(text, prompts.make_sampling(given, own)) for text, own in lines]


def _free_name(repo: Repository, name: str | None, n: int) -> str:
    """The branches' common name; checked before anything runs, so that no work is lost to a name."""
    taken = {ref.name for ref in repo.store.refs()}
    if name is not None:
        used = [f"{name}/{i}" for i in range(n) if f"{name}/{i}" in taken]
        if used:
            raise InvalidRequest(f"{', '.join(used[:4])} exist already; choose another --name, or delete them first.")
        return name
    i = 1
    while any(f"{_numbered(i)}/{k}" in taken for k in range(n)):
        i += 1
    return _numbered(i)


def _numbered(i: int) -> str:
    return "fork" if i == 1 else f"fork{i}"


def _as_chat(repo: Repository, where: ResolvedPoint, wanted: list[Child]) -> list[Child]:
    """The same children, their prompts rendered by the model's template as the next message."""
    from thaw.repo.chat import continue_with

    if not all(child.prompt for child in wanted):
        raise click.UsageError("--chat needs a prompt for every child.")
    before, shown = conversation.of(repo.store, where), repo.show(where)
    out = []
    for child in wanted:
        message: dict[str, object] = {"role": "user", "content": child.prompt}
        codec = repo.engine.codec
        rendered = continue_with(codec, shown.tokens, shown.turns, [*before, message], None)
        if rendered.keep != len(shown.tokens):
            raise InvalidRequest(
                f"the model's template renders this conversation differently from token {rendered.keep:,} of "
                f"{len(shown.tokens):,} on, so children could not share the rest. Leave --chat out, or fork at "
                f"{where.commit[3:13]}:token={rendered.keep}."
            )
        out.append(Child(child.prompt, child.sampling, rendered.new, (message,)))
    return out


def _generate(group: Group, wanted: list[Child], prefix: str, quiet: bool) -> list[Completion]:
    sampling = [child.sampling for child in wanted]
    if not any(child.prompt for child in wanted) and _cut(group):
        stream = group.resume_stream()
    elif wanted[0].token_ids is not None:
        stream = group.stream("", sampling, token_ids=[child.token_ids or () for child in wanted])
    else:
        stream = group.stream([child.prompt for child in wanted], sampling)
    return children.follow(stream, [f"{prefix}/{i}" for i in range(len(wanted))], quiet=quiet)


def _cut(group: Group) -> bool:
    turns = group[0].turns
    return bool(turns) and turns[-1].kind == "completion" and turns[-1].finish_reason is None


def _commit(
    group: Group, wanted: list[Child], completions: list[Completion], prefix: str, message: str | None
) -> list[CommitResult]:
    done = []
    with Progress("committing"):
        for i, (session, child, completion) in enumerate(zip(group, wanted, completions, strict=True)):
            answer: dict[str, object] = {"role": "assistant", "content": completion.text}
            meta = conversation.meta([*child.messages, answer]) if child.messages else {}
            text = message or output.one_line(child.prompt, 72) or "went on"
            done.append(session.commit(text, branch=f"{prefix}/{i}", meta=meta))
    return done


def _report(
    group: Group, wanted: list[Child], completions: list[Completion], commits: list[CommitResult], as_json: bool
) -> None:
    together = list(zip(group, wanted, completions, commits, strict=True))
    if as_json:
        output.print_json({"children": [{"prompt": w.prompt, **speak.plain(done, c, s)} for s, w, c, done in together]})
        return
    for _, child, completion, done in together:
        name = output.style(str(done.branch), "bold", "green")
        asked = f"  {output.one_line(child.prompt, 60)}" if child.prompt else ""
        output.line(f"{name} {view.commit_id(done.commit)}{asked}")
        view.block(completion.text)
        output.line(view.MARGIN + output.style(speak.spoken(completion).removeprefix("; "), "dim"))
        output.line()
    proof = group[0].proof
    if proof is not None:
        output.note(f"restored once for {len(group)}: {view.proof_line(proof)}")
