"""Namespaces travel apart: a fetch takes nothing that another namespace stored, whatever a manifest says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hosts import kv_of

import thaw
from thaw import Sampling
from thaw.core.errors import CorruptBlob, InvalidRequest, NotFound
from thaw.core.ids import digest
from thaw.engines.base import Engine
from thaw.remote import layout, manifest, refs
from thaw.remote.folder import FolderBucket
from thaw.remote.layout import NamespaceBucket
from thaw.repo import Repository

TEXT = "what one tenant read. " * 40


def read_in(repo: Repository, text: str) -> None:
    with repo.session(seed=1) as s:
        s.append(text)
        s.commit("read it", branch="main")


def test_each_namespace_has_a_part_of_the_remote_for_itself(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    read_in(here, TEXT)
    acme = here.within("acme")
    read_in(acme, TEXT + "Acme's.")
    sent = acme.push("main")
    assert [path.name for path in (bucket / "ns").iterdir()] == ["acme"] and not (bucket / "default").exists()
    here.push("main")
    assert here.log("origin/main")[0].commit != acme.log("origin/main")[0].commit
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, namespace="acme") as there:
        assert kv_of(there.store, there.resolve("main").commit) == kv_of(acme.store, acme.resolve("main").commit)
        assert len(list(there.store.commits())) == 1 and sent.num_commits == 1
        with there.fork("main", 2) as kids:
            assert all(proof.hit and proof.num_recomputed_tokens == 0 for proof in kids.proofs)
            kids.generate("Go on.", Sampling(max_tokens=4, ignore_eos=True))
    with thaw.open(tmp_path / "there", engine=far_engine) as whole:
        assert whole.namespaces() == ["acme"] and whole.log() == []
        assert whole.fsck().ok
    with pytest.raises(NotFound):
        acme.fetch("fork/0")
    with pytest.raises(InvalidRequest):
        thaw.clone(bucket.as_uri(), tmp_path / "no", namespace="../x")


def test_a_commit_of_another_namespace_is_refused(here: Repository, bucket: Path) -> None:
    """Its ref is put where another namespace looks for its own."""
    read_in(here, TEXT)
    here.push("main")
    whole = FolderBucket(bucket)
    ours, theirs = NamespaceBucket(whole, ""), NamespaceBucket(whole, "acme")
    standing = refs.read(ours, "branch", "main")
    assert standing is not None and standing.ref.manifest is not None and standing.ref.commit is not None
    plain = manifest.read(ours, standing.ref.manifest, standing.ref.commit, "")
    for pack in plain.packs:
        found = ours.read(pack.key)
        assert found is not None
        theirs.put(pack.key, found.data)
    plant(theirs, plain, "main")
    plant(theirs, msgspec.structs.replace(plain, namespace="acme"), "other")
    for branch, said in (("main", "in namespace ''"), ("other", "is of namespace ''")):
        with pytest.raises(CorruptBlob, match=said):
            here.within("acme").fetch(branch)
    assert here.within("acme").log() == []


def plant(part: NamespaceBucket, value: manifest.Manifest, branch: str) -> None:
    """Makes a branch at a manifest that was written by hand."""
    data = manifest.encode(value)
    key = layout.manifest_key(0, digest(data))
    part.put(key, data)
    standing = refs.place(part, "branch", branch)
    assert refs.move(part, standing, value.commit, key, "by hand")


def test_kv_that_only_another_namespace_stored_is_not_taken(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    """A host has the bytes in its default namespace. In acme a manifest names them and gives none: whoever knew a hash
    could read what is behind it. Where the manifest gives them they are fetched, as if nobody here had them."""
    with thaw.open(tmp_path / "giver", engine=far_engine) as giver:
        giver.add_remote("origin", bucket.as_uri())
        read_in(giver.within("acme"), TEXT)
        giver.within("acme").push("main")
    part = NamespaceBucket(FolderBucket(bucket), "acme")
    standing = refs.read(part, "branch", "main")
    assert standing is not None and standing.ref.manifest is not None and standing.ref.commit is not None
    whole = manifest.read(part, standing.ref.manifest, standing.ref.commit, "acme")
    plant(part, msgspec.structs.replace(whole, blobs=whole.blobs[1:]), "stolen")
    read_in(here, TEXT)  # the same bytes, of another owner
    with here.store.database.read() as connection:
        stored = {row[0] for row in connection.execute("SELECT id FROM blobs")}
    assert {blob.id for blob in whole.blobs} <= stored, "this host has what the manifest names"
    acme = here.within("acme")
    with pytest.raises(CorruptBlob, match="do not list"):
        acme.fetch("stolen")
    assert acme.log() == [] and acme.store.refs() == []
    got = acme.fetch("main")
    assert got.blob_nbytes == sum(blob.nbytes for blob in whole.blobs), "all of it came from the remote"
