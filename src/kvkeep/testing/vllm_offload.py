"""vLLM's native offloading on a CPU, where vLLM itself refuses to run it: for tests and benchmarks.

``{"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"spec_name": "CPUTieringSpec",
"spec_module_path": "kvkeep.testing.vllm_offload", …}}``: all of it is vLLM's own code but for the copies between the
engine's pages and the primary tier, which are CUDA's business elsewhere.
"""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CPUTieringSpec(TieringOffloadingSpec):
    """vLLM's, with copies by the processor."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CPUCopies(kv_caches, self.blocks_per_chunk, region)


class CPUCopies(OffloadingWorker):
    """Copies at once, in the caller's thread. Ranks that share a region each have their own part of every chunk."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._groups = kv_caches.group_data_refs
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._pages: list[torch.Tensor] = []
        self._chunks: list[torch.Tensor] = []
        for each in kv_caches.tensors:
            page = each.page_size_bytes
            self._pages.append(each.tensor.view(torch.int8).view(-1, page))
            self._chunks.append(region.create_next_worker_view(page * blocks_per_chunk))
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def _copy(self, job_id: int, pages: GPULoadStoreSpec, chunks: LoadStoreSpec, *, store: bool) -> bool:
        assert isinstance(chunks, BlockIDsLoadStoreSpec)
        block = chunk = copied = 0
        for refs, size, first in zip(self._groups, pages.group_sizes, pages.block_indices, strict=True):
            skipped = first % self._blocks_per_chunk  # a group may begin inside a chunk
            for at in range(size):
                step, place = divmod(skipped + at, self._blocks_per_chunk)
                for ref in refs:
                    width = self._pages[ref.tensor_idx].shape[1]
                    page = self._pages[ref.tensor_idx][int(pages.block_ids[block + at])]
                    row = self._chunks[ref.tensor_idx][int(chunks.block_ids[chunk + step])]
                    part = row[place * width : (place + 1) * width]
                    (part.copy_(page) if store else page.copy_(part))
                    copied += width
            block += size
            chunk += -(-(skipped + size) // self._blocks_per_chunk) if size else 0
        self._done.append(TransferResult(job_id, True, transfer_size=copied, transfer_time=0.0))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pages.clear()
        self._chunks.clear()
        self._region.cleanup()
