"""Partial rollouts that keep their KV over a policy step, with real attention.

The oracle is transformers' own class with its own cache: what one module cached stays in it, and another module, with
the next weights, computes the new tokens over it. Models with windows and latents run with the stock attention, so
they equal it bit for bit; plain full attention runs with thaw's, so it equals it up to rounding, and bit for bit a
session of thaw whose engine does not notice that its weights change.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import thaw  # noqa: E402
from thaw import Sampling  # noqa: E402
from thaw.core.errors import IdentityMismatch, PolicyMismatch, StaleSession  # noqa: E402
from thaw.engines.base import Engine  # noqa: E402
from thaw.engines.embedded.weights import WeightsWatch  # noqa: E402
from thaw.repo import Repository  # noqa: E402

PROMPT = [(7 * i + 3) % 256 for i in range(300)]
N, ANSWER = len(PROMPT), 10
GREEDY = Sampling(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
BITWISE, ROUNDED = ("gemma3_text", "falcon", "deepseek_v3"), ("llama", "qwen3")


@pytest.fixture
def folders(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> tuple[Path, Path]:
    """The weights before and after a step."""
    return tiny_model(request.param, seed=0), tiny_model(request.param, seed=1)


class OwnCache:
    """transformers' module and cache: `policies[i]` computes; the last token is always fed by itself."""

    def __init__(self, folders: tuple[Path, Path]) -> None:
        self.policies = [transformers.AutoModelForCausalLM.from_pretrained(str(one)).eval() for one in folders]
        self.cache = transformers.DynamicCache(config=self.policies[0].config)
        self.num_kv = 0

    @torch.inference_mode()
    def feed(self, policy: int, tokens: list[int]) -> Any:
        """Log probabilities after these tokens."""
        ids, positions = torch.tensor([tokens]), torch.arange(self.num_kv, self.num_kv + len(tokens))[None]
        out = self.policies[policy](
            ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.num_kv += len(tokens)
        return torch.log_softmax(out.logits[0, -1].float(), -1)

    def greedy(self, policy: int, last: int, count: int) -> tuple[list[int], list[float]]:
        """`count` tokens after `last`, which has no KV yet."""
        tokens, logprobs = [last], []
        for _ in range(count):
            row = self.feed(policy, tokens[-1:])
            tokens.append(int(row.argmax()))
            logprobs.append(float(row[tokens[-1]]))
        return tokens[1:], logprobs


def rollout(repo: Repository, update: Callable[[], None]) -> tuple[Any, Any, Any]:
    """An answer under the first weights, another under the next ones, and the session's trajectory."""
    with repo.session(seed=1, stale_kv=True) as session:
        session.append(token_ids=PROMPT)
        first = session.generate(sampling=GREEDY)
        update()
        second = session.generate(sampling=GREEDY)
        return first, second, session.trajectory()


@pytest.mark.parametrize("folders", [*BITWISE, *ROUNDED], indirect=True, ids=str)
def test_new_weights_over_old_kv_equal_transformers_own_cache(
    folders: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stock = OwnCache(folders)
    stock.feed(0, PROMPT[:-1])
    said, logprobs = stock.greedy(0, PROMPT[-1], ANSWER)
    again, more = stock.greedy(1, said[-1], ANSWER)
    with thaw.load_engine("transformers", model=str(folders[0])) as engine, thaw.open(tmp_path, engine=engine) as repo:
        first, second, t = rollout(repo, lambda: step(engine, folders[1]))
        recomputed = whole_again(repo, (*PROMPT, *said))
    assert [*first.token_ids, *second.token_ids] == [*said, *again]
    worst = max(abs(a - b) for a, b in zip((*first.logprobs, *second.logprobs), (*logprobs, *more), strict=True))
    assert worst == 0 if any(arch in str(folders[0]) for arch in BITWISE) else worst < 1e-4
    far = max(abs(a - b) for a, b in zip(second.logprobs, recomputed.logprobs, strict=True))
    assert recomputed.token_ids != second.token_ids or far > 0.01, "the control: KV of the new weights is another"
    assert [(one.start, one.end, one.policy) for one in t.kv_ranges] == [
        (0, N + ANSWER - 1, "0"), (N + ANSWER - 1, N + 2 * ANSWER - 1, "1"),
    ]  # fmt: skip
    assert t.policy_versions == ("0",) * ANSWER + ("1",) * ANSWER


def step(engine: Engine, folder: Path) -> None:
    engine.update_weights(str(folder))
    engine.set_policy("1")


def whole_again(repo: Repository, tokens: tuple[int, ...]) -> Any:
    with repo.session(seed=1) as fresh:
        return fresh.generate(token_ids=tokens, sampling=GREEDY)


@pytest.mark.parametrize("folders", [BITWISE[0], ROUNDED[0]], indirect=True, ids=str)
def test_stored_and_brought_back_it_has_the_live_sessions_bits(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Also from a prompt's end, whose stored hidden state is of the old weights."""
    with thaw.load_engine("transformers", model=str(folders[0])) as engine, thaw.open(tmp_path, engine=engine) as repo:
        live = repo.session(seed=1, stale_kv=True)
        live.append(token_ids=PROMPT)
        live.commit("asked", branch="main")
        step(engine, folders[1])
        asked = repo.session("main", stale_kv=True)
        expected = live.generate(sampling=GREEDY)
        assert asked.generate(sampling=GREEDY).logprobs == expected.logprobs
        live.commit("answered", branch="main")
        for refused in (PolicyMismatch, IdentityMismatch):
            with pytest.raises((PolicyMismatch, IdentityMismatch)):
                repo.session("main" if refused is PolicyMismatch else "main~1")
        report = repo.verify("main", fresh_process=False)
        assert report.ok and report.kv_ranges == live.view().kv_ranges
        engine.update_weights(str(folders[0]))  # a third policy, over KV of two
        engine.set_policy("2")
        with repo.session("main", stale_kv=True) as back:
            expected, got = live.generate(sampling=GREEDY), back.generate(sampling=GREEDY)
            assert got.logprobs == expected.logprobs
            assert back.view().kv_ranges == live.view().kv_ranges
            assert [one.policy for one in back.view().kv_ranges] == ["0", "1", "2"]


@pytest.mark.parametrize("folders", [ROUNDED[0]], indirect=True, ids=str)
def test_it_equals_a_session_whose_engine_does_not_notice(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thaw.load_engine("transformers", model=str(folders[0])) as engine, thaw.open(tmp_path, engine=engine) as repo:
        first, second, _ = rollout(repo, lambda: step(engine, folders[1]))
    with thaw.load_engine("transformers", model=str(folders[0])) as engine, thaw.open(tmp_path, engine=engine) as repo:
        monkeypatch.setattr(WeightsWatch, "_look", lambda self: None)
        with repo.session(seed=1) as blind:
            blind.append(token_ids=PROMPT)
            assert blind.generate(sampling=GREEDY).logprobs == first.logprobs
            engine._backend.weights_of(str(folders[1]))()  # type: ignore[attr-defined]
            assert blind.generate(sampling=GREEDY).logprobs == second.logprobs


# -- a trainer's own module


@pytest.fixture
def module(tiny_model: Callable[..., Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama")).train()


@pytest.fixture
def engine(module: Any, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    with thaw.attach(module, tokenizer=tokenizer) as engine:
        yield engine


@pytest.fixture
def repo(engine: Engine, tmp_path: Path) -> Iterator[Repository]:
    with thaw.open(tmp_path / "runs", engine=engine) as repo:
        yield repo


def optimize(module: Any, *, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    ids = torch.tensor([PROMPT[:64]])
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_rollouts_go_on_over_optimizer_steps_and_say_which_policy_did_what(
    module: Any, engine: Engine, repo: Repository
) -> None:
    """Four children of a prompt, three policies; each token sampled by the weights of its time over the KV that is
    there."""
    with repo.session(seed=1, stale_kv=True) as trunk:
        trunk.append(token_ids=PROMPT)
        with trunk.fork(4) as children:
            for version in ("0", "1", "2"):
                engine.set_policy(version)
                children.generate(sampling=Sampling(max_tokens=8, ignore_eos=True))
                optimize(module)
            for child in children:
                t = child.trajectory()
                assert t.policy_versions == ("0",) * 8 + ("1",) * 8 + ("2",) * 8
                ranges = [(one.start, one.end, one.policy) for one in t.kv_ranges]
                assert ranges == [(0, N + 7, "0"), (N + 7, N + 15, "1"), (N + 15, N + 23, "2")]
                again = whole_logprobs(module, [*t.prompt_ids, *t.completion_ids])
                assert max(abs(a - b) for a, b in zip(again, t.logprobs, strict=True)) > 0.01, "no one policy's"


def whole_logprobs(module: Any, tokens: list[int]) -> list[float]:
    """Of the tokens after the prompt, by the module as it is."""
    with torch.no_grad():
        table = torch.log_softmax(module.eval()(input_ids=torch.tensor([tokens])).logits[0].float(), -1)
    module.train()
    return [float(table[i - 1, tokens[i]]) for i in range(N, len(tokens))]


@pytest.mark.slow("a trainer's process, and thirty updates")
@pytest.mark.parametrize("way", ["disk", "in place", "transfer"])
def test_without_asking_each_of_ten_updates_is_refused(
    way: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As on the fake engine 200 of 200."""
    folder = tiny_model("llama")
    with (
        thaw.load_engine("transformers", model=str(folder)) as engine,
        thaw.open(tmp_path / "runs", engine=engine) as repo,
        Updates(engine, folder, tmp_path) as updates,
    ):
        for number in range(10):
            with repo.session(seed=1) as session:
                session.append(token_ids=PROMPT[: 40 + number])
                session.commit("before", branch=f"b{number}")
                updates.run(way, number)
                with pytest.raises(StaleSession):
                    session.generate(sampling=GREEDY)
                with pytest.raises((IdentityMismatch, PolicyMismatch)):
                    repo.session(f"b{number}")
                assert repo.match(session.tokens) is None


class Updates:
    """The ways in which weights change: from files, in place without a word, and sent by another process."""

    def __init__(self, engine: Engine, folder: Path, parent: Path) -> None:
        self._engine, self._folder, self._parent = engine, folder, parent
        self._own: Any = engine._backend._module  # type: ignore[attr-defined]
        spawned = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = spawned.Pipe()
        self._trainer = spawned.Process(target=send_weights, args=(theirs, str(folder)), daemon=True)

    def __enter__(self) -> Updates:
        self._trainer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._trainer.join(30)

    def run(self, way: str, number: int) -> None:
        scale = 1.0 + 0.02 * (number + 1)
        if way == "disk":
            self._engine.update_weights(str(self._saved(scale)))
        elif way == "in place":
            with torch.no_grad():
                for parameter in self._own.parameters():
                    parameter.mul_(scale)
        else:
            self._pipe.send(scale)
            with torch.no_grad():
                for name, data in self._pipe.recv().items():
                    self._own.state_dict()[name].copy_(torch.from_numpy(data))
            self._engine.set_policy(f"sent-{number}")

    def _saved(self, scale: float) -> Path:
        target = Path(shutil.copytree(self._folder, self._parent / f"next-{scale:.2f}"))
        scaled(str(self._folder), scale).save_pretrained(target)
        return target


def scaled(folder: str, scale: float) -> Any:
    changed = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(scale)
    return changed


def send_weights(pipe: Any, folder: str) -> None:
    """A trainer's process: it sends the weights that it is asked for."""
    while (scale := pipe.recv()) is not None:
        pipe.send({name: tensor.numpy() for name, tensor in scaled(folder, scale).state_dict().items()})
