"""Names of blocks: what shapes the values is in them, by its bytes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


def started() -> Adapters:
    """Of a server that starts now."""
    time.sleep(0.02)  # files' times may be a tick of the kernel behind
    adapters = Adapters(time.time_ns())
    time.sleep(0.02)
    return adapters


def keys(asked: Request, adapters: Adapters | None = None) -> list[bytes]:
    digest = (adapters or started()).digest(asked)
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


def lora(folder: Path, number: int = 1, name: str = "name", **options: Any) -> Request:
    return request(lora_request=LoRARequest(name, number, str(folder), **options))


def test_an_adapter_counts_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    copy, scaled = adapter(tmp_path / "copy", 1), adapter(tmp_path / "scaled", 1, alpha=32)
    first = keys(lora(one))
    assert first == keys(lora(copy, 7, "other name"))
    assert all(same(first, other) == 0 for other in (keys(lora(two)), keys(lora(scaled)), keys(request())))
    assert started().digest(lora(one, load_inplace=True)) is None
    assert started().digest(lora(tmp_path / "nowhere")) is None
    known = started()
    assert keys(lora(one), known) == first
    assert known.digest(lora(two)) is None  # vLLM knows an adapter by its number: it serves the first


def _rewrite(place: Path) -> None:
    adapter(place / "one", 2)


def _rename_over(place: Path) -> None:
    for file in (place / "two").iterdir():
        file.rename(place / "one" / file.name)


def _rename_the_folder(place: Path) -> None:
    (place / "one").rename(place / "before")
    (place / "two").rename(place / "one")


def _remove_one_of_two(place: Path) -> None:
    (place / "one" / "adapter_model.bin").unlink()


def _turn_the_link(place: Path) -> None:
    (place / "next").rename(place / "link")


def _change_and_change_back(place: Path) -> None:
    file = place / "one" / "adapter_config.json"
    before, stat = file.read_text(), file.stat()
    file.write_text("{}")
    file.write_text(before)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [_rewrite, _rename_over, _rename_the_folder, _remove_one_of_two, _turn_the_link, _change_and_change_back],
)
@pytest.mark.parametrize("asked_before", [False, True])
def test_an_adapter_that_changes_while_the_server_runs_has_no_name(
    tmp_path: Path, asked_before: bool, change: Callable[[Path], None]
) -> None:
    """vLLM may have read it before the change or after, whether or not somebody has asked yet."""
    for number, name in enumerate(("one", "two"), 1):
        (adapter(tmp_path / name, number) / "adapter_model.bin").write_bytes(b"the same")
    (tmp_path / "link").symlink_to("one")
    (tmp_path / "next").symlink_to("two")
    asked = lora(tmp_path / ("link" if change is _turn_the_link else "one"))
    known = started()
    if asked_before:
        assert known.digest(asked) is not None
    change(tmp_path)
    for _ in range(2):
        assert known.digest(asked) is None
    assert started().digest(asked) is not None  # a restart reads what lies there


def test_names_do_not_depend_on_the_process() -> None:
    assert keys(request(cache_salt="a"))[-1].hex()[:16] == "691fa1da1163c1a5"
