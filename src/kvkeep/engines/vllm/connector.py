"""The class that vLLM loads: it hands each hook over to the half that lives in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvkeep.engines.vllm import logs
from kvkeep.engines.vllm.options import parse
from kvkeep.engines.vllm.plan import Hello, Plan, Report
from kvkeep.engines.vllm.scheduler import Scheduler
from kvkeep.engines.vllm.stats import KVKeepMetrics, KVKeepStats
from kvkeep.engines.vllm.worker import Worker, layer_names
from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks


class KVKeepConnector(KVConnectorBase_V1):
    """See :mod:`kvkeep.engines.vllm`."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Raises :class:`~kvkeep.errors.ConfigError` on a wrong option, or a model that cannot be served."""
        super().__init__(vllm_config, role, kv_cache_config)
        logs.join()
        with logs.refusing():
            options = parse(self._kv_transfer_config.kv_connector_extra_config)
            layer_names(vllm_config, kv_cache_config)
        # A block that does not load is computed. vLLM's default is to fail the request; it reads this afterwards.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = Scheduler(options, vllm_config, kv_cache_config)
        else:
            self._worker = Worker(options, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is lost is a later miss

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Any will do. vLLM asks this before it lays out the cache: the moment to refuse what would fail there."""
        if vllm_config.model_config.is_hybrid:
            with logs.refusing():
                raise ConfigError(
                    "kvkeep keeps attention's keys and values by token; this model also has recurrent layers, whose "
                    "state cannot be cut into blocks"
                )
        return None

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.SCHEDULER:
            self._scheduler.close()
        else:
            self._worker.close()

    # In a rank's process

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        with logs.refusing():
            self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return self._worker.hello

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass  # loaded before the forward pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass  # saved after it

    def wait_for_save(self) -> None:
        self._worker.save(self._plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_arrived()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_invalid()

    def build_connector_worker_meta(self) -> Report | None:
        return self._worker.take_report()

    @property
    def _plan(self) -> Plan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan)
        return plan

    # In the scheduler's process

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._scheduler.meet([hello for hello in metadata.values() if isinstance(hello, Hello)])

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        return self._scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, Report):
            self._scheduler.hear(report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.finished(request)
        return False, None

    def reset_cache(self) -> bool:
        self._scheduler.reset()
        return True

    # In both, and in the server's

    def get_kv_connector_stats(self) -> KVKeepStats | None:
        return (self._scheduler if self.role == KVConnectorRole.SCHEDULER else self._worker).take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVKeepStats:
        return KVKeepStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVKeepMetrics:
        return KVKeepMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
