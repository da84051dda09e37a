"""vLLM's tokens by thaw's rules: a logits processor of vLLM's V1 model runner.

vLLM's own sampler keeps state that a resumed request has lost: the place of its generator, and where the prompt ended
(penalties and min_tokens count from there). So thaw sends its request as a greedy one with its own parameters beside
it (`sampling_extra`); here the token is chosen by `embedded.torch_sampler`, a pure function of (logits, sampling,
seed, position, tokens so far), and every other logit of the row becomes -inf, so that vLLM's argmax takes it. vLLM
takes its log probabilities from the raw logits before that. Rows of other requests are not touched, and a batch
without thaw's requests costs one look at an empty dict.

Name the class in the engine argument `logits_processors`. As an entry point of `vllm.logits_processors` alone it
would not do: vLLM then does not keep the output tokens current under asynchronous scheduling.

The V2 runner's sampler is stateless and needs none of this. It loads the same engine argument and asks for processors
of an interface of its own, so the class has both: there it declines every request, and vLLM never calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from thaw.core.errors import InvalidRequest, ThawError
from thaw.engines.served import protocol
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.sampling_extra import EXTRA, from_extra
from thaw.engines.served.worker.sampler import Row
from thaw.engines.vllm import support
from thaw.engines.vllm.versions import v2_processor

if TYPE_CHECKING:
    from vllm.config import VllmConfig

QUALNAME = "thaw.engines.vllm.sampling:ThawSampling"
"""How `logits_processors` names the class."""
MAILS: WeakValueDictionary[str, Mailbox] = WeakValueDictionary()
"""Where entropies are told, by vLLM's name of the engine: put here by the connector of the same worker."""


class ThawSampling(LogitsProcessor, v2_processor()):  # type: ignore[misc]
    """Chooses the tokens of the requests that carry `EXTRA`. Not for speculative decoding, prompts given as
    embeddings, or log probabilities of processed logits: each is refused when the engine starts."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called at admission. Raises ValueError (which a server answers with status 400) for an extra that is not
        thaw's, for a request that asks vLLM to sample or to penalise as well, for a message that is none of thaw's or
        cannot go with what else the request asks for, and for entropies without a message."""
        try:
            support.require_request(sampling_params)
            extra = from_extra(sampling_params.extra_args)
            if extra is not None and extra.sampling.entropy:
                _run(sampling_params)
        except ThawError as error:
            raise ValueError(str(error)) from None
        if extra is not None:
            _check_neutral(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: Any, is_pin_memory: bool | None = None) -> None:
        """V1 gives its device and whether memory is pinned, V2 the state of its requests."""
        if is_pin_memory is not None:
            _check_config(vllm_config)
        self._config = vllm_config
        self._rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added, then moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._rows.pop(index, None)
            self._put(index, self._row(params, prompt, output))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            self._put(target, moved)
            if direction is MoveDirectionality.SWAP:
                self._put(source, replaced)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2 asks whether this changes the request's logits."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Leave in each row of thaw's only the chosen token. `logits` [requests, vocabulary] float32, changed in
        place. On V2 (which gives its `ctx`) there are no rows of thaw's."""
        if not self._rows:
            return logits
        rows = torch.tensor(list(self._rows), device=logits.device)
        host = logits if logits.device.type == "cpu" else logits[rows].cpu()
        tokens = [row.pick(host[index if host is logits else i]) for i, (index, row) in enumerate(self._rows.items())]
        logits[rows] = -torch.inf
        logits[rows, torch.tensor(tokens, device=logits.device)] = 0.0
        return logits

    def _put(self, index: int, row: Row | None) -> None:
        if row is not None:
            self._rows[index] = row

    def _row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Row | None:
        """The request as thaw's, or None for one that is not."""
        extra = from_extra(params.extra_args)
        if extra is None:
            return None
        assert prompt is not None, "prompts given as embeddings are refused when the engine starts"
        tell = self._teller(params) if extra.sampling.entropy else None
        return Row(params.all_stop_token_ids, extra, prompt, output, tell)

    def _teller(self, params: SamplingParams) -> Callable[[int, float], None] | None:
        """Every rank samples alike; the first one tells."""
        parallel, mail = self._config.parallel_config, MAILS.get(self._config.instance_id)
        first = parallel.rank % parallel.tensor_parallel_size == 0
        return partial(mail.put_entropy, _run(params)) if mail is not None and first else None


def _run(params: SamplingParams) -> str:
    """The id of the run that the request is. Raises `InvalidRequest` where it carries no such message."""
    message = protocol.parse((params.extra_args or {}).get("kv_transfer_params"))
    if not isinstance(message, protocol.Run):
        raise InvalidRequest("entropy: it is told in the mail, to the run of a message; this request carries none")
    return message.id


def _check_neutral(params: SamplingParams) -> None:
    for name, neutral in (
        ("temperature", 0.0), ("repetition_penalty", 1.0), ("frequency_penalty", 0.0), ("presence_penalty", 0.0),
        ("logit_bias", None), ("bad_words", []),
    ):  # fmt: skip
        value = getattr(params, name)
        if (value or None) != (neutral or None):
            raise ValueError(
                f"{name}={value} beside extra_args[{EXTRA!r}]: such a request is greedy for vLLM and takes its "
                f"{name} from there. Send {name}={neutral}."
            )


def _check_config(config: VllmConfig) -> None:
    """Raises ValueError where the tokens could not be thaw's."""
    model = config.model_config
    if config.speculative_config is not None:
        raise ValueError("thaw chooses one token a step: start the engine without a speculative config.")
    if model.enable_prompt_embeds:
        raise ValueError("thaw has to see every token: start the engine without enable_prompt_embeds.")
    if model.logprobs_mode.startswith("processed"):
        raise ValueError(
            f"logprobs_mode={model.logprobs_mode!r} would report thaw's mask: start the engine with 'raw_logprobs'."
        )
    if not model.logits_processors:
        raise ValueError(f"name {QUALNAME} in logits_processors: an entry point alone does not keep tokens current.")
