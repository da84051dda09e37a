"""`verify` in a fresh process: `python -m thaw.repo.verify_worker`, a request on stdin, a report on stdout, both JSON.

Nothing of the asking process is inherited but its environment: what is verified is what is on disk. Options of the
engine travel on stdin, so that no command line shows them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from thaw.core import errors
from thaw.core.errors import EngineDied, InvalidRequest, ThawError, TimedOut
from thaw.data.fresh_process import with_this_thaw
from thaw.repo.report import VerifyReport
from thaw.repo.settings import EngineSettings, recall
from thaw.store import Store

TIMEOUT_S = 3600.0


class VerifyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to verify, where, in which engine; `num_tokens` greedy tokens of continuation."""

    repository: str
    namespace: str = ""
    point: str
    engine: EngineSettings
    num_tokens: int = 16


class VerifyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A report, or the kind and message of the error that prevented one."""

    report: VerifyReport | None = None
    error_kind: str = ""
    error: str = ""


def verify_in_fresh_process(
    store: Store,
    point: str,
    *,
    engine: EngineSettings | None = None,
    num_tokens: int = 16,
    timeout_s: float = TIMEOUT_S,
) -> VerifyReport:
    """Run the worker. `engine` None takes the engine that the repository remembers. Raises what the worker met."""
    wanted = engine or recall(store)
    if wanted is None:
        raise InvalidRequest("no engine has used this repository yet; name one (engine=…, --engine NAME --model PATH)")
    request = VerifyRequest(
        repository=str(store.path.resolve()), namespace=store.namespace, point=point, engine=wanted,
        num_tokens=num_tokens,
    )  # fmt: skip
    command = [sys.executable, "-m", "thaw.repo.verify_worker"]
    try:
        done = subprocess.run(
            command, input=msgspec.json.encode(request), capture_output=True, timeout=timeout_s,
            env=with_this_thaw(os.environ),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimedOut(f"verify: no report within {timeout_s} s; the process was ended") from None
    try:
        answer = msgspec.json.decode(done.stdout.rpartition(b"\n")[2] or done.stdout, type=VerifyAnswer)
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise EngineDied(f"verify: the process ended with code {done.returncode}: {''.join(last)[:300]}") from None
    if answer.report is None:
        raise _error_of(answer)
    return answer.report


def main() -> int:
    """Answer one request; the exit code is 0 whenever an answer was written."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    try:
        answer = VerifyAnswer(report=_verify(msgspec.json.decode(sys.stdin.buffer.read(), type=VerifyRequest)))
    except ThawError as error:
        answer = VerifyAnswer(error_kind=error.kind, error=str(error))
    with out:
        out.write(msgspec.json.encode(answer))
    return 0


def _verify(request: VerifyRequest) -> VerifyReport:
    from thaw.engines import load_engine
    from thaw.repo.context import Context
    from thaw.repo.resolve import resolve
    from thaw.repo.verify import verify_in

    with Store.open(Path(request.repository)) as whole:
        store = whole.within(request.namespace) if request.namespace else whole
        point = resolve(store, request.point)
        with load_engine(request.engine.name, **request.engine.options) as engine:
            report = verify_in(engine, Context(store), point, num_tokens=request.num_tokens)
    return msgspec.structs.replace(report, fresh_process=True)


def _error_of(answer: VerifyAnswer) -> ThawError:
    """The worker's error as the same class here."""
    for found in vars(errors).values():
        if isinstance(found, type) and issubclass(found, ThawError) and found.kind == answer.error_kind:
            return found(answer.error)
    return ThawError(answer.error)


if __name__ == "__main__":
    sys.exit(main())
