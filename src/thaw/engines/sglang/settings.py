"""The plug-in's options, and the arguments that switch it on in a stock SGLang. No SGLang and no torch here.

SGLang has one switch for a cache of one's own, `--radix-cache-backend thaw`, and no place for its options: they travel
as JSON in the environment variable THAW_SGLANG, which every process of an engine inherits.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.engines.served.settings import ServedSettings, changed

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


class SglangSettings(ServedSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SGLang's plug-in takes what all served engines do, and:"""

    interior: bool = False
    """Snapshots of models with windows hold the windows of all tokens, so that any token of theirs can be forked."""


def from_environment(environment: Mapping[str, str] | None = None) -> SglangSettings:
    """The options of this process. Raises `InvalidRequest` naming the one that is wrong."""
    text = (os.environ if environment is None else environment).get(VARIABLE, "")
    try:
        return msgspec.json.decode(text, type=SglangSettings) if text else SglangSettings()
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{VARIABLE}: {error}") from None


def environment(settings: SglangSettings) -> dict[str, str]:
    """What a server's environment must say. Options at their default are left out."""
    said = changed(settings)
    return {VARIABLE: msgspec.json.encode(said).decode()} if said else {}


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
