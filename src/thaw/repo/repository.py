"""The repository: git's verbs over one store and, where something has to run, one engine.

This is the front desk: every verb is one call into the module that does it. Verbs that read (log, show, diff, match,
resolve) and move refs need no engine and load none. What a verb needs is imported by the verb: `thaw log` is a whole
process, and should not pay for sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core import cache, namespaces
from thaw.core.errors import Conflict, InvalidRequest, NotFound, RefConflict
from thaw.core.points import Point, check_name
from thaw.data.files import storage_errors
from thaw.repo import refs, resolve
from thaw.repo.context import Context
from thaw.repo.resolve import ResolvedPoint
from thaw.store import Ref, ReflogEntry, Store
from thaw.store.schema import DATABASE

if TYPE_CHECKING:
    from thaw.core.ids import ObjectId
    from thaw.engines.base import Engine, Policy
    from thaw.remote.forget import ForgetReport
    from thaw.remote.meter import TransferMeter
    from thaw.remote.report import RemoteGcReport, TransferReport
    from thaw.remote.settings import RemoteSettings
    from thaw.repo.diff import Diff
    from thaw.repo.drain import DrainReport
    from thaw.repo.group import Group
    from thaw.repo.hydrate import Hydration
    from thaw.repo.log import LogEntry
    from thaw.repo.rebase import Rebase
    from thaw.repo.report import VerifyReport
    from thaw.repo.session import Session
    from thaw.repo.settings import EngineSettings
    from thaw.repo.show import Shown
    from thaw.repo.stats import Stats
    from thaw.repo.undo import Undone
    from thaw.store import FsckReport, GcReport
    from thaw.weights import WeightsBook

PointLike = str | Point | ResolvedPoint
MAX_LIMIT = 1 << 31
"""Of a list's entries that may be asked for."""
MAX_KEEP_S = 10_000_000_000
"""Some 300 years."""


class Repository:
    """Open with `thaw.open`. Safe from any thread, bound to its process; leaving its `with` closes it."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def store(self) -> Store:
        return self._context.store

    @property
    def engine(self) -> Engine:
        """The engine. Raises `InvalidRequest` when there is none; boots it when it was given by name."""
        return self._context.engine

    @property
    def path(self) -> Path:
        return self.store.path

    # -- namespaces

    @property
    def namespace(self) -> str:
        """The namespace that it shows; "" is the default one."""
        return self.store.namespace

    def within(self, namespace: str) -> Repository:
        """This repository as a namespace sees it: refs, HEAD, history, `match` and stats are its own, and of others it
        can reach nothing, by whatever name or id. It need not exist yet. Valid until this one is closed.

        Raises `InvalidRequest` where the name can be none, or where this is a namespace already.
        """
        self._require_default("a namespace is entered")
        return Repository(self._context.within(namespace))

    def namespaces(self) -> list[str]:
        """The namespaces that have a branch or tag or had one, by name, without the default one."""
        self._require_default("namespaces are listed")
        return self.store.namespaces()

    def _require_default(self, what: str) -> None:
        if self.store.namespace:
            raise InvalidRequest(
                f"{what} from the whole repository, and this is the namespace {self.store.namespace!r} of it. Open the "
                "repository without a namespace."
            )

    def commits_of(self, session: Session) -> bool:
        """Whether the session commits here: to this repository and namespace."""
        return session.commits_to(self.store)

    # -- live sessions

    def session(
        self,
        point: PointLike | None = None,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        policy: Policy = "exact",
        stale_kv: bool = False,
        fetch: bool = False,
    ) -> Session:
        """A new session, or one that continues from `point`. From a branch's tip it stays on that branch.

        With `share_prefix` a session of a namespace shares blocks inside that namespace. With `fetch` the point is a
        remote's branch (`origin/main`), which is fetched first; the engine loads while it downloads.

        With `stale_kv` KV of other weights or another policy is taken as it is, and kept over every later policy step:
        what decides the next token is computed by the weights that run, over KV of those that were, and the session
        says which (`Session.keep_stale_kv`). Everything else about the model must be equal. Raises `Unsupported`.

        Hydrating raises `Refused` where the running model is another one, `Damaged` where bytes are wrong, `NotHit`
        where the engine did not take them. A session from inside a completion can be resumed.
        """
        from thaw.repo.hydrate import require_stale_kv
        from thaw.repo.params import check_seed
        from thaw.repo.session import Session

        check_seed(seed)
        if stale_kv:
            require_stale_kv(self.engine)
        if point is None:
            if self.store.namespace and (share_prefix or salt is not None):
                salt = self.store.salt(salt or "")
            if fetch:
                raise InvalidRequest("fetch=True needs the point to fetch: a remote's branch, as origin/main")
            with self._context.admission.beginning():
                ref = self.engine.open(seed=seed, salt=salt, share_prefix=share_prefix)
                if stale_kv:
                    self.engine.keep_stale_kv(ref)
                return Session(self._context, ref, stale_kv=stale_kv)
        if salt is not None:
            raise InvalidRequest("a session that goes on from a point keeps its lineage's salt; leave salt out")
        with self._context.admission.beginning():
            where, live = self._hydrated(
                point, fetch, seed=seed, share_prefix=share_prefix, policy=policy, stale_kv=stale_kv
            )
            return Session(
                self._context, live.session, kept=live.kept, parent=where.commit, branch=where.branch,
                proof=live.proof, num_inherited=where.num_tokens, stale_kv=stale_kv,
            )  # fmt: skip

    def fork(
        self,
        point: PointLike,
        n: int,
        *,
        replay: bool = False,
        policy: Policy = "exact",
        stale_kv: bool = False,
        fetch: bool = False,
    ) -> Group:
        """N sessions that continue from `point`: loaded once, shared by all, on no branch.

        Child i draws from derive(seed, position, i), the same in every process; with `replay` all keep the parent's
        seed. From inside a completion, `Group.resume()` continues with it. `stale_kv` and `fetch` as in `session`.
        """
        from thaw.repo.group import Group
        from thaw.repo.session import Session

        with self._context.admission.beginning():
            where, live = self._hydrated(point, fetch, policy=policy, stale_kv=stale_kv)
            try:
                children = self.engine.fork(live.session, n, replay=replay).result()
                for child in children if stale_kv else ():
                    self.engine.keep_stale_kv(child)
            finally:
                self.engine.close_session(live.session)
            sessions = [
                Session(
                    self._context, child, kept=live.kept, parent=where.commit, proof=live.proof,
                    num_inherited=where.num_tokens, stale_kv=stale_kv,
                )
                for child in children
            ]  # fmt: skip
            return Group(self._context, sessions)

    def drain(self, *, timeout_s: float = 60.0, why: str = "drain") -> DrainReport:
        """Let nothing begin any more, and store every live session of this repository and its namespaces.

        Generations stop at a token boundary and raise `Drained` with the point to continue at; prefills are awaited for
        up to half of `timeout_s`. Branches stay where they are. The report names what was not captured. Sessions can
        still be read and committed; `undrain` lets them go on. Raises `Busy` where it is drained already.
        """
        from thaw.repo.drain import drain

        self._require_default("an engine is drained")
        stalled = self._context.engine.stalled if self._context.has_engine else lambda: ""
        return drain(self._context.admission, timeout_s, why, stalled)

    def live_sessions(self) -> list[Session]:
        """The open sessions of this repository and its namespaces that somebody holds, oldest first."""
        return [session for session in self._context.admission.sessions() if session.is_open]

    @property
    def is_drained(self) -> bool:
        """Whether nothing may begin."""
        return bool(self._context.admission.closed)

    def undrain(self) -> bool:
        """Let work begin again; False where it was not drained."""
        self._require_default("an engine is drained")
        return self._context.admission.open()

    def _hydrated(
        self,
        point: PointLike,
        fetch: bool,
        *,
        seed: int | None = None,
        share_prefix: bool = False,
        policy: Policy,
        stale_kv: bool = False,
    ) -> tuple[ResolvedPoint, Hydration]:
        from thaw.repo import remotes

        if fetch or remotes.is_promised(self.store, point):
            from thaw.repo.arriving import fetched

            return fetched(
                self._context, point, seed=seed, share_prefix=share_prefix, policy=policy, stale_kv=stale_kv
            )  # fmt: skip
        from thaw.repo.hydrate import hydrate

        where = self.resolve(point)
        return where, hydrate(
            self._context, where, seed=seed, share_prefix=share_prefix, policy=policy, stale_kv=stale_kv
        )  # fmt: skip

    # -- looking

    def resolve(self, point: PointLike) -> ResolvedPoint:
        """The place that a point names. A remote's branch that `clone(refs_only=True)` left there is fetched now.
        Raises `BadPoint`, `NotFound`."""
        try:
            return resolve.resolve(self.store, point)
        except NotFound:
            from thaw.repo import remotes

            if not remotes.is_promised(self.store, point):
                raise
            remotes.keep_promise(self.store, str(point))
        return resolve.resolve(self.store, point)

    def at(self, point: PointLike, *, turn: int | None = None, token: int | None = None) -> ResolvedPoint:
        """The place after `turn` turns or `token` tokens of a commit."""
        return resolve.at(self.store, self.resolve(point).commit, turn=turn, token=token)

    def log(self, point: PointLike | None = None, *, all: bool = False, limit: int | None = None) -> list[LogEntry]:
        """Commits from `point` (default: HEAD), or from every branch and tag, newest first, children before parents."""
        from thaw.repo import log as logs

        _require_limit(limit)
        if all:
            return logs.log(self.store, logs.tips(self.store), limit)
        if point is None and self.store.ref(self.store.head) is None:
            return []
        return logs.log(self.store, [self.resolve("HEAD" if point is None else point).commit], limit)

    def show(self, point: PointLike = "HEAD") -> Shown:
        from thaw.repo import show

        return show.show(self.store, self.resolve(point))

    def diff(self, a: PointLike, b: PointLike) -> Diff:
        """Where two points part, in tokens, text and bytes."""
        from thaw.repo import diff as diffs

        return diffs.diff(self.store, self.resolve(a), self.resolve(b))

    def match(self, token_ids: Sequence[int]) -> ResolvedPoint | None:
        """The longest stored prefix of these tokens, as a point (perhaps inside a segment), or None. A commit's last
        token that has no KV yet may be left out, if another commit has the same KV.

        With an engine: of its model and policy. Without: of any model that something here was captured with.
        """
        from thaw.repo import match as matches

        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < 1 << 32:
            raise InvalidRequest(f"token ids from {min(token_ids)} to {max(token_ids)}: they are 0 to 2^32-1")
        models = [self._model()] if self._context.has_engine else self.store.models()
        return matches.match(self.store, models, token_ids)

    # -- refs

    def branches(self) -> list[Ref]:
        return self.store.refs("branch")

    def tags(self) -> list[Ref]:
        from thaw.remote import settings, tracking

        return tracking.without(self.store.refs("tag"), settings.read(self.store))

    def branch(self, name: str, point: PointLike = "HEAD") -> Ref:
        return refs.create(self.store, name, "branch", self.resolve(point))

    def tag(self, name: str, point: PointLike = "HEAD") -> Ref:
        return refs.create(self.store, name, "tag", self.resolve(point))

    def delete_branch(self, name: str) -> Ref:
        return refs.delete(self.store, name, "branch")

    def delete_tag(self, name: str) -> Ref:
        return refs.delete(self.store, name, "tag")

    def rename(self, old: str, new: str) -> Ref:
        return refs.rename(self.store, old, new)

    def reflog(self, name: str, *, limit: int | None = None) -> list[ReflogEntry]:
        """Moves of a branch or tag, newest first; a deleted one has its moves still. The current branch may have none
        yet; raises `NotFound` for any other without moves."""
        _require_limit(limit)
        found = self.store.reflog(check_name(name), limit=limit)
        if not found and limit != 0 and name != self.store.head:
            raise NotFound(
                f"there is no branch or tag {name!r}, and the reflog knows none{resolve.known_names(self.store)}"
            )
        return found

    def undo(self, name: str | None = None) -> Undone:
        """Take back the last move of a branch or tag (default: the current branch), and with each call one more.

        Nothing is deleted; see `thaw.repo.undo`. Raises `NotFound`, `RefConflict`, `Conflict`.
        """
        from thaw.repo.undo import undo

        return undo(self.store, self.store.head if name is None else name)

    def stats(self, *, prefill_tokens_per_s: float | None = None) -> Stats:
        """Bytes by branch, what sharing saves, tokens that forks did not read again, and at that rate the seconds."""
        from thaw.repo.stats import stats

        return stats(self.store, prefill_tokens_per_s=prefill_tokens_per_s)

    def adopt(self, winner: Session | PointLike, branch: str) -> Ref:
        """The winner becomes the branch; the old tip stays in its reflog. A session is committed first."""
        if not isinstance(winner, PointLike):
            if not self.commits_of(winner):
                raise InvalidRequest(
                    "the session commits to another repository or namespace; adopt it there, with session.adopt(branch)"
                )
            return Ref(name=branch, kind="branch", target=winner.adopt(branch).commit)
        where = self.resolve(winner)
        return refs.move(self.store, branch, where, f"adopt: {where}")

    @property
    def weights(self) -> WeightsBook:
        """The models and adapters that lie in the repository, for all of its namespaces."""
        from thaw.weights import WeightsBook

        return WeightsBook(self.store)

    # -- remotes

    def remotes(self) -> dict[str, RemoteSettings]:
        """The remotes by name."""
        from thaw.remote import settings

        return dict(sorted(settings.read(self.store).remotes.items()))

    def add_remote(self, name: str, url: str, options: dict[str, str | int | bool] | None = None) -> RemoteSettings:
        """Remember a remote: `s3://…`, `az://…`, `gs://…` (untested) or `file://…`.

        `options`: how it is reached, no credential. Nothing is asked of it yet. Raises `InvalidRequest`, `Conflict`.
        """
        from thaw.repo import remotes

        return remotes.add(self.store, name, url, options or {})

    def remove_remote(self, name: str) -> RemoteSettings:
        """Forget a remote and its tracking points; what lies there stays. Raises `NotFound`."""
        from thaw.repo import remotes

        return remotes.remove(self.store, name)

    def push(
        self,
        *names: str,
        remote: str | None = None,
        delete: bool = False,
        tags: bool = False,
        all: bool = False,
        force_with_lease: bool = False,
        set_upstream: bool = False,
        weights: bool = False,
        meter: TransferMeter | None = None,
    ) -> TransferReport:
        """Send branches and tags (default: the current branch) and what of their history the remote lacks.

        `remote`: default the branch's upstream, the only one, or `origin`. `all`: every branch; `tags`: every tag.
        `delete`: take them away there. A branch only moves forward, unless `force_with_lease` and the remote's stands
        where it was last seen. `weights`: send the weights sets that the pushed commits name, too. `meter` says how far
        it is, to any thread. A push that was killed continues with what it has sent.

        Raises `RefConflict` (nothing is lost: fetch, then decide), `RemoteError` kinds, `NotFound`.
        """
        from thaw.repo import remotes

        return remotes.push(
            self.store, names, remote, delete=delete, tags=tags, everything=all, force_with_lease=force_with_lease,
            set_upstream=set_upstream, weights=weights, meter=meter,
        )  # fmt: skip

    def fetch(
        self,
        *branches: str,
        remote: str | None = None,
        prune: bool = False,
        tags: bool = True,
        weights: bool = False,
        depth: int | None = None,
        unshallow: bool = False,
        meter: TransferMeter | None = None,
    ) -> TransferReport:
        """Bring branches (default: all) and tags here; `origin/main` is then a point. No local branch moves.

        `prune`: points of branches that were deleted there go. `weights`: fetch the weights sets that the fetched
        commits name, too, where the remote has them. `depth`: only the last so many commits of each branch and tag,
        each with all of its KV; the repository is shallow then, and a larger depth brings more. `unshallow`: all that
        is older, too. Raises `CorruptBlob` naming what is damaged, `NotFound`, `InvalidRequest`.
        """
        from thaw.repo import remotes

        return remotes.fetch(
            self.store, branches, remote, prune=prune, tags=tags, weights=weights, meter=meter, depth=depth,
            unshallow=unshallow,
        )  # fmt: skip

    def pull(
        self, branch: str | None = None, *, remote: str | None = None, meter: TransferMeter | None = None
    ) -> TransferReport:
        """Fetch a branch (default: the current one) and move it forward to where the remote has it.

        Raises `RefConflict` naming both commits where neither descends from the other.
        """
        from thaw.repo import remotes

        return remotes.pull(self.store, branch, remote, meter=meter)

    def remote_gc(
        self,
        name: str | None = None,
        *,
        dry_run: bool = False,
        grace_s: float | None = None,
        keep_reflog_s: float | None = None,
    ) -> RemoteGcReport:
        """Delete what no branch, tag or recent reflog entry of a remote reaches, in this namespace's part of it.

        The first call writes down what that is; one after the grace period (24 hours, by the store's clock) deletes it.
        Safe beside pushes and fetches. Raises `Busy`, `CorruptBlob`.
        """
        from thaw.repo import remotes

        for what, seconds in (("grace_s", grace_s), ("keep_reflog_s", keep_reflog_s)):
            if seconds is not None and not 0 <= seconds <= MAX_KEEP_S:
                raise InvalidRequest(f"{what}={seconds}: a number of seconds, 0 to {MAX_KEEP_S:,}")
        return remotes.collect(self.store, name, dry_run=dry_run, grace_s=grace_s, keep_reflog_s=keep_reflog_s)

    def forget_remote(self, *names: str, remote: str | None = None) -> ForgetReport:
        """Delete branches or tags of a remote with all that they alone reach, now: packs that hold something else too
        are rewritten, reflog entries go. What is here stays, but for the points `origin/NAME`.

        A branch that was deleted before can be forgotten still. The report says whether the bucket keeps older versions
        of what it deletes. Raises `NotFound`, `Conflict` where another branch has the commit too, `Busy`.
        """
        from thaw.repo import remotes

        return remotes.forget(self.store, names, remote)

    # -- checking and keeping

    def rebase(self, point: PointLike = "HEAD", *, branch: str | None = None, message: str = "") -> Rebase:
        """Replay a point's tokens under the weights that run now, and say how far their log probabilities moved.

        `branch`: keep it as a new branch too, which continues `point` under these weights: all its tokens and turns,
        prefilled again. Raises `RefConflict` where the branch exists, `InvalidRequest` where nothing was sampled.
        """
        from msgspec.structs import replace

        from thaw.repo.rebase import rebase

        where = self.resolve(point)
        if branch is not None and self.store.ref(refs.require_own(self.store, branch)) is not None:
            raise RefConflict(f"there is a branch or tag {branch!r} already; choose another name")
        found = rebase(self._context, where)
        if branch is None:
            return found
        with self.session(where, policy="recompute") as session:
            done = session.commit(message or f"rebased from {where}", branch=branch, expect=None)
        return replace(found, branch=branch, commit=done.commit)

    def verify(
        self,
        point: PointLike = "HEAD",
        *,
        engine: EngineSettings | None = None,
        num_tokens: int = 16,
        fresh_process: bool = True,
        timeout_s: float = 3600.0,
    ) -> VerifyReport:
        """Hydrate `point` in a fresh process (or in this engine) and say which laws held."""
        from thaw.repo import verify, verify_worker  # subprocess and tempfile: not for verbs that only look

        where = self.resolve(point)
        if not fresh_process:
            return verify.verify_in(self.engine, self._context, where, num_tokens=num_tokens)
        return verify_worker.verify_in_fresh_process(
            self.store, str(where), engine=engine, num_tokens=num_tokens, timeout_s=timeout_s
        )

    def encode_chat(self, text: str) -> tuple[int, ...]:
        """A rendered conversation's tokens, as the engine's codec gives them. They are remembered for a while, so that
        a chat that says this text need not encode it again."""
        return self._context.encode_chat(text)

    def require_room(self, num_tokens: int = 0) -> None:
        """For who is about to generate and commit so many tokens (the model's limit at most): that the disk has room.

        Raises `StorageFailed`; a full disk is then found before the work and not after it.
        """
        nbytes = 0
        if num_tokens:
            info = self.engine.info
            nbytes = min(num_tokens, info.max_model_len) * cache.token_nbytes(info.groups)
        self.store.require_room(nbytes)

    def gc(self, *, dry_run: bool = False, keep_reflog_s: float | None = None) -> GcReport:
        """Reclaim what no ref, recent reflog entry or lease of any namespace needs; safe beside running commits."""
        self._require_default("gc is run")
        if keep_reflog_s is None:
            return self.store.gc(dry_run=dry_run)
        if not 0 <= keep_reflog_s <= MAX_KEEP_S:
            raise InvalidRequest(f"keep_reflog_s={keep_reflog_s}: a number of seconds, 0 to {MAX_KEEP_S:,}")
        return self.store.gc(dry_run=dry_run, keep_reflog_s=keep_reflog_s)

    def fsck(self, *, rebuild: bool = False, deep: bool = True) -> FsckReport:
        self._require_default("fsck is run")
        return self.store.fsck(rebuild=rebuild, deep=deep)

    def engine_settings(self) -> EngineSettings | None:
        """The engine that the repository was last used with."""
        from thaw.repo import settings

        return settings.recall(self.store)

    def close(self) -> None:
        """Close the repository, and the engine if it was booted here. Live sessions belong to the engine."""
        self._context.close()

    def _model(self) -> ObjectId:
        from thaw.core import objects

        return objects.encode(self.engine.identity())[0]

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        store = self._context.store
        return f"<Repository {store.path}{f' of {store.namespace}' if store.namespace else ''}>"


def init(path: str | Path, *, engine: Engine | EngineSettings | None = None) -> Repository:
    """A new, empty repository, and its reserve. Raises `Conflict` where there is one, `StorageFailed`."""
    store = Store.init(Path(path))
    store.require_room()
    return Repository(Context(store, engine))


def open(
    path: str | Path,
    *,
    engine: Engine | EngineSettings | None = None,
    create: bool | None = None,
    namespace: str | None = None,
) -> Repository:
    """Open a repository, making it where there is none if `create` (default: only when an engine is given). A folder
    that is none but has a `.thaw`, as `thaw init` makes it, means that one.

    `engine`: a running one, or the settings to boot it by when it is first needed. `namespace`: whose refs and commits
    it shows (`Repository.within`); None is the default one. Raises `InvalidRequest` where it cannot name one.
    """
    folder = _found(Path(path))
    make = engine is not None if create is None else create
    if namespace is not None:
        namespaces.check(namespace)
    return Repository(Context(_opened(folder, make, namespace), engine))


def clone(
    url: str,
    path: str | Path,
    *,
    engine: Engine | EngineSettings | None = None,
    branch: str | None = None,
    single_branch: bool = False,
    refs_only: bool = False,
    depth: int | None = None,
    namespace: str | None = None,
    remote: str = "origin",
    options: dict[str, str | int | bool] | None = None,
    weights: bool = False,
    meter: TransferMeter | None = None,
) -> Repository:
    """A new repository in `path` from a remote, which is called `remote` in it.

    `branch`: the one to start on (default: the remote's); with `single_branch` no other is fetched. With `refs_only`
    none is, and no local branch is made: `origin/main` is fetched by the first verb that names it. `depth`: as
    `Repository.fetch`. `namespace`: whose part of the remote. `options`: as `Repository.add_remote`. `weights`: as
    `Repository.fetch`, once the rest is here. What fails leaves nothing behind, but for weights that did not come:
    `fetch(weights=True)` continues with them. Raises `NotFound`, `Conflict`, `CorruptBlob`, `RemoteError` kinds.
    """
    from thaw.repo import remotes

    remotes.clone(
        url, Path(path), options or {}, remote=remote, branch=branch, single_branch=single_branch, namespace=namespace,
        weights=weights, meter=meter, refs_only=refs_only, depth=depth,
    )  # fmt: skip
    return open(path, engine=engine, create=False, namespace=namespace)


def _found(folder: Path) -> Path:
    """`folder`, or the `.thaw` in it. Never both: a second repository beside a `.thaw` would hide its commits."""
    inner = folder / ".thaw"
    with storage_errors(str(folder)[:200], "look into"):
        if (folder / DATABASE).is_file() or (folder / "packs").is_dir():
            return folder
        return inner if (inner / DATABASE).is_file() or (inner / "packs").is_dir() else folder


def _opened(folder: Path, make: bool, namespace: str | None) -> Store:
    try:
        store = Store.open(folder)
    except NotFound:
        if not make:
            raise
        try:
            store = Store.init(folder)
            store.require_room()
        except Conflict:
            store = Store.open(folder)  # another process made it just now
    return store if namespace is None else store.within(namespace)


def _require_limit(limit: int | None) -> None:
    if limit is not None and not 0 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit={limit}: a count, 0 to {MAX_LIMIT}")
