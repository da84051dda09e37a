"""What differs between the releases of vLLM that thaw runs on (0.26 to 0.32), all in this file.

Little does. The connector's own hooks are equal in all of them as far as thaw uses them: `start_load_kv` comes before
a step's forward when something is loaded inside the step (before every forward up to 0.29), `get_finished` also in
steps without tokens, and the block pool by `bind_gpu_block_pool` (0.30 and newer call it from `bind_kv_cache_manager`).
Newer properties that the connector overrides (`requires_kv_delivery`, from 0.27 on) are not asked for by older ones.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from thaw.core.errors import Unsupported

TESTED = ((0, 26), (0, 32))
"""First and last minor version that the suite is run with."""


RUN = frozenset(((0, 26), (0, 29), (0, 32)))
"""Those between that have an environment of their own (`make soak`); the others should work, and are warned of."""


def notes(version: str) -> list[str]:
    """A warning for a version that was never run. Raises `Unsupported` for one that cannot work."""
    parts = version.split("+")[0].split(".")
    try:
        minor = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError):
        return [f"vLLM {version}: not a release version; tested with 0.26 to 0.32"]
    if minor < TESTED[0]:
        raise Unsupported(f"vLLM {version} is too old for thaw: 0.26 to 0.32 are tested; upgrade vLLM")
    if minor > TESTED[1]:
        return [f"vLLM {version} is newer than thaw was tested with (0.26 to 0.32)"]
    if minor not in RUN:
        return [f"vLLM {version} lies between the releases that thaw is run with (0.26, 0.29, 0.32); it was not run"]
    return []


SLEEP_HOOKS = (0, 33)
"""The first release that tells a connector when the KV cache is unmapped and mapped again (`unregister_kv_caches`,
`restore_kv_caches`)."""


def has_sleep_hooks(version: str) -> bool:
    """Whether it is that release or a newer one."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= SLEEP_HOOKS


def sleep_levels(config: Any, version: str) -> tuple[int, ...]:
    """Those with which an engine of this configuration sleeps safely. On a CPU vLLM pauses and keeps all memory. With
    level 2 the weights of adapters go too, and vLLM does not read those again."""
    levels = (1, 2) if config.lora_config is None else (1,)
    if config.device_config.device_type == "cpu":
        return levels
    return levels if config.model_config.enable_sleep_mode and has_sleep_hooks(version) else ()


KINDS = (0, 32)
"""The first release that thaw supports latents (MLA), windows and the text part of multimodal classes on."""


def has_kinds(version: str) -> bool:
    """Whether it is that release or a newer one."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= KINDS


def runner(config: Any) -> str:
    """Which of vLLM's model runners an engine of this configuration uses ("V1", "V2"): their samplers differ."""
    return "V2" if getattr(config, "use_v2_model_runner", False) else "V1"


def whole(config: Any) -> Any:
    """The engine's own configuration, where a connector has one of its own: a child of `MultiConnector` gets a copy
    with its own part of `kv_transfer_config`. vLLM names the engine's in its workers; elsewhere it is `config`."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none() or config


@contextmanager
def built_plainly(config: Any) -> Iterator[None]:
    """Here transformers' classes can be built, also where vLLM runs one of them itself (its transformers backend): it
    decorates the class for the whole process, and asks for its own configuration whenever one is made."""
    from vllm.config import CompilationMode, set_current_vllm_config

    plain = copy.copy(config)
    plain.compilation_config = copy.copy(config.compilation_config)
    plain.compilation_config.mode = CompilationMode.NONE
    with set_current_vllm_config(plain):
        yield


def layer_spec(layer: Any, config: Any) -> Any:
    """The cache spec that a layer asks for, before vLLM makes one of several. Raises `Unsupported` for a release whose
    layers say none."""
    ask = getattr(layer, "get_kv_cache_spec", None)
    if ask is None:
        raise Unsupported("windows: this release's layers do not say which of them have one; upgrade vLLM")
    return ask(config)


def data_parallel_rank(config: Any) -> int | None:
    """Which rank of a data-parallel server this engine is; None where it is no such one.

    vLLM names it in the transfer's engine id. It makes ranks of models without experts engines of their own, whose
    parallel config knows of no others; with experts, and where ranks are servers of their own, the config says it.
    """
    _, marked, rank = str(config.kv_transfer_config.engine_id).rpartition("_dp")
    if marked and rank.isdecimal():
        return int(rank)
    parallel = config.parallel_config
    return int(parallel.data_parallel_rank) if parallel.data_parallel_size > 1 else None


def v2_processor() -> type:
    """The base class of logits processors on the V2 runner. `object` up to 0.30, where that runner takes none."""
    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
    except ImportError:
        return object
    base: type = LogitsProcessor
    return base


def put_jobs_before_forward(output: Any) -> None:
    """Have the workers do a step's jobs before its forward pass. 0.32 starts the loads of a step behind its forward
    pass, unless one of them is part of the step; older releases always start them before."""
    if hasattr(output, "has_sync_kv_loads"):
        output.has_sync_kv_loads = True


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take; newer ones an error of their own that is no ValueError."""
    try:
        from vllm.exceptions import VLLMClientError
    except ImportError:
        return (ValueError,)
    return (ValueError, VLLMClientError)


def processor_costs_v2(arguments: dict[str, Any]) -> bool:
    """Whether an engine of these arguments would run on V2, and on V1 once a logits processor is named.

    So it is up to 0.30, where vLLM has a V2 runner for the device and the model. On V2 vLLM's own sampler is stateless
    and thaw's is not needed.
    """
    if v2_processor() is not object:
        return False
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() and runner(AsyncEngineArgs(**arguments).create_engine_config()) == "V2"


def names_failed_loads() -> bool:
    """Whether a connector can say which request's load has failed, and see all of a request's blocks in a step."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched import output

    return hasattr(base, "KVConnectorTransferResults") and hasattr(output, "KVConnectorBlockState")
