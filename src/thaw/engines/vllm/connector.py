"""The KV connector that vLLM loads by module path, in its engine process and in every worker.

Thin on purpose: it turns vLLM's calls into those of `SchedulerSide` and `WorkerSide`; what differs between vLLM's
versions is in `versions`. Only `start_load_kv`, `get_finished` and the scheduler's hooks are used,
never the per-layer ones, so CUDA graphs and asynchronous scheduling stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from thaw._version import __version__
from thaw.data.tiers.folder import folder_mount
from thaw.engines.hf.checkpoint import require_whole
from thaw.engines.hf.config import eos_token_ids
from thaw.engines.hf.recurrent import chunk
from thaw.engines.served import protocol
from thaw.engines.served.mailbox import SCHEDULER, Mailbox, default_folder, sweep_dead
from thaw.engines.served.protocol import EngineFacts, WorkerFacts
from thaw.engines.served.worker.weights_probe import WeightsSample, owner_of
from thaw.engines.vllm import support, versions
from thaw.engines.vllm.block_tables import BlockTables, of_groups
from thaw.engines.vllm.jobs import Job, KeepState
from thaw.engines.vllm.metrics import Changes, ThawPromMetrics, ThawStats
from thaw.engines.vllm.recurrent import UNTRIED
from thaw.engines.vllm.sampling import MAILS
from thaw.engines.vllm.scheduler.scheduler import SchedulerSide
from thaw.engines.vllm.settings import CONNECTOR, CONNECTOR_MODULE, VllmSettings, from_extra_config
from thaw.engines.vllm.worker.layout import LayerGroup, cache_groups, layer_groups, make_layouts, require_whole_blocks
from thaw.engines.vllm.worker.layout.hybrid import Caches, make_hybrid
from thaw.engines.vllm.worker.worker import WorkerSide

if TYPE_CHECKING:
    import torch

log = logging.getLogger("thaw.vllm")


def _log_as_much_as_vllm() -> None:
    """Up to 0.29 a package that vLLM imports sets the root logger to errors alone; vLLM's own loggers keep theirs."""
    level = logging.getLogger("vllm").level
    if level and not logging.getLogger("thaw").level:
        logging.getLogger("thaw").setLevel(level)


@dataclass
class ThawMetadata(KVConnectorMetadata):
    """`states`: what is to be kept of the states that this step computes."""

    jobs: list[Job] = field(default_factory=list)
    states: list[KeepState] = field(default_factory=list)


class ThawConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module's text. `kv_connector_extra_config["thaw"]` holds `VllmSettings`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_as_much_as_vllm()
        support.require(vllm_config, kv_cache_config)
        self._settings = from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._config, self._kv_cache_config = vllm_config, kv_cache_config
        self._mail = Mailbox(_mail_folder(vllm_config, self._settings))
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._changes = Changes()
        self._lost: set[str] = set()
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._tables = of_groups(kv_cache_config.kv_cache_groups)
        self._shares_blocks = _shares_blocks(vllm_config, self._tables, kv_cache_config.kv_cache_groups)
        self._may_sleep = bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self._make_scheduler()
        else:
            MAILS[vllm_config.instance_id] = self._mail

    @property
    def requires_kv_delivery(self) -> bool:
        """Asked from 0.32 on: losing a capture must never hold output back."""
        return False

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """Asked from 0.32 on: whether vLLM may find more tokens of a request in its cache than states. thaw loads the
        state of each of its own; of others, of which it loads nothing, vLLM then takes what both have."""
        return self._shares_blocks

    # -- metrics

    def get_kv_connector_stats(self) -> ThawStats | None:
        """Asked of both sides once a step."""
        side = self._scheduler or self._worker
        return self._changes.since(side.metrics()) if side is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ThawStats:
        return ThawStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> ThawPromMetrics:
        return ThawPromMetrics(*arguments)

    # -- scheduler's side

    def _make_scheduler(self) -> SchedulerSide:
        config, groups = self._config, self._kv_cache_config.kv_cache_groups
        overrides = support.overrides(config.model_config)
        with versions.built_plainly(config):
            require_whole(config.model_config.model, overrides)
        self._mail.claim()
        self._mail.sweep()
        sweep_dead(_base_folder(config, self._settings))
        for uuid, packs in self._settings.stores.items():
            self._mail.register_store(folder_mount(uuid, Path(packs)))
        parallel, model = config.parallel_config, config.model_config
        of_tokens = [groups[number] for number in self._tables.tokens]
        spec = of_tokens[0].kv_cache_spec
        facts = EngineFacts(
            protocol=protocol.VERSION,
            thaw=__version__,
            version=vllm.__version__,
            pid=os.getpid(),
            model=str(model.model),
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=model.max_model_len,
            max_logprobs=support.most_logprobs(model),
            block_size=spec.block_size,
            num_blocks=self._kv_cache_config.num_blocks,
            world_size=parallel.world_size,
            prefix_caching=bool(config.cache_config.enable_prefix_caching),
            runner=versions.runner(config),
            data_parallel_rank=versions.data_parallel_rank(config) or 0,
            reasons=bool(getattr(config.structured_outputs_config, "reasoning_parser", "")),
            vocab_size=model.hf_text_config.vocab_size,
            eos_token_ids=eos_token_ids(model.model, model.hf_config),
            notes=tuple(versions.notes(vllm.__version__)),
            overrides=overrides,
            interior=self._settings.interior,
            sleep_levels=versions.sleep_levels(config, vllm.__version__),
            max_adapters=config.lora_config.max_loras if config.lora_config is not None else 0,
            point_multiple=chunk(model.hf_text_config.to_dict()) if self._tables.states else 1,
        )
        self._mail.post(SCHEDULER, facts)
        for note in facts.notes:
            log.warning("thaw: %s", note)
        page_nbytes = sum(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in of_tokens)
        return SchedulerSide(
            facts, self._settings, self._mail, page_nbytes // spec.block_size, tables=self._tables,
            shares_blocks=self._shares_blocks,
        )  # fmt: skip

    @property
    def _s(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._s.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        self._s.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._s.matched(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """The groups whose new blocks vLLM need not clear before a load in the background. Pages of states and of KV
        are of one pool: what a load leaves of a last block is a former owner's, and may be NaN as keys and values."""
        return () if self._tables.states else tuple(super().get_loaded_kv_cache_group_ids(request))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._s.allocated(request, tuple(map(tuple, blocks.get_block_ids())), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> ThawMetadata:
        return ThawMetadata(self._s.collect(scheduler_output), self._s.kept_states(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._s.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._s.finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        """Whether an engine that has nothing to run is to make a step all the same. One that its owner has paused then
        captures: in that step nothing is computed. An engine that may be asleep makes none, for what its workers would
        look at may be gone."""
        return self._scheduler is not None and bool(self._scheduler.queue) and not self._may_sleep

    def reset_cache(self) -> bool | None:
        """vLLM resets its prefix cache with `reset_connector`: pins end; parked sessions are not in vLLM's blocks."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # -- workers' side

    @classmethod
    def supports_sleep_mode(cls, *_: Any) -> bool:
        """Asked from 0.33 on, at boot."""
        return True

    def unregister_kv_caches(self) -> None:
        """Called from 0.33 on before the KV cache is unmapped: copies under way end, and all that was made of the
        caches is let go of. Their addresses stay vLLM's, so the tensors are good again once they are mapped."""
        if self._worker is not None:
            self._worker.let_go()

    def restore_kv_caches(self) -> None:
        """Called from 0.33 on when it is mapped again; nothing of its content is left."""
        if self._worker is not None:
            found = self._found(self._kv_caches)
            self._worker.take_back(found.layouts, found.states)

    def _found(self, kv_caches: dict[str, torch.Tensor]) -> Caches:
        return self._hybrid_caches(kv_caches) if self._tables.states else self._token_caches(kv_caches)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = kv_caches
        parallel, groups = self._config.parallel_config, self._kv_cache_config.kv_cache_groups
        found = self._found(kv_caches)
        of_tokens = [groups[number].kv_cache_spec for number in self._tables.tokens]
        require_whole_blocks(found.layouts, [of_tokens[table] for table in found.tables])
        rank, size = parallel.rank % parallel.tensor_parallel_size, parallel.tensor_parallel_size
        facts = WorkerFacts(
            rank=rank,
            world_size=size,
            pid=os.getpid(),
            groups=found.groups,
            layout=found.describe(),
        )
        watch = self._watch(found.layouts[0].layer_names[0])
        self._worker = WorkerSide(found.layouts, facts, self._settings, self._mail, watch, found.tables, found.states)
        self._mail.post(rank, facts)

    def _hybrid_caches(self, kv_caches: dict[str, torch.Tensor]) -> Caches:
        model = self._config.model_config
        names = [group.layer_names for group in self._kv_cache_config.kv_cache_groups]
        config, dtype = model.hf_text_config.to_dict(), str(model.dtype).removeprefix("torch.")
        return make_hybrid(kv_caches, names, self._tables, config, dtype)

    def _token_caches(self, kv_caches: dict[str, torch.Tensor]) -> Caches:
        parts, groups = self._layer_groups(), self._kv_cache_config.kv_cache_groups
        specs = [groups[part.table].kv_cache_spec for part in parts]
        config = self._config.model_config.hf_text_config.to_dict()
        layouts = make_layouts(kv_caches, [part.names for part in parts], specs, config)
        num_kv_heads = self._config.model_config.get_total_num_kv_heads()
        found = cache_groups(layouts, num_kv_heads, [part.window for part in parts])
        return Caches(layouts, found, tuple(part.table for part in parts))

    def _layer_groups(self) -> tuple[LayerGroup, ...]:
        """thaw's cache groups by their layers: those with a window are groups of their own, though vLLM keeps them in
        one with layers of full attention."""
        groups = self._kv_cache_config.kv_cache_groups
        layers = self._config.compilation_config.static_forward_context
        named = [name for g in groups if support.window_of(g.kv_cache_spec) is not None for name in g.layer_names]
        found = {name: support.window_of(versions.layer_spec(layers[name], self._config)) for name in named}
        windows = {name: window for name, window in found.items() if window is not None}
        return layer_groups([group.layer_names for group in groups], windows)

    def _watch(self, layer_name: str) -> WeightsSample | None:
        layer = self._config.compilation_config.static_forward_context.get(layer_name)
        model = owner_of(layer) if layer is not None else None
        return WeightsSample(model) if model is not None else None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None and self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            assert isinstance(metadata, ThawMetadata)
            todo, metadata.jobs = metadata.jobs, []
            if todo:
                self._worker.run(todo)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        """Called behind every forward pass: the states that it has left lie in their blocks until the next one."""
        if self._worker is not None and self._tables.states and self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            assert isinstance(metadata, ThawMetadata)
            todo, metadata.states = metadata.states, []
            self._worker.keep_states(todo)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        sent, received, self._lost = self._worker.finished()
        return sent or None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Asked in place of `get_finished` by releases that hear of failed loads by the requests' names."""
        results = super().get_transfer_results(finished_req_ids)
        results.failed_recving |= self._lost
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.invalid_blocks() if self._worker is not None else set()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()


def _shares_blocks(config: Any, tables: BlockTables, groups: Sequence[Any]) -> bool:
    """Whether sessions of a model that keeps states find full blocks in vLLM's cache: where it has one, whose hashes
    are of its one block size. On a GPU that was not run."""
    cache, sizes = config.cache_config, {group.kv_cache_spec.block_size for group in groups}
    tried = config.device_config.device_type == "cpu" or os.environ.get(UNTRIED) == "1"
    one_size = len(sizes) == 1 and getattr(cache, "prefix_match_unit", None) in (None, *sizes)
    return bool(tables.states) and bool(cache.enable_prefix_caching) and one_size and tried


def _base_folder(config: Any, settings: VllmSettings) -> Path:
    return Path(settings.mail) if settings.mail else default_folder(config.instance_id)


def _mail_folder(config: Any, settings: VllmSettings) -> Path:
    base, rank = _base_folder(config, settings), versions.data_parallel_rank(config)
    return base if rank is None else base / f"dp{rank}"


with contextlib.suppress(ValueError):  # a module that is imported twice has been registered before
    KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
    # By its name alone `MultiConnector` asks what the connector's metrics are.
