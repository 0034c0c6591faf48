"""Names of blocks: what shapes the values is in them, by its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from serving import prompt
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalSharedField,
    PlaceholderRange,
)
from vllm.v1.request import Request

from kvkeep.engines.vllm.naming import Adapters, extras
from kvkeep.identity import ModelIdentity
from kvkeep.keys import block_keys
from kvkeep.layout import KVLayout

LAYOUT = KVLayout.uniform(
    ModelIdentity("w", "float32"), num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_tokens=16
)


def request(**parts: Any) -> Request:
    parts = {"prompt_token_ids": prompt(96), **parts}
    return Request("r", sampling_params=SamplingParams(max_tokens=1), pooling_params=None, **parts)


def keys(asked: Request, adapters: Adapters | None = None) -> list[bytes]:
    digest = (adapters or Adapters()).digest(asked)
    assert digest is not None
    found, limit = extras(asked, digest, 16)
    tokens = list(asked.all_token_ids)[: min(limit, asked.num_tokens) // 16 * 16]
    return list(block_keys(LAYOUT, tokens, extra=[each for each in found if each[0] < len(tokens)]))


def same(one: list[bytes], other: list[bytes]) -> int:
    """Blocks that two prompts share, from the front."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def image(pixels: torch.Tensor | None, offset: int = 40, identifier: str = "same-name") -> MultiModalFeatureSpec:
    data = None
    if pixels is not None:
        field = MultiModalSharedField(batch_size=1)
        data = MultiModalKwargsItem({"pixel_values": MultiModalFieldElem(data=pixels, field=field)})
    return MultiModalFeatureSpec(
        data=data, modality="image", identifier=identifier, mm_position=PlaceholderRange(offset=offset, length=20)
    )


def test_a_salt_separates() -> None:
    plain, one, two = keys(request()), keys(request(cache_salt="one")), keys(request(cache_salt="two"))
    assert same(plain, one) == same(plain, two) == same(one, two) == 0
    assert one == keys(request(cache_salt="one"))


def test_an_image_counts_by_its_pixels_not_by_its_name() -> None:
    pixels = torch.arange(12.0)
    first = keys(request(mm_features=[image(pixels)]))
    assert first == keys(request(mm_features=[image(pixels.clone(), identifier="another-name")]))
    assert same(first, keys(request(mm_features=[image(pixels + 1)]))) == 2
    assert same(first, keys(request(mm_features=[image(pixels, offset=41)]))) == 2
    assert same(first, keys(request(mm_features=[image(pixels.double())]))) == 2
    assert same(first, keys(request())) == 2


def test_an_image_of_which_only_the_name_is_left_ends_what_can_be_kept() -> None:
    assert keys(request(mm_features=[image(None)])) == keys(request())[:2]


def test_prompt_embeddings_count_by_their_bytes() -> None:
    rows = torch.randn(96, 8)
    changed = rows.clone()
    changed[50, 3] += 1
    first = keys(request(prompt_token_ids=None, prompt_embeds=rows))
    assert len(first) == 6
    assert first == keys(request(prompt_token_ids=None, prompt_embeds=rows.clone()))
    assert same(first, keys(request(prompt_token_ids=None, prompt_embeds=changed))) == 3
    assert same(first, keys(request(prompt_token_ids=[0] * 96))) == 0
    mixed = [at != 70 for at in range(96)]
    tokens = prompt(96)
    assert (
        same(
            keys(request(prompt_token_ids=tokens, prompt_embeds=rows, prompt_is_token_ids=[True] * 96)),
            keys(request(prompt_token_ids=tokens, prompt_embeds=rows, prompt_is_token_ids=mixed)),
        )
        == 4
    )


def adapter(folder: Path, seed: int, alpha: int = 16) -> Path:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    save_file({"base_model.model.x.lora_A.weight": torch.randn(4, 8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
    return folder


def test_an_adapter_counts_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    def lora(folder: Path, number: int = 1, name: str = "name", **options: Any) -> Request:
        return request(lora_request=LoRARequest(name, number, str(folder), **options))

    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    copy, scaled = adapter(tmp_path / "copy", 1), adapter(tmp_path / "scaled", 1, alpha=32)
    first = keys(lora(one))
    assert first == keys(lora(copy, 7, "other name"))
    assert all(same(first, other) == 0 for other in (keys(lora(two)), keys(lora(scaled)), keys(request())))
    known = Adapters()
    assert keys(lora(one), known) == first
    adapter(one, 3)  # other bytes in the place that vLLM has read already: nobody knows which it serves
    assert known.digest(lora(one)) is None
    assert Adapters().digest(lora(one, load_inplace=True)) is None
    assert Adapters().digest(lora(tmp_path / "nowhere")) is None


def test_names_do_not_depend_on_the_process() -> None:
    assert keys(request(cache_salt="a"))[-1].hex()[:16] == "691fa1da1163c1a5"
