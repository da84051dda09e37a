"""Sleep and wake on `transformers`: attention, windows, recurrent states; weights that are dropped and read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import thaw  # noqa: E402
from thaw import Sampling  # noqa: E402
from thaw.core.errors import Unsupported  # noqa: E402
from thaw.engines.embedded.session import LiveSession  # noqa: E402
from thaw.repo import Repository, Session  # noqa: E402

PROMPT = [(7 * i + 3) % 256 for i in range(300)]
ANSWER = Sampling(temperature=0.8, max_tokens=4, ignore_eos=True)
CYCLES = 20


def family(repo: Repository) -> list[Session]:
    """A parent, its fork, and one that is parked between its turns."""
    trunk, parked = repo.session(seed=1), repo.session(seed=2)
    trunk.append(token_ids=PROMPT)
    parked.append(token_ids=PROMPT[9:])
    return [trunk, trunk.fork(1)[0], parked]


def turn(sessions: list[Session], i: int) -> list[tuple[object, ...]]:
    told = [one.generate(token_ids=[i + 5, 9], sampling=ANSWER) for one in sessions]
    sessions[-1].park()
    return [(one.token_ids, one.logprobs) for one in told]


def said(folder: Path, where: Path, cycles: int, sleep: Callable[[Repository], object]) -> list[Any]:
    with thaw.load_engine("transformers", model=str(folder)) as engine, thaw.open(where, engine=engine) as repo:
        sessions, out = family(repo), []
        for i in range(cycles):
            out.append(turn(sessions, i))
            sleep(repo)
        return out


def nap(level: int) -> Callable[[Repository], None]:
    def act(repo: Repository) -> None:
        assert repo.sleep(level=level).num_dropped == 2
        woken = repo.wake()
        assert woken.num_loaded == 2 and not woken.missed

    return act


@pytest.mark.parametrize("level", [1, 2])
def test_twenty_sleeps_change_no_bit(tiny_model: Callable[..., Path], tmp_path: Path, level: int) -> None:
    folder = tiny_model("llama")
    calm = said(folder, tmp_path / "calm", CYCLES, lambda repo: None)
    assert said(folder, tmp_path / "slept", CYCLES, nap(level)) == calm


@pytest.mark.parametrize("arch", ["gemma3_text", "deepseek_v3", "qwen3_next"])
def test_other_kinds_of_cache_come_back(tiny_model: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    folder = tiny_model(arch)
    calm = said(folder, tmp_path / "calm", 2, lambda repo: None)
    assert said(folder, tmp_path / "slept", 2, nap(1)) == calm


def test_pages_that_are_kept_over_a_sleep_are_seen(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what was freed is written by others."""
    folder = tiny_model("llama")
    calm = said(folder, tmp_path / "calm", 2, lambda repo: None)

    def keep(self: LiveSession) -> None:
        for run in self.kv.runs:
            for store in run.extent.stores:  # type: ignore[attr-defined]
                store.zero_()

    monkeypatch.setattr(LiveSession, "drop", keep)
    monkeypatch.setattr(Session, "go_on_from", lambda self, point, beside: 0)

    def bad(repo: Repository) -> None:
        repo.sleep()
        repo.wake()

    found = said(folder, tmp_path / "slept", 2, bad)
    assert found[0] == calm[0] and found[1] != calm[1]


def test_level_two_holds_no_weights_and_wakes_with_the_last_ones(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    old, new = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    with thaw.load_engine("transformers", model=str(old)) as engine, thaw.open(tmp_path, engine=engine) as repo:
        engine.update_weights(str(new))
        module = engine._backend._module  # type: ignore[attr-defined]
        parameters = list(module.parameters())
        before = [one.detach().clone() for one in parameters]
        session = repo.session()
        session.append(token_ids=PROMPT)
        repo.sleep(level=2)
        assert sum(one.numel() for one in module.parameters()) == 0
        repo.wake()
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
        assert session.generate(token_ids=[7], sampling=ANSWER).num_cached_tokens == len(PROMPT)


def test_weights_that_were_half_away_come_back(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_model("llama"))
    with thaw.load_engine("transformers", model=folder) as engine, thaw.open(tmp_path, engine=engine) as repo:
        backend = engine._backend  # type: ignore[attr-defined]
        module, leave = backend._module, backend._resting.leave
        whole, parameters = [one.detach().clone() for one in module.parameters()], module.parameters
        away = []

        def some() -> Iterator[Any]:
            away.append(next(parameters()))
            yield away[0]
            assert away[0].numel() == 0
            raise MemoryError("the next one cannot go")

        def half(level: int) -> None:
            with monkeypatch.context() as patched:
                patched.setattr(module, "parameters", some)
                leave(level)

        session = repo.session()
        session.append(token_ids=PROMPT)
        with monkeypatch.context() as patched, pytest.raises(MemoryError, match="cannot go"):
            patched.setattr(backend._resting, "leave", half)
            repo.sleep(level=2)
        assert all(torch.equal(a, b) for a, b in zip(whole, module.parameters(), strict=True))
        assert session.generate(token_ids=[7], sampling=ANSWER).num_cached_tokens == len(PROMPT)


def test_a_module_that_was_handed_in_stays_where_it_is(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    folder = str(tiny_model("llama"))
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with thaw.attach(module, tokenizer=tokenizer) as engine, thaw.open(tmp_path, engine=engine) as repo:
        session = repo.session()
        session.append(token_ids=PROMPT)
        with pytest.raises(Unsupported, match="not thaw's"):
            repo.sleep(level=2)
        places = [one.data_ptr() for one in module.parameters()]
        repo.sleep()
        assert [one.data_ptr() for one in module.parameters()] == places
        repo.wake()
        assert session.generate(token_ids=[7], sampling=ANSWER).num_cached_tokens == len(PROMPT)
