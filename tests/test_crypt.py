"""Encryption: what was encrypted comes back with its key and its namespace only, and nonces never repeat."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kvkeep
from kvkeep import crypt, frame
from kvkeep.crypt import Cipher, open_cipher, parse_key
from kvkeep.errors import ConfigError, FrameError
from kvkeep.keys import BlockKey

KEY, OLD = bytes(range(32)), bytes(range(100, 132))
BLOCK = BlockKey(b"k" * 32)
TOKENS = list(range(64))
MARK = b"the values of a very private prompt"


def layout(namespace: bytes = b"", weights: str = "w" * 64) -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights=weights, kv_dtype="float32", namespace=namespace)
    return kvkeep.KVLayout.uniform(identity, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)


def encrypted(cipher: Cipher, shape: kvkeep.KVLayout, payload: bytes, key: BlockKey = BLOCK) -> bytes:
    out = bytearray(len(payload) + frame.TAG_NBYTES)
    return cipher.encrypt(key, shape, "raw", payload, memoryview(out)) + out


def decrypted(cipher: Cipher, value: bytes, namespace: bytes = b"") -> bytes:
    out = bytearray(max(0, len(value) - frame.HEADER_NBYTES - frame.TAG_NBYTES))
    cipher.decrypt(value, namespace, memoryview(out))
    return bytes(out)


def cause_of(work: Callable[[], object]) -> str:
    with pytest.raises(FrameError) as caught:
        work()
    assert caught.value.cause in frame.CAUSES
    return caught.value.cause


class Marked:
    """A source whose blocks hold MARK all over, and their index."""

    def read(self, index: int, out: memoryview) -> None:
        text = MARK + bytes([index])
        out[:] = (text * (len(out) // len(text) + 1))[: len(out)]


class Kept:
    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}

    def write(self, index: int, payload: memoryview) -> None:
        self.blocks[index] = bytes(payload)


def load(cache: kvkeep.KVCache, tokens: list[int] = TOKENS) -> dict[int, bytes]:
    kept = Kept()
    with cache.lease(cache.match(tokens)) as lease:
        cache.load(lease, kept)
    for index, payload in kept.blocks.items():
        expected = bytearray(len(payload))
        Marked().read(index, memoryview(expected))
        assert payload == expected, "a wrong block"
    return kept.blocks


# Keys


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        KEY.hex().encode(),
        KEY.hex().upper().encode() + b"\n",
        base64.b64encode(KEY),
        base64.b64encode(KEY).rstrip(b"=") + b"\n",
        base64.urlsafe_b64encode(b"\xff" * 32),
        base64.b64encode(b"\xff" * 32),
    ],
)
def test_forms_of_a_key(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = KEY if b"_" not in text and b"/" not in text else b"\xff" * 32
    assert parse_key(text, "here") == expected
    file = tmp_path / "key"
    file.write_bytes(text)
    file.chmod(0o600)
    sources: list[crypt.KeySource] = [f"file:{file}", str(file), file, lambda: text]
    if b"\0" not in text:  # which no environment can hold
        monkeypatch.setitem(os.environ, "KVKEEP_TEST_KEY", os.fsdecode(text))
        sources.append("env:KVKEEP_TEST_KEY")
    for source in sources:
        one = open_cipher(source)
        assert one is not None
        assert one.key_ids == Cipher([expected]).key_ids


def test_a_raw_key_whose_ends_are_white_space(tmp_path: Path) -> None:
    raw = b" \n" + bytes(range(200, 228)) + b"\t\n"
    assert parse_key(raw, "here") == raw


@pytest.mark.parametrize(
    "wrong", [b"", b"short", b"x" * 31, b"x" * 33, KEY.hex()[:32].encode(), b"g" * 64, b"=" * 44, bytes(4096)]
)
def test_no_key(wrong: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_key(wrong, "the file")
    if wrong:
        assert wrong.decode("latin-1") not in str(caught.value)


def test_a_key_comes_through_a_pipe_and_one_without_a_writer_is_no_key(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="holds no key"):
        open_cipher(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(KEY,))  # waits for a reader
    writer.start()
    time.sleep(0.1)
    assert open_cipher(f"file:{pipe}") is not None
    writer.join()
    end, other = os.pipe()  # as of <(command) in a shell, which may take its time
    late = threading.Timer(0.2, lambda: (os.write(other, KEY), os.close(other)))
    late.start()
    assert open_cipher(f"/dev/fd/{end}") is not None
    late.join()
    os.close(end)


def test_errors_name_the_source_and_quote_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = KEY.hex()
    monkeypatch.setenv("KVKEEP_TEST_KEY", secret[:-1])
    monkeypatch.delenv("KVKEEP_NO_KEY", raising=False)
    (tmp_path / "bad").write_text(secret[:-2])
    (tmp_path / "bad").chmod(0o600)
    attempts: list[tuple[object, str]] = [
        ("env:KVKEEP_NO_KEY", "'KVKEEP_NO_KEY' is not set"),
        ("env:KVKEEP_TEST_KEY", "KVKEEP_TEST_KEY"),
        (secret, "env:NAME"),  # the key itself, where its place was asked for
        (base64.b64encode(KEY).decode(), "env:NAME"),
        ("\0" + secret, "env:NAME"),
        (f"file:{tmp_path / 'none'}", "none"),
        (tmp_path / "bad", "bad"),
        (tmp_path, "cannot be read"),
        (KEY, "callable"),
        (lambda: secret[:-1], "callable"),
        (7, "callable"),
        ([], "32 bytes"),
        ([KEY], "callable"),
    ]
    for source, said in attempts:
        with pytest.raises(ConfigError) as caught:
            kvkeep.open(tmp_path / "cache", encryption=source)  # type: ignore[arg-type]
        message = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
        assert said in message
        for form in (secret[:-2], KEY.decode("latin-1"), base64.b64encode(KEY).decode()[:-2], repr(KEY)):
            assert form not in message
        assert not (tmp_path / "cache").exists(), "something was made before the key was known"


def test_a_cipher_says_its_key_ids_and_no_more() -> None:
    cipher = Cipher([KEY, OLD])
    assert repr(cipher) == f"Cipher({cipher.key_ids[0].hex()}, {cipher.key_ids[1].hex()})"
    assert all(len(key_id) == 8 for key_id in cipher.key_ids)


def test_a_key_file_that_others_can_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o644)
    with caplog.at_level(logging.WARNING, "kvkeep"):
        open_cipher(tmp_path / "key")
    assert "chmod 600" in caplog.text
    assert KEY.decode("latin-1") not in caplog.text


def test_without_the_package() -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None; sys.modules['cryptography.exceptions'] = None\n"
        "import kvkeep\n"
        "try: kvkeep.open(encryption=lambda: bytes(32))\n"
        "except kvkeep.ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'kvkeep[encryption]'" in done.stdout


# Frames


@pytest.mark.parametrize("payload", [b"", b"x", bytes(100_000), os.urandom(70_000)], ids=len)
@pytest.mark.parametrize("namespace", [b"", b"a tenant"])
def test_what_was_encrypted_comes_back(payload: bytes, namespace: bytes) -> None:
    cipher, shape = Cipher([KEY]), layout(namespace)
    value = encrypted(cipher, shape, payload)
    header, stored = frame.parse(value)
    assert header.encrypted
    assert (header.key, header.layout, header.codec) == (BLOCK, shape.fingerprint, "raw")
    assert header.tenant == shape.identity.tenant
    assert header.key_id == cipher.key_ids[0]
    assert len(stored) == len(payload) + frame.TAG_NBYTES
    for form in (value, bytearray(value), memoryview(value)):
        assert decrypted(Cipher([OLD, KEY]), form, namespace) == payload  # type: ignore[arg-type]
    if len(payload) > 1:
        assert payload[:64] not in value


def test_each_bit_counts() -> None:
    cipher = Cipher([KEY])
    data = bytearray(encrypted(cipher, layout(b"t"), b"payload" * 3))
    causes = set()
    for bit in range(8 * len(data)):
        data[bit >> 3] ^= 1 << (bit & 7)
        causes.add(cause_of(lambda: decrypted(cipher, bytes(data), b"t")))
        data[bit >> 3] ^= 1 << (bit & 7)
    assert decrypted(cipher, bytes(data), b"t") == b"payload" * 3
    assert causes == {"magic", "version", "size", "short", "long", "checksum", "codec", "locked"}


def test_other_keys_and_namespaces_open_nothing() -> None:
    value = encrypted(Cipher([KEY]), layout(b"tenant a"), MARK)
    assert cause_of(lambda: decrypted(Cipher([OLD]), value, b"tenant a")) == "locked"
    for namespace in (b"", b"tenant b", b"tenant a "):
        assert cause_of(lambda name=namespace: decrypted(Cipher([KEY]), value, name)) == "checksum"
    assert decrypted(Cipher([KEY]), value, b"tenant a") == MARK


def test_a_frame_that_is_not_encrypted() -> None:
    head = frame.pack(BLOCK, layout().fingerprint, "raw", len(MARK), len(MARK))
    frame.seal(head, MARK)
    assert cause_of(lambda: decrypted(Cipher([KEY]), bytes(head) + MARK)) == "plain"
    assert cause_of(lambda: frame.verify(encrypted(Cipher([KEY]), layout(), MARK))) == "locked"


def test_a_buffer_of_another_size_is_refused() -> None:
    value = encrypted(Cipher([KEY]), layout(), MARK)
    for nbytes in (0, len(MARK) - 1, len(MARK) + 1):
        room = memoryview(bytearray(nbytes))
        assert cause_of(lambda out=room: Cipher([KEY]).decrypt(value, b"", out)) == "size"


# Nonces


def used(value: bytes) -> tuple[bytes, bytes]:
    header, _ = frame.parse(value)
    assert any(header.nonce)
    assert any(header.salt)
    return header.salt, header.nonce


def test_no_nonce_is_used_twice_by_threads() -> None:
    cipher, shape, found = Cipher([KEY]), layout(), []

    def work() -> None:
        found.extend(used(encrypted(cipher, shape, b"same")) for _ in range(3000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 12_000


def test_no_nonce_is_used_twice_after_a_fork() -> None:
    """Parent and children go on from the same state, with the same cipher; they must part at once."""
    cipher, shape = Cipher([KEY]), layout()
    encrypted(cipher, shape, b"before")
    children = []
    for _ in range(3):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, b"".join(b"".join(used(encrypted(cipher, shape, b"same"))) for _ in range(100)))
            os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    mine = [b"".join(used(encrypted(cipher, shape, b"same"))) for _ in range(100)]
    for pid, reading in children:
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0
        mine += [data[at : at + 28] for at in range(0, len(data), 28)]
    assert len(set(mine)) == len(mine) == 400


def test_no_nonce_is_used_twice_by_processes() -> None:
    program = textwrap.dedent(
        """
        import os
        from kvkeep.crypt import Cipher
        from test_crypt import *
        cipher = Cipher([KEY])
        for _ in range(50):
            print(b"".join(used(encrypted(cipher, layout(), b"same"))).hex())
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "PYTHONHASHSEED": "0"}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    found = [line for run in runs for line in run.stdout.split()]
    assert len(set(found)) == len(found) == 150
    assert len({line[:32] for line in found}) == 3, "each process draws a salt of its own"


def test_a_working_key_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypt, "MESSAGES_PER_SALT", 10)
    cipher = Cipher([KEY])
    values = [encrypted(cipher, layout(), bytes([n])) for n in range(35)]
    salts = [used(value)[0] for value in values]
    assert [len(set(salts[at : at + 10])) for at in (0, 10, 20)] == [1, 1, 1]
    assert len(set(salts)) == 4
    assert [decrypted(cipher, value) for value in values] == [bytes([n]) for n in range(35)]


def test_working_keys_for_reading_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypt, "_READ_KEYS", 8)
    reader = Cipher([KEY])
    for number in range(30):
        assert decrypted(reader, encrypted(Cipher([KEY]), layout(), bytes([number]))) == bytes([number])
    assert len(reader._reading) <= 8


# Texts


def test_texts() -> None:
    cipher = Cipher([KEY, OLD])
    token = cipher.encrypt_text("model 模型", context=b"models.json", namespace=b"a")
    assert token.isascii()
    assert "model" not in token
    assert Cipher([OLD, KEY]).decrypt_text(token, context=b"models.json", namespace=b"a") == "model 模型"
    assert token != cipher.encrypt_text("model 模型", context=b"models.json", namespace=b"a")
    wrong = {
        "checksum": lambda: cipher.decrypt_text(token, context=b"elsewhere", namespace=b"a"),
        "locked": lambda: Cipher([OLD]).decrypt_text(token, context=b"models.json", namespace=b"a"),
        "plain": lambda: cipher.decrypt_text("model", context=b"models.json"),
    }
    for cause, work in wrong.items():
        assert cause_of(work) == cause
    assert cause_of(lambda: cipher.decrypt_text(token, context=b"models.json")) == "checksum"
    data = cipher.encrypt_bytes(b"\0bytes\xff", context=b"name")
    assert Cipher([KEY]).decrypt_bytes(data, context=b"name") == b"\0bytes\xff"
    assert cause_of(lambda: cipher.decrypt_bytes(data, context=b"other")) == "checksum"
    for garbage in ("", "====", "é", "AQ" * 200, token[:-4], token[4:]):
        assert cause_of(lambda text=garbage: cipher.decrypt_text(text, context=b"models.json")) in frame.CAUSES


# A cache


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Four encrypted blocks on disk."""
    path = tmp_path / "kept"
    with kvkeep.open(path, memory="4MiB", disk="16MiB", codec="raw", encryption=lambda: KEY) as cache:
        assert cache.bind(layout(), description="a secret model").save(TOKENS, Marked()) == 4
        assert cache.flush(10)
    return path


def test_nothing_on_disk_is_plain(directory: Path) -> None:
    files = [file for file in directory.rglob("*") if file.is_file()]
    data = b"".join(file.read_bytes() for file in files)
    assert MARK not in data
    assert MARK[:12] not in data
    assert data.count(frame.MAGIC) == 4


def test_a_cache_finds_its_encrypted_blocks_again(directory: Path) -> None:
    for codec in ("raw", "lossless"):
        with kvkeep.open(directory, memory=0, disk="16MiB", codec=codec, encryption=lambda: KEY) as cache:
            bound = cache.bind(layout())
            assert len(load(bound)) == 4
            bound.save(range(1000, 1064), Marked())
            assert cache.flush(10)
            assert len(load(bound, list(range(1000, 1064)))) == 4
            assert bound.counters.count("corrupt") == bound.counters.count("lost") == 0


@pytest.mark.parametrize("encryption", [None, lambda: OLD], ids=["no key", "a wrong key"])
def test_without_the_key_it_is_a_miss_that_says_why(
    directory: Path, encryption: crypt.KeySource | None, caplog: pytest.LogCaptureFixture
) -> None:
    with kvkeep.open(directory, memory="4MiB", disk="16MiB", encryption=encryption) as cache:
        bound = cache.bind(layout())
        with caplog.at_level(logging.WARNING, "kvkeep"):
            assert load(bound) == {}
        assert bound.counters.count("lost", tier="disk", cause="locked") == 1
        assert Cipher([KEY]).key_ids[0].hex() in caplog.text
        assert bound.match(TOKENS).num_blocks == 0, "what cannot be read is promised once, not at each request"
        assert bound.save(TOKENS, Marked()) >= 1
        assert load(bound)[0]
        assert bound.counters.count("corrupt") == 0
    with kvkeep.open(directory, memory=0, disk="16MiB", encryption=lambda: KEY) as cache:
        assert len(load(cache.bind(layout()))) == 4, "others' blocks are left alone"


def test_old_keys_read_and_the_new_one_writes(directory: Path) -> None:
    with kvkeep.open(directory, memory="4MiB", disk="16MiB", encryption=[lambda: OLD, lambda: KEY]) as cache:
        bound = cache.bind(layout())
        assert len(load(bound)) == 4
        assert bound.save(range(64, 128), Marked()) == 4
        assert cache.flush(10)
        ids = {frame.parse(cache.store.tiers[1].store.get(key))[0].key_id for key in bound.match(range(64, 128)).keys}
        assert ids == {Cipher([OLD]).key_ids[0]}


def test_plain_blocks_are_not_believed_where_encryption_is_on(tmp_path: Path) -> None:
    """xxh3 is no secret: whoever can write to the medium could plant blocks that check."""
    with kvkeep.open(tmp_path / "kept", memory="4MiB", disk="16MiB") as cache:
        cache.bind(layout()).save(TOKENS, Marked())
    with kvkeep.open(tmp_path / "kept", memory=0, disk="16MiB", encryption=lambda: KEY) as cache:
        bound = cache.bind(layout())
        assert load(bound) == {}
        assert bound.counters.count("corrupt", tier="disk", cause="plain") == 1
        assert bound.match(TOKENS).num_blocks == 0


def test_tenants_with_one_key(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path / "kept", memory=0, disk="16MiB", encryption=lambda: KEY) as cache:
        cache.bind(layout(b"a")).save(TOKENS, Marked())
        assert cache.flush(10)
        assert len(load(cache.bind(layout(b"a")))) == 4
        for other in (b"", b"b"):
            assert cache.bind(layout(other)).match(TOKENS).num_blocks == 0


def test_values_and_their_names_are_encrypted_too(tmp_path: Path) -> None:
    """Small values and the callers' keys stand in an index of their own."""
    small, large = "a small private value", MARK.decode() * 100
    path = tmp_path / "kept"
    with kvkeep.open(path, memory="4MiB", disk="16MiB", codec="raw", encryption=lambda: KEY, namespace=b"t") as cache:
        assert cache.set_value("the name of a patient", small)
        assert cache.set_value(("another name", 7), large)
        assert cache.flush(10)
    data = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    for text in (small, "the name of a patient", "another name", MARK.decode(), "a patient"):
        assert text.encode() not in data
    assert {oct(file.stat().st_mode & 0o777) for file in path.rglob("*") if file.is_file()} == {"0o600"}
    for key, namespace, expected in ((KEY, b"t", small), (OLD, b"t", None), (KEY, b"", None), (None, b"t", None)):
        encryption = None if key is None else lambda key=key: key
        with kvkeep.open(path, memory="4MiB", disk="16MiB", encryption=encryption, namespace=namespace) as cache:
            assert cache.get_value("the name of a patient") == expected
            if expected is not None:
                assert cache.get_value(("another name", 7)) == large
                assert cache.keys_of(small) == ["the name of a patient"]
