"""``kvkeep quality`` on a small random model: its figures, its files, its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvkeep
from kvkeep.cli.app import app
from kvkeep.cli.quality import Row, advise
from kvkeep.errors import ConfigError

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it would do so twice a day. " * 24


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["quality", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("quality")
    (folder / "texts").write_text(f"{TEXT}\f{TEXT[500:]}\ftoo short")
    status, out, err = run(
        str(tiny_model), "--texts", f"{folder}/texts", "--tokens", "256", "--greedy", "4", "--json", "--threads", "1",
        "--out", f"{folder}/out", "--dir", f"{folder}/cache", "--block-tokens", "16", "--max-kl", "1e-9",
    )  # fmt: skip
    assert status == 0, err
    return folder, json.loads(out)


@pytest.mark.model
def test_figures(measured: tuple[Path, dict[str, object]]) -> None:
    _, whole = measured
    rows = {row["codec"]: row for row in whole["codecs"]}  # type: ignore[attr-defined]
    assert list(rows) == ["raw", "lossless", "int8", "uqz-hq", "uqz", "uqz-max", "int4"]
    assert whole["prompts"] == 2
    for exact in ("raw", "lossless"):
        assert (rows[exact]["kl_max"], rows[exact]["top1"], rows[exact]["perplexity_change"]) == (0, 1, 0)
        assert rows[exact]["greedy_match"] == 4
    assert rows["raw"]["bits"] == 16
    assert rows["int8"]["bits"] < 9 < rows["lossless"]["bits"] < 13
    assert 0 < rows["int8"]["kl_mean"] < rows["uqz"]["kl_mean"]
    assert rows["uqz-max"]["bits"] < rows["uqz"]["bits"] < rows["uqz-hq"]["bits"] < rows["int8"]["bits"]
    for row in rows.values():
        assert row["kl_mean"] <= row["kl_max"] <= row["kl_worst_token"]
        assert row["tokens_per_gb"] == pytest.approx(8e9 / row["bits"] / 128, rel=0.001)  # 2 layers × 2 × 2 heads × 16
        assert set(row["load_ms"]) == {"memory", "disk"}
        assert row["decode_gbs"] > 0
        assert row["encode_gbs"] > 0


@pytest.mark.model
def test_files_and_the_limit_that_they_set(measured: tuple[Path, dict[str, object]], tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from kvkeep.engines.transformers import attach

    folder, whole = measured
    assert json.loads((folder / "out" / "quality.json").read_text()) == whole
    assert (folder / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    strict = kvkeep.open(folder / "cache", memory="4MiB", disk="16MiB", codec="int4", max_kl=1e-12)
    with strict, pytest.raises(ConfigError, match="int4"):
        attach(model, strict)
    with kvkeep.open(folder / "cache", memory="4MiB", disk="16MiB", codec="int4", max_kl=1.0) as cache:
        attach(model, cache)


@pytest.mark.model
def test_a_table_for_people(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text(TEXT)
    status, out, err = run(
        str(tiny_model), "--codecs", "lossless,int8", "--texts", f"{tmp_path}/texts",
        "--tokens", "256", "--greedy", "0",
        "--out", f"{tmp_path}/out", "--dir", f"{tmp_path}/cache", "--threads", "1", "--block-tokens", "32",
    )  # fmt: skip
    assert status == 0, err
    assert "int8" in out
    assert "On this model" in out
    assert "prompt 1 of 1: int8" in err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--codecs", "uqs"], "did you mean 'uqz'"),
        (["--codecs", ","], "at least one codec"),
        (["--kv-dtype", "int3"], "bfloat16, float16 or float32"),
        (["--texts", "/nowhere"], "--texts /nowhere: No such file"),
        (["/no/model/here.gguf"], "there is no model at /no/model/here.gguf"),
    ],
)
def test_wrong_options_say_so(arguments: list[str], what: str, tmp_path: Path) -> None:
    status, _, err = run(*arguments, "--out", f"{tmp_path}/out", "--dir", f"{tmp_path}/cache")
    assert status == 2
    assert what in err.replace("\n", " ")
    assert "Traceback" not in err


@pytest.mark.parametrize("where", ["out", "out/quality.json", "out/quality.png", "cache", "cache/quality.json"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(where: str, tmp_path: Path) -> None:
    target = tmp_path / where
    if "/" in where:
        target.mkdir(parents=True)
    else:
        target.write_text("a file where a folder should be")
    (tmp_path / "texts").write_text(TEXT)
    status, out, err = run("--texts", f"{tmp_path}/texts", "--out", f"{tmp_path}/out", "--dir", f"{tmp_path}/cache")
    assert (status, out) == (2, "")
    assert where in err.replace("\n", "")
    assert "loading" not in err
    assert not list(tmp_path.glob("cache/.*"))


def test_texts_in_another_encoding_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Größe".encode("latin-1"))
    status, _, err = run("--texts", f"{tmp_path}/latin", "--out", f"{tmp_path}/out", "--dir", f"{tmp_path}/cache")
    assert status == 2
    assert f"{tmp_path}/latin:notatextinUTF-8(byte2)" in "".join(err.split())


def test_texts_that_are_too_short(tiny_model: Path, tmp_path: Path) -> None:
    """Said before the weights are read, which takes a minute where they are large."""
    (tmp_path / "texts").write_text("Hello.")
    options = ["--texts", f"{tmp_path}/texts", "--out", f"{tmp_path}/out", "--dir", f"{tmp_path}/cache"]
    status, _, err = run(str(tiny_model), *options)
    assert status == 2
    assert "".join(f"--texts {tmp_path}/texts: no text has 128 tokens".split()) in "".join(err.split())
    assert "loading the model" not in err


@pytest.mark.model
def test_without_a_network_the_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import transformers

    asked = []

    def fetch(*names: str) -> str:
        asked.append(names)
        raise huggingface_hub.errors.LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    status, _, err = run("no/such-model", "--out", f"{tmp_path}/out", "--dir", f"{tmp_path}/cache")
    assert (status, asked) == (2, [("no/such-model", "config.json")])
    assert "asking huggingface.co for no/such-model" in err
    assert "no/such-model cannot be loaded: check your connection" in err


@pytest.mark.model
def test_no_bars_of_other_libraries(tmp_path: Path) -> None:
    program = (
        "from kvkeep.cli.losses import Model\n"
        "try: Model('/no/model.gguf', 'float32', 1, print)\n"
        "except Exception: from tqdm.auto import tqdm; list(tqdm(range(3), desc='De-quantizing'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def row(codec: str, bits: float, kl: float) -> Row:
    return Row(codec, bits, 1, 1, kl, 2 * kl, 3 * kl, 1, 0, None, {}, 1)


@pytest.mark.parametrize(
    ("rows", "begins"),
    [
        (
            [row("raw", 16, 0), row("int8", 8, 2e-4), row("uqz-hq", 5, 7e-4), row("uqz", 4, 3e-3)],
            "On this model use uqz-hq: 3.2 ×",
        ),
        ([row("int8", 8, 2e-4), row("uqz-max", 3, 3e-2)], "On this model use int8: 2.0 ×"),
        ([row("int8", 8, 5e-3)], "On this model no lossy codec is free: int8"),
        ([row("int4", 4, 5e-2)], "Keep lossless"),
        ([row("raw", 16, 0)], "Nothing lossy"),
    ],
)
def test_advice_is_one_sentence(rows: list[Row], begins: str) -> None:
    text = advise(rows, 0.01)
    assert text.startswith(begins)
    assert text.endswith(".")
    assert ("would be refused" in text) == any(one.kl_mean > 0.01 for one in rows if len(rows) > 1)
