"""The golden repository of namespaces stays readable, also rebuilt, and each namespace sees its own alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import thaw
from thaw.store import fsck

HERE = Path(__file__).parent
KNOWN = json.loads((HERE / "namespaces.json").read_text())
TEXT = ("The same text for everybody. " * 11)[:300]


@pytest.mark.parametrize("lost", [(), ("thaw.db",), ("thaw.db", "refs.json")], ids=str)
def test_it_is_whole_and_each_namespace_goes_on(tmp_path: Path, lost: tuple[str, ...]) -> None:
    path = Path(shutil.copytree(HERE / "namespaces", tmp_path / "namespaces"))
    for name in lost:
        (path / name).unlink()
    if lost:
        assert fsck(path, rebuild=True).ok
    assert fsck(path).problems == []
    tips = {"": "main", "acme": "main", "bolt": "side"}
    with thaw.load_engine("fake") as engine, thaw.open(path, engine=engine) as repo:
        assert repo.namespaces() == ["acme", "bolt"]
        for namespace, branch in tips.items():
            there = repo.within(namespace) if namespace else repo
            found = {ref.name: ref.target for ref in there.branches()}
            assert found == {branch: KNOWN[namespace][branch]}
            with there.session(branch) as session:
                assert session.text.startswith(TEXT) and session.proof is not None and session.proof.hit
                match = there.match(session.tokens)
                assert match is not None and match.commit == KNOWN[namespace][branch]
            others = {one for name, refs in KNOWN.items() if name != namespace for one in refs.values()}
            assert not any(there.store.has(one) for one in others)
        if "refs.json" not in lost:
            assert repo.within("bolt").store.head == "side" and repo.within("acme").tags()[0].name == "v1"
