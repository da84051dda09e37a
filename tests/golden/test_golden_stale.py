"""The golden repository of KV that was kept over policy steps stays readable, also rebuilt, and goes on as it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import thaw
from thaw import Sampling
from thaw.core import canonical
from thaw.core.errors import NewerFormat, PolicyMismatch
from thaw.core.objects import StaleState
from thaw.store import Store, fsck

HERE = Path(__file__).parent
KNOWN = json.loads((HERE / "stale.json").read_text())
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("lost", [(), ("thaw.db",), ("thaw.db", "refs.json")], ids=str)
def test_it_is_whole_and_goes_on_as_it_did(tmp_path: Path, lost: tuple[str, ...]) -> None:
    path = Path(shutil.copytree(HERE / "stale", tmp_path / "stale"))
    for name in lost:
        (path / name).unlink()
    if lost:
        assert fsck(path, rebuild=True).ok
    assert fsck(path).problems == []
    with thaw.load_engine("fake", seed=2, policy="2") as engine, thaw.open(path, engine=engine) as repo:
        assert [entry.commit for entry in repo.log("main")] == KNOWN["commits"][::-1]
        assert [(one.start, one.end, one.policy) for one in repo.show("main").kv_ranges] == [
            (0, 299, "0"), (299, 307, "1"), (307, 318, "2"),
        ]  # fmt: skip
        with pytest.raises(PolicyMismatch):
            repo.session("main")
        with repo.session("main", stale_kv=True) as session:
            answer = session.generate(sampling=GREEDY)
            assert (list(answer.token_ids), list(answer.logprobs)) == (KNOWN["answer"], KNOWN["logprobs"])
            assert repo.match(session.tokens) is None


def test_a_thaw_from_before_refuses_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copytree(HERE / "stale", tmp_path / "stale"))
    with Store.open(path) as store:
        tip = store.get(KNOWN["commits"][-1])
        found = store.get(tip.state)  # type: ignore[union-attr]
        assert isinstance(found, StaleState)
    data = canonical.encode(found)
    monkeypatch.setattr(canonical, "NEWEST", {**canonical.NEWEST, "thaw.state": 1})
    with pytest.raises(NewerFormat, match=r"thaw\.state/2: written by a newer thaw"):
        canonical.refuse_newer(data, "an object")
