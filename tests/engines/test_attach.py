"""A model that is being trained, joined in process: weights are shared, it is left as it was, and a step is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import thaw  # noqa: E402
from thaw import Sampling  # noqa: E402
from thaw.core.errors import IdentityMismatch, InvalidRequest, PolicyMismatch, StaleSession, Unsupported  # noqa: E402
from thaw.engines.base import Engine  # noqa: E402
from thaw.engines.embedded.weights import WeightsWatch  # noqa: E402
from thaw.engines.hf.weights import sample_weights  # noqa: E402
from thaw.repo import Repository  # noqa: E402
from thaw.testing import ExactnessTests  # noqa: E402
from thaw.testing.laws.kit import Load  # noqa: E402

TOKENS = [(7 * i + 3) % 256 for i in range(300)]
PLAIN = Sampling(max_tokens=8, ignore_eos=True)


def read(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def trained(tiny_model: Callable[..., Path]) -> Any:
    """In train mode, with gradient checkpointing and dropout, as a trainer has it."""
    module = read(tiny_model("llama"))
    for layer in module.model.layers:
        layer.self_attn.attention_dropout = 0.25
    module.gradient_checkpointing_enable()
    module.config.use_cache = False
    return module.train()


@pytest.fixture
def engine(trained: Any, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    with thaw.attach(trained, tokenizer=tokenizer) as engine:
        yield engine


@pytest.fixture
def repo(engine: Engine, tmp_path: Path) -> Iterator[Repository]:
    with thaw.open(tmp_path / "runs", engine=engine) as repo:
        yield repo


def step(module: Any, *, fused: bool = False) -> None:
    """One real step: loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=fused)
    ids = torch.tensor([TOKENS[:64]])
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logprobs_of(module: Any, tokens: tuple[int, ...], start: int) -> list[float]:
    """Log probabilities of tokens[start:], by one stock forward pass in eval mode."""
    mode = module.training
    with torch.no_grad():
        logits = module.eval()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    module.train(mode)
    table = torch.log_softmax(logits, -1)
    return [float(table[i - 1, tokens[i]]) for i in range(start, len(tokens))]


def worst(a: Any, b: Any) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def state_of(module: Any) -> dict[str, Any]:
    """What a trainer set: modes and flags of every module, the config, and where every tensor lies."""
    modules = {
        name: (m.training, getattr(m, "gradient_checkpointing", None), id(type(m)), m.__dict__.get("forward"))
        for name, m in module.named_modules()
    }
    tensors = {name: (t.data_ptr(), t._version, t.requires_grad) for name, t in module.named_parameters()}
    return {"modules": modules, "config": module.config.to_dict(), "attention": module.config._attn_implementation,
            "generation": module.generation_config.to_dict(), "tensors": tensors}  # fmt: skip


def loss_of(module: Any) -> tuple[float, float]:
    """Loss and gradient norm of a training step that draws the same dropout every time."""
    torch.manual_seed(5)
    module.zero_grad()
    ids = torch.tensor([TOKENS[:64]])
    loss = module(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), float(sum(p.grad.norm().item() for p in module.parameters()))


def test_an_attached_module_is_left_as_it_was_before_during_and_after_a_call(trained: Any, repo: Repository) -> None:
    before = state_of(trained)
    assert before["modules"][""][0] and before["modules"]["model.layers.0"][:2] == (True, True)
    assert not before["config"]["use_cache"] and before["attention"] != "thaw"
    s = repo.session()
    s.append(token_ids=TOKENS)
    with s.fork(3) as kids:
        stream = kids.stream(sampling=PLAIN)
        assert [state_of(trained) == before for _ in stream] == [True] * 24
        stream.result()
    s.commit("read", branch="main")
    assert repo.session("main").generate(sampling=PLAIN).num_cached_tokens == 300
    assert state_of(trained) == before


def test_no_weight_is_copied(trained: Any, engine: Engine) -> None:
    run = engine._backend._module  # type: ignore[attr-defined]
    assert [id(p) for p in run.parameters()] == [id(p) for p in trained.parameters()]
    assert [id(b) for b in run.buffers()] == [id(b) for b in trained.buffers()]
    assert run is not trained and not run.training and trained.training


def test_training_goes_on_beside_a_generation_with_the_same_bits(trained: Any, repo: Repository) -> None:
    """Forward and backward on the trainer's thread, while thaw decodes the same module on its own."""
    expected = loss_of(trained)
    s = repo.session()
    s.append(token_ids=TOKENS)
    stream = s.stream(sampling=Sampling(max_tokens=120, ignore_eos=True))
    next(iter(stream))
    losses = [loss_of(trained) for _ in range(3)]
    out = stream.result()
    assert losses == [expected] * 3
    assert worst(out.logprobs, logprobs_of(trained, s.tokens, 300)) < 1e-3


def test_logprobs_are_those_of_the_modules_own_forward_pass(trained: Any, repo: Repository) -> None:
    s = repo.session()
    s.append(token_ids=TOKENS)
    for kid in s.fork(4):
        out = kid.generate(sampling=PLAIN)
        assert worst(out.logprobs, logprobs_of(trained, kid.tokens, 300)) < 1e-3


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("announced", [False, True], ids=["unannounced", "announced"])
def test_after_an_optimizer_step_old_kv_is_refused_and_new_kv_is_of_the_new_weights(
    trained: Any, engine: Engine, repo: Repository, announced: bool, fused: bool
) -> None:
    s = repo.session()
    s.append(token_ids=TOKENS)
    s.commit("read", branch="main")
    former = engine.identity().weights
    step(trained, fused=fused)
    if announced:
        engine.set_policy("1")
    with pytest.raises(StaleSession):
        s.fork(2)
    with pytest.raises(StaleSession):
        s.generate(sampling=PLAIN)
    with pytest.raises((IdentityMismatch, PolicyMismatch)):
        repo.session("main")
    assert engine.identity().weights != former
    again = repo.session("main", policy="recompute")
    assert again.proof is not None and again.proof.num_recomputed_tokens == 300
    out = again.generate(sampling=PLAIN)
    assert worst(out.logprobs, logprobs_of(trained, again.tokens, 300)) < 1e-3
    assert set(again.trajectory().policy_versions) == {"1" if announced else "0"}


def test_without_the_guard_old_kv_would_give_wrong_logprobs(
    trained: Any, engine: Engine, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above: what is refused there is wrong."""
    s = repo.session()
    s.append(token_ids=TOKENS)
    step(trained)
    monkeypatch.setattr(WeightsWatch, "_look", lambda self: None)
    out = s.generate(sampling=PLAIN)
    assert worst(out.logprobs, logprobs_of(trained, s.tokens, 300)) > 0.05


def test_a_step_too_small_for_the_sampled_digest_is_noticed(trained: Any, repo: Repository) -> None:
    """bfloat16 weights with a small learning rate: most elements round back to what they were."""
    s = repo.session()
    s.append(token_ids=TOKENS)
    before = sample_weights(trained)
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert sample_weights(trained) == before
    with pytest.raises(StaleSession):
        s.fork(1)


@pytest.mark.slow("generates a thousand tokens")
@pytest.mark.parametrize("change", ["weights", "policy"])
def test_a_step_while_a_generation_runs_is_refused_at_its_end(
    trained: Any, engine: Engine, repo: Repository, change: str
) -> None:
    s = repo.session()
    s.append(token_ids=TOKENS)
    stream = s.stream(sampling=Sampling(max_tokens=1000, ignore_eos=True))
    next(iter(stream))
    if change == "weights":
        step(trained)
    else:
        engine.set_policy("1")
    with pytest.raises(StaleSession, match="no one policy"):
        stream.result()
    assert len(repo.session().generate(token_ids=TOKENS, sampling=PLAIN).token_ids) == 8


def test_a_parameter_put_in_anothers_place_is_used_at_once(trained: Any, repo: Repository) -> None:
    s = repo.session()
    s.append(token_ids=TOKENS)
    old = trained.lm_head.weight
    trained.lm_head.weight = torch.nn.Parameter(old.detach().roll(1, 0))
    with pytest.raises(StaleSession):
        s.fork(1)
    new = repo.session()
    out = new.generate(token_ids=TOKENS, sampling=PLAIN)
    assert worst(out.logprobs, logprobs_of(trained, new.tokens, 300)) < 1e-3


def test_a_module_that_was_rebuilt_is_refused(trained: Any, repo: Repository) -> None:
    s = repo.session()
    s.append(token_ids=TOKENS)
    layer = trained.model.layers[0].mlp
    layer.up_proj = torch.nn.Sequential(layer.up_proj, torch.nn.Linear(160, 160))
    with pytest.raises(StaleSession, match="attach it again"):
        s.fork(1)


def test_methods_patched_into_a_module_run_on_thaws_side_too(
    trained: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As kernel packages do it; one that ran on the original would see its train mode and its attention."""
    from types import MethodType

    seen = []
    for layer in trained.model.layers:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.training)
            return type(self).forward(self, *args, **kwargs)

        layer.self_attn.forward = MethodType(forward, layer.self_attn)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    with thaw.attach(trained, tokenizer=tokenizer) as engine, thaw.open(tmp_path / "r", engine=engine) as repo:
        s = repo.session()
        out = s.generate(token_ids=TOKENS, sampling=PLAIN)
        assert seen and not any(seen)
        assert worst(out.logprobs, logprobs_of(trained, s.tokens, 300)) < 1e-3


def test_the_weights_of_anothers_module_are_not_thaws_to_change(
    trained: Any, engine: Engine, tiny_model: Callable[..., Path]
) -> None:
    before = state_of(trained)
    with pytest.raises(Unsupported, match="change them there"):
        engine.update_weights(str(tiny_model("llama", seed=1)))
    assert state_of(trained) == before


def test_closing_leaves_the_module_running(trained: Any, engine: Engine) -> None:
    expected = loss_of(trained)
    engine.close()
    assert loss_of(trained) == expected
    step(trained)


def test_what_cannot_be_shared_is_refused_by_name(trained: Any, tiny_model: Callable[..., Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    with pytest.raises(InvalidRequest, match="tokenizer"):
        thaw.attach(trained)
    with pytest.raises(InvalidRequest, match="moves nothing"):
        thaw.attach(trained, tokenizer=tokenizer, dtype="bfloat16")
    with pytest.raises(Unsupported, match="wrapper"):
        thaw.attach(torch.nn.DataParallel(trained), tokenizer=tokenizer)
    trained.lm_head.weight.ds_id = 3
    with pytest.raises(Unsupported, match=r"lm_head.weight is sharded"):
        thaw.attach(trained, tokenizer=tokenizer)
    del trained.lm_head.weight.ds_id
    trained.peft_config = {}
    with pytest.raises(Unsupported, match="merge"):
        thaw.attach(trained, tokenizer=tokenizer)


class TestAttachedIsExact(ExactnessTests):
    """The laws that can differ from model to model, on a module in train mode."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        folder = tiny_model("llama")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return lambda **changes: thaw.attach(read(folder).train(), tokenizer=tokenizer, **changes)
