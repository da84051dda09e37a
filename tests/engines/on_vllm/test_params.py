"""vLLM's own `SamplingParams` as thaw's sampling: every field of it means the same there, or is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import thaw
from thaw.core.errors import BadSampling, InvalidRequest
from thaw.core.sampling import Sampling
from thaw.engines import load_engine
from thaw.repo.params import as_sampling

pytest.importorskip("vllm")

TAKEN: dict[str, Any] = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
    "frequency_penalty": -0.4, "stop": ["a", "b"], "stop_token_ids": [3, 1], "ignore_eos": True, "min_tokens": 2,
    "max_tokens": 9, "logprobs": 3, "seed": 17, "logit_bias": {5: 1.5, 2: -100.0}, "bad_words": ["x", "y z"],
    "structured_outputs": {"regex": "a+"},
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "n": 2, "best_of": 3, "prompt_logprobs": 1, "prompt_logprob_token_ids": [[1, 2]], "prompt_logprob_start": 1,
    "logprob_token_ids": [4], "guided_decoding": {"regex": "a+"},
    "allowed_token_ids": [1], "logits_processors": [print], "truncate_prompt_tokens": 5, "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "include_stop_str_in_output": True, "extra_args": {"mine": 1},
    "skip_reading_prefix_cache": True, "thinking_token_budget": 10, "repetition_detection": {"min_count": 2},
    "routed_experts_prompt_start": 4, "trace_decode_token_ids": [1, 2], "watermarking": True,
}  # fmt: skip
LATER = ("trace_decode_token_ids", "watermarking")
"""Not in 0.26, whose parameters are an object of its own where a field is not one of theirs."""
DELIVERY: dict[str, Any] = {
    "output_kind": 1, "stream_interval": 3, "detokenize": False, "flat_logprobs": True, "skip_clone": True,
    "output_text_buffer_length": 3,
}  # fmt: skip


def asked(name: str, value: Any) -> Any:
    """`SamplingParams` with this field, set as an assignment would; of another vLLM's where this one has it not."""
    from vllm import SamplingParams

    if name not in SamplingParams.__struct_fields__:
        other = type("SamplingParams", (SimpleNamespace,), {})
        return other(temperature=1.0, max_tokens=16, seed=1, **{name: value})
    params = SamplingParams(seed=1)
    setattr(params, name, value)
    return params


def test_every_field_of_this_vllm_is_decided() -> None:
    from vllm import SamplingParams

    public = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert public <= TAKEN.keys() | REFUSED.keys() | DELIVERY.keys()
    assert {field.name for field in msgspec.structs.fields(Sampling)} - {"entropy"} <= public & TAKEN.keys()
    assert "entropy" not in public, "vLLM has it now: it is to mean the same"


@pytest.mark.parametrize("name", TAKEN)
def test_what_both_have_means_the_same(name: str) -> None:
    expected = Sampling(**{"max_tokens": 16, "seed": 1, name: TAKEN[name]})
    assert as_sampling(asked(name, TAKEN[name])) == expected
    assert getattr(expected, name) != getattr(Sampling(), name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_exactly_is_refused_by_name_and_value(name: str) -> None:
    from vllm import SamplingParams

    if name in LATER and name not in SamplingParams.__struct_fields__:
        pytest.skip("this vLLM has no such field")
    with pytest.raises(BadSampling) as caught:
        as_sampling(asked(name, REFUSED[name]))
    said = str(caught.value)
    assert f"SamplingParams.{name}={REFUSED[name]!r}"[:60] in said and "not supported: " in said


@pytest.mark.parametrize("name", DELIVERY)
def test_how_results_are_handed_out_is_thaws_own(name: str) -> None:
    assert as_sampling(asked(name, DELIVERY[name])) == Sampling(max_tokens=16, seed=1)  # type: ignore[arg-type]


def test_parameters_as_they_are_made() -> None:
    """What vLLM's own code fills in while it makes them asks for nothing."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    assert as_sampling(SamplingParams()) == Sampling(max_tokens=16)
    greedy = SamplingParams(temperature=0.0, top_p=0.5, stop="end", bad_words=["a"], logit_bias={7: 2})
    assert as_sampling(greedy) == Sampling(
        temperature=0.0, max_tokens=16, stop=("end",), bad_words=("a",), logit_bias={7: 2.0}  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(BadSampling, match=r"structured_outputs\.json_object=True"):
        as_sampling(SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True)))
    with pytest.raises(BadSampling, match="prompt_logprobs=0"):
        as_sampling(SamplingParams(prompt_logprobs=0))
    if "prompt_logprob_token_ids" in SamplingParams.__struct_fields__:
        with pytest.raises(BadSampling, match="prompt_logprob_token_ids"):
            as_sampling(SamplingParams(prompt_logprob_token_ids=np.array([[1, 2]])))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens=None"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"seed": -5}, "seed=-5"),
        ({"logit_bias": {3: 200.0}}, "logit_bias"),
    ],
    ids=["no limit", "all logprobs", "a negative seed", "a bias beyond 100"],
)
def test_a_value_out_of_thaws_range_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    from vllm import SamplingParams

    with pytest.raises(BadSampling, match=says):
        as_sampling(SamplingParams(**fields))


def test_a_field_that_nobody_has_heard_of_is_refused() -> None:
    class SamplingParams(msgspec.Struct):
        temperature: float = 1.0
        max_tokens: int = 16
        colour: str = "red"

    assert as_sampling(SamplingParams()) == Sampling(max_tokens=16)
    with pytest.raises(BadSampling, match=r"colour='blue'.*leave it out"):
        as_sampling(SamplingParams(colour="blue"))


def test_objects_of_no_known_kind_are_read_by_name_too() -> None:
    other = SimpleNamespace(temperature=0.0, max_tokens=3, n=1, skip_special_tokens=True, logits_processors=[])
    assert as_sampling(other) == Sampling(temperature=0.0, max_tokens=3)
    other.lora_request = object()
    with pytest.raises(BadSampling, match="merged weights"):
        as_sampling(other)
    with pytest.raises(InvalidRequest, match=r"is a dict; give thaw\.Sampling"):
        as_sampling({"temperature": 0.0})


def test_a_session_takes_them(tmp_path: Any) -> None:
    from vllm import SamplingParams

    with load_engine("fake") as engine, thaw.init(tmp_path / "runs", engine=engine) as repo:
        theirs = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, bad_words=["e"], logit_bias={101: 9.0})
        ours = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True, bad_words=("e",), logit_bias={101: 9.0})  # type: ignore[arg-type]
        outs = [repo.session(seed=1).generate("Why?", sampling).token_ids for sampling in (theirs, ours)]
        assert outs[0] == outs[1] and len(outs[0]) == 6
        session = repo.session(seed=1)
        with pytest.raises(BadSampling, match=r"n=2.*fork the session"):
            session.generate("Why?", SamplingParams(n=2))
        assert session.num_tokens == 0
