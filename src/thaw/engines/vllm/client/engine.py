"""Where vLLM's API differs from other servers': its sampling parameters, and where a resume would forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thaw.core.errors import Unsupported
from thaw.core.objects import Turn
from thaw.core.sampling import Sampling, StructuredOutputs
from thaw.engines.served.client.dialect import Dialect
from thaw.engines.served.client.engine import CAPABILITIES, ServedEngine
from thaw.engines.served.protocol import EngineFacts
from thaw.engines.served.sampling_extra import EXTRA, needed, to_extra
from thaw.engines.session.bad_words import bad_ids, straddling
from thaw.engines.session.turns import OpenTurn
from thaw.engines.vllm import versions

MAX_V2_STOPS, MAX_V2_BIASES, MAX_V2_BAD_WORDS = 128, 1024, 128
"""vllm/v1/worker/gpu/sample/logit_bias.py and bad_words.py, in 0.26 and 0.32."""


class VllmDialect(Dialect):
    def fields(self, turn: OpenTurn, num_tokens: int) -> dict[str, Any]:
        stateless = self.facts.runner == "V2"
        eos, limit = self.info.eos_token_ids, self.info.max_model_len
        return vllm_sampling(turn, num_tokens, eos=eos, limit=limit, stateless=stateless)

    def check(self, sampling: Sampling) -> None:
        """The V2 runner has tables of fixed size, and ends the whole engine on a request that they cannot hold."""
        super().check(sampling)
        if self.facts.runner != "V2":
            return
        if sampling.entropy:
            raise Unsupported(
                "entropy: vLLM's V2 runner shows its logits to others only after biases and penalties, and a session's "
                "entropies are of the raw ones; set VLLM_USE_V2_MODEL_RUNNER=0, or leave entropy out"
            )
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.info.eos_token_ids)}
        for what, count, most in (
            ("stop_token_ids beside min_tokens", len(stops) if sampling.min_tokens else 0, MAX_V2_STOPS),
            ("logit_bias", len(sampling.logit_bias or ()), MAX_V2_BIASES),
            ("bad_words", len(sampling.bad_words), MAX_V2_BAD_WORDS),
        ):
            if count > most:
                raise Unsupported(f"{count} {what}: vLLM's V2 runner holds at most {most} of a request; give fewer")

    def check_resume(self, last: Turn, output: Sequence[int]) -> None:
        if self.facts.runner != "V2" or last.sampling is None:
            return
        forgotten = self._forgotten(last.sampling, output)
        if forgotten:
            raise Unsupported(
                f"resume with {forgotten}: vLLM's V2 runner counts from the request's own start and would "
                "forget the tokens before the interruption; set VLLM_USE_V2_MODEL_RUNNER=0"
            )

    def _forgotten(self, sampling: Sampling, output: Sequence[int]) -> str:
        """Which parameters look at what a turn has generated, so that a request that begins in the middle differs."""
        if sampling.presence_penalty or sampling.frequency_penalty:
            return "presence_penalty or frequency_penalty"
        begun = straddling(bad_ids(self.codec, sampling.bad_words), output)
        return f"bad_words (one of them, {self.codec.decode(begun)!r}, has begun)" if begun else ""


class VllmEngine(ServedEngine):
    """One vLLM (tensor-parallel ranks included). Sessions live until `close_session` or `close`."""

    name = "vllm"
    dialect = VllmDialect
    capabilities = CAPABILITIES | {"structured"}

    def update_weights(self, source: str | Path) -> None:
        """Every worker loads the folder's weights in place (vLLM's `reload_weights`), and vLLM's prefix cache is reset.
        Over HTTP this is for a server in development mode (VLLM_SERVER_DEV_MODE=1); `Unsupported` otherwise."""
        from thaw.engines.hf.checkpoint import require_weights_of

        self._require_awake()
        require_weights_of(self.info.model, source)  # a worker that fails half way ends the engine
        self.release_pins()
        self._loop.wait(self._transport.reload_weights(str(source)))

    def stalled(self) -> str:
        from thaw.engines.vllm.client.async_llm import AsyncLLMTransport

        transport = self._transport
        return self._loop.wait(transport.stalled()) if isinstance(transport, AsyncLLMTransport) else ""

    def capabilities_of(self, facts: EngineFacts) -> frozenset[str]:
        return super().capabilities_of(facts) - ({"entropy"} if facts.runner == "V2" else set())

    @classmethod
    def no_sleep(cls, facts: EngineFacts, level: int) -> str:
        if facts.sleep_levels and facts.max_adapters:
            return f"vLLM does not read LoRA adapters again after a sleep of level {level}; sleep with level 1"
        if not versions.has_sleep_hooks(facts.version):
            return (
                f"vLLM {facts.version} does not tell a connector that its KV cache is about to be unmapped, so a copy "
                "under way would read freed memory; sleep is supported from 0.33 on"
            )
        return "this vLLM was started without its sleep mode; start it with --enable-sleep-mode"


def vllm_sampling(
    turn: OpenTurn, num_tokens: int, *, eos: tuple[int, ...], limit: int, stateless: bool
) -> dict[str, Any]:
    """vLLM's parameters for what is left of a turn, when the session has `num_tokens` tokens.

    `stateless`: the runner draws by position itself (V2). Otherwise (V1) all that is not plain greedy goes through
    thaw's logits processor, which picks by (seed, position).
    """
    s, done = turn.sampling, len(turn.logprobs)
    stops = {*s.stop_token_ids, *(() if s.ignore_eos else eos)}
    fields: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": max(1, min(s.max_tokens - done, limit - num_tokens)),
        "logprobs": s.logprobs or 0,
        "ignore_eos": True,
        "stop_token_ids": sorted(stops),
    }
    if s.structured_outputs is not None:
        fields["structured_outputs"] = structured(s.structured_outputs)
    if stateless:
        fields.update(_native(s, turn.seed, done))
    elif needed(s):
        extra = to_extra(s, seed=turn.seed, output_start=turn.start, eos_token_ids=eos, bad_ids=turn.bad_ids)
        fields["extra_args"] = {EXTRA: extra}
    return fields


def structured(wanted: StructuredOutputs) -> dict[str, Any]:
    """As vLLM's `StructuredOutputsParams` and its server take it."""
    given = {"json": wanted.json, "regex": wanted.regex, "choice": list(wanted.choice), "grammar": wanted.grammar}
    return {name: value for name, value in given.items() if value}


def _native(s: Sampling, seed: int, done: int) -> dict[str, Any]:
    more: dict[str, Any] = {"logit_bias": dict(s.logit_bias)} if s.logit_bias else {}
    if s.bad_words:
        more["bad_words"] = list(s.bad_words)
    return {
        **more,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": max(s.top_k, 0),
        "min_p": s.min_p,
        "repetition_penalty": s.repetition_penalty,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "min_tokens": max(0, s.min_tokens - done),
        "seed": seed - (1 << 64) if seed >= 1 << 63 else seed,
    }
