"""Weights go to a remote and come back with the commits that need them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from weights_models import LAYER, commit_text, forked, going_on, nudged, rewrite

import thaw
from thaw.cli.app import run
from thaw.core.errors import CorruptBlob, NotFound
from thaw.repo import Repository

Make = Callable[..., Path]


@pytest.fixture
def pushed(tmp_path: Path, own_model: Make) -> tuple[str, tuple[object, object]]:
    """The address of a remote with a commit and its weights, beside those of a fine-tune that no commit names; and what
    the commit's session said. Nothing else is left."""
    url = f"file://{tmp_path / 'remote'}"
    expected = commit_text(tmp_path / "first", own_model(), with_weights=True)
    with thaw.open(tmp_path / "first", create=False) as repo:
        repo.weights.add(rewrite(own_model("tuned"), nudged(LAYER)))
        repo.add_remote("origin", url)
        report = repo.push("main", weights=True)
        assert [ref.name for ref in report.refs] == ["main", "thaw.weights/base"]
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "base")
    return url, expected


def test_a_clone_with_weights_goes_on_bitwise(tmp_path: Path, pushed: tuple[str, tuple[object, object]]) -> None:
    url, expected = pushed
    with thaw.clone(url, tmp_path / "clone", weights=True) as repo:
        assert [one.name for one in repo.weights.list()] == ["base"]
        assert repo.gc(keep_reflog_s=0).blobs_removed == 0 and repo.fsck().ok
        model = repo.weights.model("base")
    with going_on(tmp_path / "clone", model) as repo:
        assert forked(repo) == expected


def test_weights_come_only_where_they_are_asked_for(tmp_path: Path, pushed: tuple[str, object]) -> None:
    with thaw.clone(pushed[0], tmp_path / "clone") as repo:
        assert repo.weights.list() == []
        before = repo.store.usage().pack_nbytes
        report = repo.fetch(weights=True)
        assert [ref.name for ref in report.refs if ref.outcome == "new"] == ["thaw.weights/base"]
        assert repo.store.usage().pack_nbytes - before >= repo.weights.list()[0].nbytes
        assert repo.fetch(weights=True).nbytes == 0


def test_what_the_remote_has_is_not_sent_again(tmp_path: Path, repo: Repository, own_model: Make) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
    base, tuned = own_model("base", **shape), rewrite(own_model("tuned", **shape), nudged(LAYER))
    repo.add_remote("origin", f"file://{tmp_path / 'remote'}")
    sent = []
    for name, folder in (("base", base), ("tuned", tuned)):
        with going_on(repo.path, folder) as own, own.session() as session:
            session.append("text")
            session.commit("read", branch=name, with_weights=True)
            sent.append(own.push(name, weights=True).nbytes)
    changed = 512 * 1024 * 4
    assert changed <= sent[1] < 1.2 * changed < sent[0]
    assert repo.push("tuned", weights=True).nbytes == 0


def test_weights_that_are_not_here_are_not_pushed(tmp_path: Path, own_model: Make) -> None:
    commit_text(tmp_path / "repo", own_model())
    with thaw.open(tmp_path / "repo", create=False) as repo:
        repo.add_remote("origin", f"file://{tmp_path / 'remote'}")
        with pytest.raises(NotFound, match=r"are not in this repository: add the model"):
            repo.push("main", weights=True)


def test_a_changed_byte_in_the_remote_is_found(tmp_path: Path, pushed: tuple[str, object]) -> None:
    packs = sorted((tmp_path / "remote" / "ns" / "thaw.weights").rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(packs[-1].read_bytes())
    data[len(data) // 2] ^= 1
    packs[-1].chmod(0o600)
    packs[-1].write_bytes(data)
    with thaw.clone(pushed[0], tmp_path / "clone") as repo:
        with pytest.raises(CorruptBlob, match="are not what was pushed"):
            repo.fetch(weights=True)
        assert repo.weights.list() == []


def test_the_weights_of_a_remote_are_a_namespace_of_it(tmp_path: Path, pushed: tuple[str, object]) -> None:
    """So its verbs reach them: a set is deleted there as a tag is."""
    with thaw.clone(pushed[0], tmp_path / "clone", weights=True) as repo:
        own = repo.within("thaw.weights")
        assert [ref.name for ref in own.tags()] == ["base"]
        own.push("base", remote="origin", delete=True)
    with thaw.clone(pushed[0], tmp_path / "again", weights=True) as repo:
        assert repo.weights.list() == []


def test_a_set_that_is_nothing_here_is_deleted_there_all_the_same(tmp_path: Path, pushed: tuple[str, object]) -> None:
    with thaw.clone(pushed[0], tmp_path / "clone") as repo:
        own = repo.within("thaw.weights")
        assert own.tags() == []
        with pytest.raises(NotFound, match="no branch 'none-such'"):
            own.push("none-such", remote="origin", delete=True)
        own.push("base", remote="origin", delete=True)
    with thaw.clone(pushed[0], tmp_path / "again", weights=True) as repo:
        assert repo.weights.list() == []


def test_a_clone_says_which_model_to_name(
    tmp_path: Path, pushed: tuple[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["clone", pushed[0], str(tmp_path / "plain")]) == 0
    plain = capsys.readouterr()
    assert "--model PATH" in plain.err and "thaw:base" not in plain.err
    assert run(["clone", "--weights", pushed[0], str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr()
    assert "--model thaw:base" in whole.err and "thaw.weights/1" not in whole.err
