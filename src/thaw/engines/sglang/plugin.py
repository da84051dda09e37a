"""SGLang's entry point to thaw (`sglang.srt.plugins`), called once in every process of an engine.

It names the cache and where thaw listens, and imports nothing heavy until SGLang makes the cache. SGLang only logs a
plug-in that fails; but `--radix-cache-backend thaw` then names a cache that nobody knows, and the engine does not
start.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from thaw.data.tiers.folder import folder_mount
from thaw.engines.sglang.settings import BACKEND

log = logging.getLogger("thaw.sglang")
HOOKS = {
    "sglang.srt.managers.scheduler.Scheduler.handle_generate_request": "handle_generate_request",
    "sglang.srt.managers.scheduler.Scheduler.abort_request": "abort_request",
    "sglang.srt.managers.scheduler.Scheduler._poll_timeout_aborts": "poll_timeout_aborts",
    "sglang.srt.managers.scheduler.Scheduler.process_input_requests": "process_input_requests",
    "sglang.srt.managers.schedule_batch.Req.init_next_round_input": "init_next_round_input",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": "init_new",
    "sglang.srt.model_executor.model_runner.ModelRunner.sample": "sample_tokens",
}


def register() -> None:
    from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend

    if get_radix_cache_factory(BACKEND) is None:
        register_radix_cache_backend(BACKEND, make_cache)
    if "sglang.srt.managers.scheduler" in sys.modules:  # not where tokens become text: that process has none
        _listen()


def _listen() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from thaw.engines.sglang import hooks

    for target, name in HOOKS.items():
        HookRegistry.register(target, getattr(hooks, name), HookType.AROUND)


def make_cache(context: Any) -> Any:
    """The cache of one rank, with thaw behind it. Raises `Unsupported` for what cannot be captured exactly."""
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    from thaw.engines.sglang import hooks, support
    from thaw.engines.sglang.scheduler.radix_cache import ThawRadixCache
    from thaw.engines.sglang.settings import from_environment

    settings = from_environment()
    support.require(context)
    support.require_functions(HOOKS)
    cache = create_unified_radix_cache(context, cache_class=ThawRadixCache)
    cache.bind(make_side(context, cache, settings))
    hooks.activate(cache)
    return cache


def make_side(context: Any, cache: Any, settings: Any) -> Any:
    import sglang

    from thaw._version import __version__
    from thaw.engines.hf.checkpoint import require_whole
    from thaw.engines.hf.config import eos_token_ids
    from thaw.engines.served import protocol
    from thaw.engines.served.mailbox import SCHEDULER, Mailbox, default_folder, sweep_dead
    from thaw.engines.served.protocol import EngineFacts, WorkerFacts
    from thaw.engines.served.settings import MAX_LOGPROBS
    from thaw.engines.served.worker.weights_probe import WeightsSample
    from thaw.engines.sglang import support, versions
    from thaw.engines.sglang.scheduler.cache_layers import cache_layers, require_windows
    from thaw.engines.sglang.scheduler.rank_consensus import RankConsensus
    from thaw.engines.sglang.scheduler.scheduler import RankSide

    model, rank, size = context.model_config, context.tp_rank, context.tp_size
    allocator = cache.token_to_kv_pool_allocator
    runner = context.tp_worker.model_runner
    modules, config = tuple(runner.model.modules()), model.hf_text_config.to_dict()
    groups, pools = cache_layers(allocator.get_kvcache(), modules, config, model.get_total_num_kv_heads())
    require_windows(groups, support.attention_backends(context.server_args))
    agreement = RankConsensus(context.tp_group.cpu_group, rank, size) if size > 1 else RankConsensus()
    folder = Path(settings.mail) if settings.mail else default_folder(f"sglang-{agreement.of_first(os.getpid())}")
    mail = Mailbox(folder)
    facts = WorkerFacts(
        rank=rank,
        world_size=size,
        pid=os.getpid(),
        groups=groups,
        layout=pools[0].describe(),
    )
    limit = min(model.context_len, allocator.size) - 6  # SGLang keeps as many back from a prompt
    overrides = support.overrides(context.server_args, model)
    if rank == 0:
        require_whole(str(model.model_path), overrides)
    ends = eos_token_ids(model.model_path, model.hf_config)
    engine = EngineFacts(
        protocol=protocol.VERSION,
        thaw=__version__,
        engine="SGLang",
        version=sglang.__version__,
        pid=os.getpid(),
        model=str(model.model_path),
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=limit,
        max_logprobs=MAX_LOGPROBS,
        block_size=cache.page_size,
        num_blocks=allocator.size // cache.page_size,
        world_size=size,
        prefix_caching=True,
        runner="",
        vocab_size=model.hf_text_config.vocab_size,
        eos_token_ids=ends,
        more_ends=tuple(sorted(set(model.hf_eos_token_id or ()) - set(ends))),
        notes=tuple(versions.notes(sglang.__version__)),
        overrides=overrides,
        interior=settings.interior,
        sleep_levels=versions.sleep_levels(context.server_args, facts.layout["device"]),
        takes_mail=True,
    )
    if rank == 0:
        mail.claim()
        mail.sweep()
        sweep_dead(folder)
        for uuid, packs in settings.stores.items():
            mail.register_store(folder_mount(uuid, Path(packs)))
        mail.post(SCHEDULER, engine)
        for note in engine.notes:
            log.warning("thaw: %s", note)
    weights = WeightsSample(runner.model)
    side = RankSide(pools, facts, engine, settings, mail, weights, agreement)
    mail.post(rank, facts)
    return side
