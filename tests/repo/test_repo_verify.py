"""Laws of verify: what held is said, what did not is named, and a flipped bit is found."""

from __future__ import annotations

from pathlib import Path

import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import CorruptBlob, InvalidRequest, NotFound
from thaw.repo import EngineSettings, LawResult, Repository, VerifyReport


@pytest.fixture
def stored(repo: Repository) -> Repository:
    s = repo.session(seed=2)
    s.append("What is to be verified. " * 30)
    s.commit("read", branch="read")
    s.generate("Well? ", Sampling(max_tokens=25, ignore_eos=True))
    s.commit("answered", branch="main")
    return repo


def law(report: VerifyReport, name: str) -> LawResult:
    return next(law for law in report.laws if law.name == name)


@pytest.mark.parametrize("point", ["main", "read", "main:300", "main:turn=2", "main:1", "main:0"])
def test_a_sound_point_verifies(stored: Repository, point: str) -> None:
    report = stored.verify(point, fresh_process=False)
    assert report.ok and all(law(report, name).held for name in ("bytes", "identity", "cached", "state"))
    if report.num_tokens:
        assert report.continuation is not None and report.continuation.first_difference is None


@pytest.mark.parametrize("point", ["main", "read"])
def test_boundary_logits_are_compared_bit_for_bit(stored: Repository, point: str) -> None:
    found = law(stored.verify(point, fresh_process=False), "boundary")
    assert found.held and "bit for bit" in found.promised and "bit for bit" in found.seen


def test_other_batch_shapes_are_measured_and_not_promised(stored: Repository) -> None:
    with stored.fork("main", 3) as kids:
        kids.generate("x", Sampling(max_tokens=4, ignore_eos=True))
        kids.commit("k")
    found = law(stored.verify("k/1", fresh_process=False), "boundary")
    assert found.held is not False and "3 at capture" in found.promised


def test_a_flipped_bit_is_found_and_named(stored: Repository) -> None:
    _flip(stored, "main")
    report = stored.verify("main", fresh_process=False)
    assert not report.ok and law(report, "bytes").held is False and "b3:" in law(report, "bytes").detail
    assert law(report, "boundary").held is None and report.continuation is None
    with pytest.raises(CorruptBlob):
        stored.session("main")


def test_another_model_fails_the_identity_law(stored: Repository) -> None:
    with thaw.load_engine("fake", seed=5) as other, thaw.open(stored.path, engine=other) as there:
        report = there.verify("main", fresh_process=False)
    assert not report.ok and law(report, "identity").held is False and law(report, "bytes").held


def test_verify_writes_nothing(stored: Repository) -> None:
    before = sorted((p.name, p.stat().st_size) for p in stored.store.packs.iterdir())
    stored.verify("main", fresh_process=False)
    assert before == sorted((p.name, p.stat().st_size) for p in stored.store.packs.iterdir())


def test_a_fresh_process_says_the_same(stored: Repository) -> None:
    remembered = stored.engine_settings()
    assert remembered is not None and remembered.name == "fake"
    report = stored.verify("main", num_tokens=4)
    assert report.ok and report.fresh_process and report.laws == stored.verify("main", fresh_process=False).laws


def test_errors_of_the_fresh_process_come_back_as_themselves(stored: Repository) -> None:
    with pytest.raises(NotFound, match="no engine named 'none'"):
        stored.verify("main", engine=EngineSettings(name="none"))


def test_without_an_engine_only_what_runs_is_refused(stored: Repository, tmp_path: Path) -> None:
    with thaw.open(stored.path) as reader:
        assert reader.log() and reader.show().tokens and reader.diff("main", "read").nbytes_shared
        with pytest.raises(InvalidRequest, match="without one"):
            reader.session("main")
    with thaw.open(tmp_path / "new", create=True) as empty, pytest.raises(InvalidRequest, match="name one"):
        from thaw.repo.verify_worker import verify_in_fresh_process

        verify_in_fresh_process(empty.store, "main")


def test_an_engine_named_by_its_settings_boots_when_it_is_needed(stored: Repository) -> None:
    settings = stored.engine_settings()
    with thaw.open(stored.path, engine=settings) as there:
        assert there.session("main").tokens == stored.show("main").tokens


def _flip(repo: Repository, point: str) -> None:
    """Change one bit of the first blob of a point, in its pack."""
    from thaw.repo.timeline import read, read_state

    line = read(repo.store, read_state(repo.store, repo.resolve(point).state))
    blob = line.segments[0].blobs["full"][0]
    place = repo.store.locate([blob])[blob]
    path = repo.store.packs / place.pack
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(place.offset)
        byte = file.read(1)[0]
        file.seek(place.offset)
        file.write(bytes([byte ^ 4]))
