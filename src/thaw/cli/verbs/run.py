"""`thaw run`: continue with a branch. Read files and a prompt, generate, stream it, commit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from thaw.cli import conversation, options, output, prompts, speak, view, words
from thaw.cli.progress import Progress
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.base import Completion
    from thaw.repo.chat import ChatResult
    from thaw.repo.commit import CommitResult
    from thaw.repo.repository import Repository
    from thaw.repo.session import Session

EXAMPLE = """
thaw run --model ~/models/Qwen3-0.6B --file handbook.txt --no-generate
thaw run "What is a blob?" --max-tokens 60 --temperature 0
git diff | thaw run --branch review --from main -
"""


@dataclass(frozen=True)
class RunPlan:
    """What is to be done, from the command line alone."""

    files: tuple[str, ...]
    prompt: str
    chat: conversation.ChatOptions | None
    history: list[Any] | None
    generate: bool
    message: str | None
    sampling: Any
    with_weights: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was done. `completion` None: only read. `interrupted`: ^C ended the generation; what it had is committed."""

    commit: CommitResult
    completion: Completion | None
    session: Session
    interrupted: bool = False
    chat: ChatResult | None = None


@options.verb("run", EXAMPLE)
@click.argument("prompt", required=False)
@click.option("--file", "files", multiple=True, metavar="FILE", help="Read this first; repeatable. - is stdin.")
@click.option("--branch", metavar="NAME", help="Default: the current branch. A new one starts empty, or at --from.")
@click.option("--from", "start", metavar="POINT", help="Start at POINT; needs a new --branch unless POINT is a branch.")
@click.option("--no-generate", is_flag=True, help="Read and commit only.")
@click.option("--recompute", is_flag=True, help="Prefill again where the stored KV does not match or was not kept.")
@click.option("-m", "message", metavar="TEXT", help="The commit's message; default: the start of the prompt.")
@click.option("--with-weights", is_flag=True, help="Store the model's weights with the commit.")
@options.points
@options.chat
@options.option_of("Chat", "--history", metavar="FILE", help="The whole conversation before PROMPT, as a JSON list.")
@options.sampling
@options.engine
@options.as_json
def command(
    named: str | None,
    prompt: str | None,
    files: tuple[str, ...],
    branch: str | None,
    start: str | None,
    no_generate: bool,
    chat: bool,
    history: str | None,
    recompute: bool,
    message: str | None,
    with_weights: bool,
    points: tuple[int, ...],
    unaligned: bool,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
    **values: Any,
) -> int:
    """Continue a branch: read --file and PROMPT, generate, commit.

    PROMPT - means stdin; a pipe is also read if there is no other input. With no input at all, the model just
    continues, or resumes a completion that was interrupted. The completion streams to stdout; ^C keeps what is there.

    Models with recurrent layers can be forked only at commits, at the ends of turns and at each --point.
    """
    sampling = prompts.make_sampling(options.given_sampling(values))
    text = prompts.from_arguments(prompt, or_stdin=not files)
    if no_generate and not (text or files):
        raise click.UsageError("--no-generate needs input: PROMPT, --file or stdin.")
    talk = conversation.taken(values, chat=chat)
    if history is not None and not chat:
        raise click.UsageError("--history works only with --chat.")
    if chat and (no_generate or not (text or files)):
        raise click.UsageError("--chat answers a message: give PROMPT or --file, and leave out --no-generate.")
    told = None if history is None else conversation.json_list(history)
    job = RunPlan(files, text, talk if chat else None, told, not no_generate, message, sampling, with_weights)

    def check(repo: Repository) -> None:
        from thaw.repo.params import require_to_come

        _, begin = _start(repo, branch, start)
        require_to_come(points, repo.resolve(begin).num_tokens if begin is not None else 0)

    with speak.opened(named, engine_name, model, dtype, device, check) as repo:
        name, point = _start(repo, branch, start)
        repo.require_room(sampling.max_tokens if job.generate else 0)
        with _session(repo, point, recompute) as session:
            session.keep_points(points, unaligned=unaligned)
            outcome = _run(repo, session, job, name, as_json)
            if repo.store.ref(repo.store.head) is None:
                repo.store.set_head(name)
            _report(outcome, as_json)
    return 130 if outcome.interrupted else 0


def _start(repo: Repository, branch: str | None, start: str | None) -> tuple[str, str | None]:
    """(the branch to move, the point to start from or None for an empty session)."""
    from thaw.repo.refs import require_own

    if start is None:
        name = require_own(repo.store, branch or repo.store.head)
        if repo.store.ref(name) is not None:
            return name, name
        _refuse_promised(repo, name)
        return name, None
    where = repo.resolve(start)
    chosen = branch or where.branch
    if chosen is None:
        raise InvalidRequest(
            f"{start} is not the tip of a branch: name a new branch to create there, with --branch NAME."
        )
    tip = repo.store.ref(chosen)
    if tip is not None and (tip.target != where.commit or not where.at_end):
        raise InvalidRequest(
            f"branch {chosen!r} already exists and {start} is not its tip. Choose a new name with --branch, or move "
            f"the branch first: thaw adopt {start} {chosen}."
        )
    return chosen, str(where)


def _refuse_promised(repo: Repository, name: str) -> None:
    """A branch that a remote has and that is not here yet is no new one: what is committed on it would never be
    pushed."""
    from thaw.remote import settings, tracking

    follows = settings.upstream(repo.store, name)
    there = [point for point in settings.promised(repo.store) if point.partition("/")[2] == name]
    if follows is not None and tracking.where(repo.store, follows.remote, follows.branch) is not None:
        there.append(tracking.name_of(follows.remote, follows.branch))
    if there:
        raise InvalidRequest(
            f"branch {name!r} is not here yet, only in the remote ({there[0]}): `thaw pull` brings it. To begin a "
            "branch of your own, give --branch NAME."
        )


def _session(repo: Repository, point: str | None, recompute: bool) -> Session:
    if point is None:
        return repo.session()
    with Progress("restoring the session"):
        return repo.session(point, policy="recompute" if recompute else "exact")


def _run(repo: Repository, session: Session, job: RunPlan, branch: str, quiet: bool) -> Outcome:
    if job.chat is not None:
        return _chat(session, job, job.chat, branch, quiet)
    for name in job.files:
        speak.read(session, prompts.from_file(name), name)
    completion, interrupted = None, False
    if job.generate:
        completion, interrupted = speak.generate(session, job.prompt, job.sampling, quiet=quiet)
    elif job.prompt:
        speak.read(session, job.prompt, "the prompt")
    return Outcome(_commit(session, job, branch), completion, session, interrupted)


def _chat(session: Session, job: RunPlan, talk: conversation.ChatOptions, branch: str, quiet: bool) -> Outcome:
    """The files and the prompt are one message; the session knows the conversation so far."""
    content = "\n\n".join([*(prompts.from_file(name) for name in job.files), *([job.prompt] if job.prompt else [])])
    if not content:
        raise InvalidRequest("--chat: the files are empty, so there is no message to answer.")
    if job.history is None:
        new, arguments = talk.messages(session, content), talk.arguments
    else:
        new, arguments = None, {**talk.arguments, "history": talk.after(job.history, content)}
    result, interrupted = speak.chat(session, new, job.sampling, quiet=quiet, **arguments)
    conversation.note(result)
    return Outcome(_commit(session, job, branch), result.completion, session, interrupted, result)


def _commit(session: Session, job: RunPlan, branch: str) -> CommitResult:
    said = f"read {', '.join(job.files)}" if job.files else "went on"
    text = job.message or output.one_line(job.prompt, 72) or said
    with Progress("committing"):
        return session.commit(text, branch=branch, with_weights=job.with_weights)


def _report(outcome: Outcome, as_json: bool) -> None:
    done, completion = outcome.commit, outcome.completion
    if as_json:
        output.print_json({**speak.plain(done, completion, outcome.session), **conversation.plain(outcome.chat)})
        return
    name = f"[{done.branch} {view.commit_id(done.commit)}]"
    read = f"{words.count(done.num_tokens, 'token')}, {words.nbytes(done.nbytes_written)} written"
    output.note(f"{name} {read}{speak.spoken(completion)}")
