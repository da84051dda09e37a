"""The plug-in's options, and the arguments that switch it on in a stock SGLang. No SGLang and no torch here.

SGLang has one switch for a cache of one's own, `--radix-cache-backend thaw`, and no place for its options: they travel
as JSON in the environment variable THAW_SGLANG, which every process of an engine inherits.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.engines.served.budget import Shares
from thaw.engines.served.mailbox import default_folder

BACKEND = "thaw"
VARIABLE = "THAW_SGLANG"
ACTION = "thaw"
"""The type of the action in a request's `kv_hints` that carries thaw's message."""
RANKS = ("--tp", "--tp-size", "--tensor-parallel-size")
"""SGLang's names for the number of ranks."""
REFUSED = "thaw: refused"
"""How the reason begins with which a request ends in SGLang whose session cannot be used: nothing is computed in its
place."""
KEY_VARIABLE = "SGLANG_API_KEY"
"""Where the server looks for its API key."""
MAX_LOGPROBS = 100
"""What `Sampling.logprobs` may ask for."""
ALL_TOKENS: Mapping[str, object] = {"disable_hybrid_swa_memory": True}
"""What an SGLang that thaw starts is told: layers with a window keep the KV of all tokens, in the pool of the others.
Models without windows have no such pool anyway."""
ON_CPU: Mapping[str, object] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "grammar_backend": "none",
    "max_total_tokens": 32_768,
    "sleep_on_idle": True,
}
"""What an SGLang that thaw starts is told where there is no GPU, unless told otherwise. Idle it would use a whole core,
waiting."""
CPU_ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "SGLANG_CPU_OMP_THREADS_BIND": "all",
}
"""Likewise, in its environment."""

NumBytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
Fraction: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]


class SglangSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options. An unknown one is an error, and so is a value out of its range."""

    mail: str = ""
    """The folder through which client and engine leave each other files. Empty: one of this engine's own, below the
    user's runtime folder."""
    stores: dict[str, str] = {}
    """By a store's UUID, its folder of packs: the engine may read and write these from its start. A client of the same
    user adds its own."""
    arena_nbytes: NumBytes = 4 << 30
    """Host memory for the KV of sessions, of each rank. What is beyond it goes to `spill`."""
    spill: str | None = None
    """The folder of the file that holds what is beyond `arena_nbytes`. None: the system's temporary folder."""
    spill_nbytes: NumBytes = 64 << 30
    """How much that file may hold, of each rank."""
    caller_fraction: Fraction = 1.0
    """The part of `arena_nbytes`, of `spill_nbytes`, of the records and of the commands held at once that one client of
    thaw's may have."""
    guest_fraction: Fraction = 0.125
    """The part that all those may have together who do not share the mail folder, but may send requests (they have the
    server's API key, say)."""
    session_ttl_s: Seconds = 86_400.0
    """A session that nobody used for so long is forgotten."""
    pin_fraction: Fraction = 0.25
    """At most this part of the engine's tokens may be pinned."""
    pin_seconds: Seconds = 600.0
    """A pin ends by itself after so long."""
    enabled: bool = True
    """Off: the cache is SGLang's own, and thaw's requests are refused."""

    def shares(self) -> Shares:
        return Shares(self.caller_fraction, self.guest_fraction)


def from_environment(environment: Mapping[str, str] | None = None) -> SglangSettings:
    """The options of this process. Raises `InvalidRequest` naming the one that is wrong."""
    text = (os.environ if environment is None else environment).get(VARIABLE, "")
    try:
        return msgspec.json.decode(text, type=SglangSettings) if text else SglangSettings()
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{VARIABLE}: {error}") from None


def settled(settings: SglangSettings) -> SglangSettings:
    """`settings` with a mail folder of its own where none was named, so that all who read them use the same one."""
    if settings.mail:
        return settings
    return msgspec.structs.replace(settings, mail=str(default_folder(secrets.token_hex(8))))


def environment(settings: SglangSettings) -> dict[str, str]:
    """What a server's environment must say. Options at their default are left out."""
    plain: dict[str, object] = msgspec.to_builtins(settings)
    usual = msgspec.to_builtins(SglangSettings())
    changed = {name: value for name, value in plain.items() if value != usual[name]}
    return {VARIABLE: msgspec.json.encode(changed).decode()} if changed else {}


def cpu_environment(ranks: int = 1) -> dict[str, str]:
    """`CPU_ENVIRONMENT`, less what this process has set already. Several ranks get cores of their own each, as far as
    there are enough: SGLang wants a NUMA node for each otherwise, and they would all start threads for every core."""
    wanted = dict(CPU_ENVIRONMENT)
    if ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        each = max(1, len(cores) // ranks)
        wanted["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(str(cores[(rank * each + i) % len(cores)]) for i in range(each)) for rank in range(ranks)
        )
        wanted["OMP_NUM_THREADS"] = str(each)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def ranks_in(arguments: Sequence[str]) -> int:
    """How many tensor-parallel ranks SGLang's own arguments ask for."""
    found = [part for argument in arguments for part in argument.split("=", 1)]
    sizes = [after for flag, after in itertools.pairwise(found) if flag in RANKS and after.isdigit()]
    return int(sizes[-1]) if sizes else 1


def server_command(
    model: str, host: str, port: int, *, python: str = "python", on_cpu: bool = False, more: Sequence[str] = ()
) -> list[str]:
    """The stock server with thaw's cache. What `more` says goes before what is said here."""
    arguments = {
        "model_path": model, "host": host, "port": port, "radix_cache_backend": BACKEND, **ALL_TOKENS,
        **(ON_CPU if on_cpu else {}),
    }  # fmt: skip
    return [python, "-m", "sglang.launch_server", *command_line(arguments), *more]


def command_line(arguments: Mapping[str, object]) -> list[str]:
    """SGLang's arguments, by their names in Python, as flags. What is None or false is left out."""
    out: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            out.append(flag)
        elif value not in (None, False):
            out += [flag, str(value)]
    return out
