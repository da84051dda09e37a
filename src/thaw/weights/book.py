"""The weights of a repository: what `repo.weights` is, and the command line's verbs call."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thaw.core.errors import Busy, InvalidRequest
from thaw.core.ids import CommitId, short
from thaw.engines.hf.stored import WeightsManifest
from thaw.store import RefUpdate, Store
from thaw.weights import adding, folder, record
from thaw.weights.adding import AddedWeights
from thaw.weights.record import WeightsEntry


class ShownWeights(msgspec.Struct, frozen=True, kw_only=True):
    """A set with its manifest. `commits`: how many stored commits were captured from a model that runs these weights;
    `shared_nbytes`: of its tensors, those that another set has too."""

    entry: WeightsEntry
    manifest: WeightsManifest
    num_commits: int
    shared_nbytes: int


class WeightsBook:
    """The weights sets of a store, for all of its namespaces. From any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(
        self,
        model: str | Path,
        name: str | None = None,
        *,
        dtype: str | None = None,
        base: str | None = None,
        link: bool = False,
    ) -> AddedWeights:
        """Put the model in the folder `model` (or a hub id that was fetched) into the store, under `name` (default: the
        folder's). Tensors that are here already are not written again. `dtype`: what the model runs in, by default its
        config's. A folder with an adapter_config.json is an adapter; `base`: the weights set or id it was trained on.
        `link`: leave the tensors in the folder, which must stay as it is; every load verifies them.

        On disk on return; on an error nothing is left. Raises `IncompleteModel`, `Unsupported` (no safetensors),
        `Conflict` (another set has the name), `NotFound`.
        """
        known = None if base is None else base if len(base) == 67 else record.find(self._store, base).weights
        return adding.add(self._store, model, name, dtype=dtype, base=known, link=link)

    def list(self) -> list[WeightsEntry]:
        """All sets by name."""
        return record.entries(self._store)

    def show(self, name: str) -> ShownWeights:
        """A set by its name or the first digits of its weights id. Raises `NotFound`, `CorruptBlob`."""
        entry = record.find(self._store, name)
        manifest = self._manifest(entry)
        blobs = {one.blob: one.nbytes for one in manifest.tensors.values()}
        others: set[str | None] = set()
        for other in self.list():
            if other.name != entry.name:
                others.update(one.blob for one in self._manifest(other).tensors.values())
        return ShownWeights(
            entry=entry, manifest=manifest, num_commits=sum(1 for _ in record.users(self._store, entry.weights)),
            shared_nbytes=sum(nbytes for blob, nbytes in blobs.items() if blob in others),
        )  # fmt: skip

    def rm(self, name: str, *, force: bool = False) -> WeightsEntry:
        """Take a set away. Its bytes go with a later gc, once no other set shares them and no reflog entry names it.

        Raises `Busy` while a stored commit names these weights and no other set has them, unless `force`.
        """
        entry = record.find(self._store, name)
        if not force:
            self._require_unused(entry)
        reason = f"weights rm: {entry.name}"
        record.view(self._store).update_refs(
            RefUpdate(
                name=entry.name, kind="tag", target=None, expect=CommitId(entry.commit), reason=reason
            )
        )  # fmt: skip
        folder.remove_engine_folder(self._store, entry.name)
        return entry

    def _require_unused(self, entry: WeightsEntry) -> None:
        if any(one.weights == entry.weights and one.name != entry.name for one in self.list()):
            return
        found = next(record.users(self._store, entry.weights), None)
        if found is None:
            return
        namespace, commit = found
        who = f"commit {short(commit)}" if namespace == self._store.namespace else "a commit of another namespace"
        raise Busy(
            f"{who} was captured from the weights {entry.name!r} ({short(entry.weights)}) and continues only with "
            "them. Keep the set, or remove it anyway with --force (force=True)."
        )

    def checkout(self, name: str, to: str | Path) -> int:
        """Write a set into a plain folder with safetensors, for programs that know nothing of thaw; every byte is
        verified. Bytes of tensors written. Raises `Conflict` where the folder is not empty."""
        return folder.checkout(self._store, record.find(self._store, name), Path(to).expanduser().resolve())

    def model(self, name: str) -> Path:
        """The folder by which an engine opens the set: `thaw.load_engine("transformers", model=repo.weights.model(…))`.
        It lies in the repository and has no tensors. Raises `NotFound`, `InvalidRequest` for an adapter."""
        entry = record.find(self._store, name.removeprefix(folder.SCHEME))
        if entry.kind != "model":
            raise InvalidRequest(
                f"{entry.name} is an adapter. Check it out (thaw weights checkout {entry.name} DIR) and merge it into "
                "its model, or name the folder to an engine that serves adapters"
            )
        return folder.engine_folder(self._store, entry)

    def _manifest(self, entry: WeightsEntry) -> WeightsManifest:
        return record.manifest(record.view(self._store), CommitId(entry.commit))
