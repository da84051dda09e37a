"""What the tree's pages show of one tenant: outlines kept between requests, and fragments made from them.

Everything here is blocking, and is called on a thread; it sees the tenant's namespace of the repository alone.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from thaw.core.errors import BadPoint, NotFetched, NotFound, ThawError
from thaw.core.ids import CommitId
from thaw.engines.base import Codec
from thaw.gateway.browser import forms
from thaw.gateway.job import ReplyJob
from thaw.gateway.service import Service
from thaw.gateway.tenants import Tenant
from thaw.remote import settings
from thaw.repo import resolve
from thaw.repo.repository import Repository
from thaw.repo.resolve import ResolvedPoint
from thaw.tree import page, parts
from thaw.tree.details import PointShown, read_point
from thaw.tree.markup import Html, el, join
from thaw.tree.outline import Outline, OutlineHistory
from thaw.tree.parts import FragmentRoom, Living, RowMaker, Unfolded

ROWS_AGAIN = 600
"""Sessions that a page which somebody unfolded is given anew, at most."""


class TenantView:
    """The tree as a tenant sees it now. Safe from any thread."""

    def __init__(self, repo: Repository, namespace: str) -> None:
        self.repo, self.namespace = repo, namespace
        self._history = OutlineHistory(repo)
        self._lock = threading.Lock()
        self._made: tuple[str, Outline] | None = None

    def use(self, repo: Repository) -> None:
        """From now on read this one, which shows the same."""
        self.repo = repo
        self._history.use(repo)

    def outline(self, service: Service) -> Outline:
        """Of what branches and tags reach, and the responses that the gateway keeps."""
        version, points = self._version(service)
        with self._lock:
            if self._made is None or self._made[0] != version:
                self._made = (version, self._history.outline(points))
            return self._made[1]

    def version(self, service: Service, living: Living, running: Sequence[str]) -> str:
        """Another one whenever the tree would look different, or other requests are `running`."""
        return _digest(self._version(service)[0], sorted(living.items(), key=lambda one: one[0]), running)

    def _version(self, service: Service) -> tuple[str, list[CommitId]]:
        points = [CommitId(point) for _, _, point in service.ledger.points(self.namespace)]
        store = self.repo.store
        refs = [(ref.name, ref.kind, ref.target) for ref in store.refs()]
        remotes = (store.get_setting(settings.KEY), sorted(store.absent().items()))
        return _digest(store.head, refs, points, remotes), points

    def rows(self, outline: Outline, living: Living, selected: CommitId | None = None) -> RowMaker:
        return RowMaker(
            outline, self._history, link=_link, living=living, selected=selected, now_s=time.time()
        )  # fmt: skip

    def tree(self, outline: Outline, living: Living, unfolded: Unfolded, selected: CommitId | None) -> Html:
        if not outline.commits:
            return el("p", "No commits yet. A request to the API creates the first one.", id="tree", class_="empty")
        return self.rows(outline, living, selected).tree(unfolded)

    def first_tree(self, outline: Outline, living: Living, selected: CommitId | None) -> Html:
        if not outline.commits:
            return self.tree(outline, living, parts.unfold(outline), selected)
        return self.rows(outline, living, selected).first_tree()[0]

    def totals(self, outline: Outline) -> Html:
        return parts.totals(outline, None if self.namespace else self.repo.store.usage().blob_nbytes)

    def commit(self, outline: Outline, name: str) -> CommitId | None:
        """The commit that a point names, if it is in the tree."""
        away = outline.elsewhere(name)
        if away is not None:
            return away.id
        try:
            found = self._resolve(outline, name).commit
        except (BadPoint, NotFound):
            return None
        return found if found in outline.commits else None

    def _resolve(self, outline: Outline, name: str) -> ResolvedPoint:
        """What is here of that name: looking at a page fetches nothing. Raises `NotFetched` for what a remote has."""
        away = outline.elsewhere(name)
        if away is not None:
            raise NotFetched(f"{name} is only on {away.only_on}, and was not fetched")
        return resolve.resolve(self.repo.store, name)

    def point(self, outline: Outline, name: str, codec: Codec, csrf: str, living: Living) -> Html:
        """One point in full, with what can be done from it. Raises what reading it raises."""
        away = outline.elsewhere(name)
        if away is not None:
            return parts.not_fetched(outline, away)
        seen = time.time_ns()
        point = read_point(self.repo, self._resolve(outline, name), codec)
        commit = point.shown.point.commit
        inside = commit in outline.commits
        names = outline.names.get(commit, ())
        session = outline.session(outline.first_of(commit)) if inside else None
        compare = el("button", "Compare with …", type="button", class_="compare", data_point=point.name)
        memories = living[commit].memories if commit in living else ()
        own_names = [one for one in names if one not in outline.remote_names]
        return join(
            parts.point_head(
                point, names, parts.where(outline, commit, memories) if inside else "", self._model_name(point)
            ),
            forms.actions(point, own_names, csrf, [ref.name for ref in self.repo.branches()], compare, seen),
            None if session is None else parts.commit_list(outline, session, commit, _link),
            parts.point_body(point, FragmentRoom(), can_fork=True),
        )

    def _model_name(self, point: PointShown) -> str | None:
        """How the model that runs is called, where it is the point's."""
        engine = self.repo.engine
        try:
            same = engine.identity().weights == point.shown.model.weights
        except ThawError:  # it may have stopped; the point can be read all the same
            return None
        return Path(engine.info.model).name or None if same else None

    def diff(self, outline: Outline, a: str, b: str) -> Html:
        left, right = self._resolve(outline, a), self._resolve(outline, b)
        return parts.diff_part(
            self.repo.diff(left, right), self._title(outline, a, left), self._title(outline, b, right)
        )

    def _title(self, outline: Outline, name: str, point: ResolvedPoint) -> str:
        """The names of a point's commit, if it is the end of one that has some; else the point as it was asked for."""
        names = outline.names.get(point.commit, ()) if point.at_end else ()
        return ", ".join(names[: parts.NAMES]) or name

    def running(self, jobs: Sequence[ReplyJob]) -> Html:
        """Requests under way. Called by the event loop that runs them."""
        shown = [
            parts.RunningShown(
                name=job.name,
                branch=job.asked.branch,
                note=job.asked.note,
                parent=None if job.parent is None else CommitId(job.parent),
                tail=job.last_text(parts.TAIL)[-parts.TAIL :],
            )
            for job in jobs
        ]
        return parts.running(shown, _link)

    def whole(
        self, outline: Outline, living: Living, codec: Codec, csrf: str, at: str | None,
        other: str | None, running: Html, version: str,
    ) -> Html:  # fmt: skip
        """The first page. A point that cannot be shown costs its own part alone."""
        selected = None if at is None else self.commit(outline, at)
        detail = el("p", page.HINT, class_="hint", data_said=page.KEYS)
        if at is not None:
            try:
                detail = (
                    self.point(outline, at, codec, csrf, living) if other is None else self.diff(outline, at, other)
                )
            except ThawError as error:
                detail = parts.problem(error)
        title = page.title_of(self.repo)
        frame = page.frame(
            title,
            self.totals(outline),
            self.first_tree(outline, living, selected),
            detail,
            account=forms.logout(csrf),
            running=running,
            foot=Html("Newer sessions come first. docs/tree.md says what is shown."),
        )
        return page.document(title, page.server_head(), frame, data_mode="server", data_version=version)


class TenantViews:
    """Of each namespace that somebody looked at."""

    def __init__(self) -> None:
        self._views: dict[str, TenantView] = {}

    def of(self, service: Service, tenant: Tenant) -> TenantView:
        """The tenant's, over the repository as it is open now: another engine brings another one."""
        repo = service.within(tenant).sync
        view = self._views.setdefault(tenant.namespace, TenantView(repo, tenant.namespace))
        view.use(repo)
        return view


def _link(point: str) -> str:
    return f"/?at={point}"


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()[:32]
