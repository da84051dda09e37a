"""A fake engine that says what its prompt tells it to, so that a test can have a model call tools or think aloud.

Everything else is the fake engine's own: KV, forks, captures. `structured=True`: it takes structured output, which it
does not enforce: what it is told to say is expected to be what a grammar would allow. `schemas` are those it was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from thaw.engines.base import Completion, GenerateRequest, Handle
from thaw.engines.embedded.engine import EmbeddedEngine
from thaw.engines.fake.backend import FakeBackend
from thaw.engines.fake.codec import EOS
from thaw.engines.sampling.spec import Sampled, SampleSpec

SCRIPT = re.compile(rb"SAY\[\[(.*?)\]\]END", re.DOTALL)


def say(text: str) -> str:
    """A prompt that is answered by this text."""
    return f"SAY[[{text}]]END"


class RecitingBackend(FakeBackend):
    def sample(self, logits: list[list[float]], specs: Sequence[SampleSpec]) -> list[Sampled]:
        usual = super().sample(logits, specs)
        return [self._said(spec) or one for one, spec in zip(usual, specs, strict=True)]

    def _said(self, spec: SampleSpec) -> Sampled | None:
        prompt = bytes(token for token in spec.history[: spec.output_start] if token < 256)
        scripts = SCRIPT.findall(prompt)
        if not scripts:
            return None
        at = len(spec.history) - spec.output_start
        token = scripts[-1][at] if at < len(scripts[-1]) else EOS
        top = tuple((token + i, -float(i)) for i in range(spec.num_top))
        return Sampled(token=token, logprob=0.0, top=top, entropy=None)


class RecitingEngine(EmbeddedEngine):
    schemas: list[str | None]

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        return super().generate([self._free(one) for one in requests])

    def _free(self, request: GenerateRequest) -> GenerateRequest:
        sampling = request.sampling
        if sampling is None or sampling.structured_outputs is None:
            return request
        self.schemas.append(sampling.structured_outputs.json)
        return msgspec.structs.replace(
            request, sampling=msgspec.structs.replace(sampling, structured_outputs=None)
        )  # fmt: skip


def reciting(*, structured: bool = False, step_s: float = 0.0, max_model_len: int = 32768) -> RecitingEngine:
    engine = RecitingEngine(RecitingBackend("fake", 0, max_model_len, step_s), policy="0")
    engine.schemas = []
    if structured:
        engine.info = msgspec.structs.replace(engine.info, capabilities=engine.info.capabilities | {"structured"})
    return engine
