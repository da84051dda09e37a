"""What the doctor returns: findings, a model's shape, figures. Plain values for JSON; the command line draws them."""

from __future__ import annotations

from typing import Literal

import msgspec

from thaw.core.findings import Finding

Basis = Literal["measured", "estimated"]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A number with its unit. `basis`: `measured` here and now, or `estimated` from what `text` says."""

    name: str
    value: float
    unit: str
    basis: Basis
    text: str


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """A model, from its config alone. `reasons` are those against it; `session_nbytes`: the cache of a session of
    `session_tokens` tokens, `prefill_flops` the work to read them, `cache_groups` each group in words, `state_nbytes`
    the state of its recurrent layers at one token, beside the KV. What the config does not say is None."""

    name: str
    architecture: str
    supported: bool
    tested: bool
    reasons: tuple[str, ...]
    dtype: str
    num_layers: int | None
    num_kv_heads: int | None
    head_dim: int | None
    max_model_len: int | None
    num_parameters: int | None
    prefill_flops: float | None
    kv_token_nbytes: int | None
    session_tokens: int
    session_nbytes: int | None
    cache_groups: tuple[str, ...] = ()
    state_nbytes: int | None = None


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything. `ok`: no problem was found (a model that is not supported is one)."""

    findings: tuple[Finding, ...]
    model: ModelReport | None = None
    figures: tuple[Figure, ...] = ()

    @property
    def ok(self) -> bool:
        return all(finding.status != "problem" for finding in self.findings)

    def finding(self, name: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.name == name), None)

    def figure(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)
