"""Encryption of what leaves the process: AES-256-GCM, by the ``cryptography`` package.

A user's key never encrypts anything itself. It is drawn out by HKDF-SHA-256 with a random 16-byte salt (and the
tenant's namespace, so that who has the key alone reads no tenant's blocks) into a *working key*, which encrypts
65,536 messages under random 96-bit nonces and is then replaced by another salt's. Salt and nonce travel with the
message. Nothing is counted that a fork, a crash or a restored snapshot could set back, and a repetition needs salt and
nonce to collide: below 2⁻³² after 2⁴⁸ messages under one key, where random nonces alone allow 2³² messages.
(NIST SP 800-38D; the same reasoning as XAES-256-GCM, which draws a key for each message.)

Keys have ids, so that several can be known: the first encrypts, all decrypt. An id is drawn from its key by HKDF too.
"""

from __future__ import annotations

import binascii
import os
from base64 import b64decode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvkeep import frame, secret
from kvkeep.buffers import Buffer, as_bytes
from kvkeep.errors import ConfigError, FrameError
from kvkeep.frame import TAG_NBYTES, Header
from kvkeep.identity import derive, key_of
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_NBYTES = 32
MESSAGES_PER_SALT = 1 << 16
_READ_KEYS = 4096  # working keys that are kept for reading
_HEAD = frame.SEAL_AT  # bytes of a frame's header that are authenticated
_SMALL = b"\x01"  # the form of what is small

KeySource = str | os.PathLike[str] | Callable[[], bytes | str]
"""``"env:NAME"``, a file's path (``"file:…"`` too), or a callable. Each gives 32 bytes: raw, in hex or in base64."""

_FORMS = "32 bytes: raw, as 64 hex digits, or in base64"


class Cipher:
    """Encrypts with the first of ``keys``, decrypts with all. Thread-safe; also in a forked child."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigError("encryption= needs a package: pip install 'kvkeep[encryption]'") from error
        if not keys or any(len(key) != KEY_NBYTES for key in keys):
            raise ConfigError(f"an encryption key has {_FORMS}")
        self._aead: type[AESGCM] = AESGCM
        self._invalid = InvalidTag
        self._keys = {_expand(key, b"", b"kvkeep key id 1", 8): key for key in keys}
        self.key_ids = tuple(self._keys)
        self._writing: dict[tuple[bytes, bytes], _Writing] = {}
        self._reading: dict[tuple[bytes, bytes, bytes, bytes], AESGCM] = {}

    def __repr__(self) -> str:
        return f"Cipher({', '.join(key_id.hex() for key_id in self.key_ids)})"

    def encrypt(self, key: BlockKey, layout: KVLayout, codec: str, payload: Buffer, out: memoryview) -> bytes:
        """Fill ``out`` (``payload`` and :data:`~kvkeep.frame.TAG_NBYTES` more); returns the frame's header for it."""
        identity = layout.identity
        header = Header(len(out), layout.block_nbytes, key, layout.fingerprint, codec, identity.tenant)
        return self._encrypt(header, identity.namespace, payload, out)

    def renew(self, value: Buffer, namespace: bytes) -> bytearray:
        """Frame ``value``, encrypted or merely sealed, as a frame under the first key. ``FrameError`` as in
        :meth:`decrypt`, and ``checksum`` for a broken seal."""
        header, payload = frame.parse(value)
        if header.encrypted:
            plain = memoryview(bytearray(len(payload) - TAG_NBYTES))
            self.decrypt(value, namespace, plain)
        else:
            header, plain = frame.verify(value)
        renewed = bytearray(frame.HEADER_NBYTES + len(plain) + TAG_NBYTES)
        room = memoryview(renewed)[frame.HEADER_NBYTES :]
        renewed[: frame.HEADER_NBYTES] = self._encrypt(
            header._replace(payload_nbytes=len(room)), namespace, plain, room
        )
        return renewed

    def decrypt(self, value: Buffer, namespace: bytes, out: memoryview) -> None:
        """Fill ``out`` (the payload's bytes less the tag's) with what frame ``value`` holds. ``FrameError``: ``plain``
        if it is not encrypted, ``locked`` if its key is not here, ``checksum`` if anything in it was changed."""
        header, payload = frame.parse(value)
        if not header.encrypted:
            raise FrameError("plain", f"block {header.key.hex()[:16]} is not encrypted")
        aead = self._to_read(b"kvkeep frame 1", namespace, header.key_id, header.salt)
        self._open(aead, header.nonce, payload, as_bytes(value)[:_HEAD], out)

    def encrypt_bytes(self, data: bytes, *, context: bytes, namespace: bytes = b"") -> bytes:
        """Something small, for a file or an index. ``context`` says what it is, and must be given again."""
        key_id, salt, aead = self._to_write(b"kvkeep text 1", namespace)
        nonce = os.urandom(12)
        return _SMALL + key_id + salt + nonce + aead.encrypt(nonce, data, context)

    def decrypt_bytes(self, data: Buffer, *, context: bytes, namespace: bytes = b"") -> bytes:
        """What :meth:`encrypt_bytes` made ``data`` of. ``FrameError`` as in :meth:`decrypt`, ``plain`` for anything
        that it did not make."""
        view = as_bytes(data)
        if view[:1] != _SMALL or len(view) < 37 + TAG_NBYTES:
            raise FrameError("plain", "not encrypted")
        aead = self._to_read(b"kvkeep text 1", namespace, bytes(view[1:9]), bytes(view[9:25]))
        out = bytearray(len(view) - 37 - TAG_NBYTES)
        self._open(aead, bytes(view[25:37]), view[37:], context, memoryview(out))
        return bytes(out)

    def encrypt_text(self, text: str, *, context: bytes, namespace: bytes = b"") -> str:
        """:meth:`encrypt_bytes` for a text, in URL-safe ASCII."""
        return urlsafe_b64encode(self.encrypt_bytes(text.encode(), context=context, namespace=namespace)).decode()

    def decrypt_text(self, token: str, *, context: bytes, namespace: bytes = b"") -> str:
        """What :meth:`encrypt_text` made ``token`` of."""
        try:
            data = urlsafe_b64decode(token.encode("ascii"))
        except (ValueError, UnicodeEncodeError) as error:
            raise FrameError("plain", "not encrypted") from error
        return self.decrypt_bytes(data, context=context, namespace=namespace).decode()

    def _encrypt(self, header: Header, namespace: bytes, payload: Buffer, out: memoryview) -> bytes:
        key_id, salt, aead = self._to_write(b"kvkeep frame 1", namespace)
        nonce = os.urandom(12)
        head = frame.pack(
            header.key, header.layout, header.codec, header.payload_nbytes, header.decoded_nbytes,
            tenant=header.tenant, key_id=key_id, nonce=nonce, salt=salt,
        )  # fmt: skip
        aead.encrypt_into(nonce, as_bytes(payload), memoryview(head)[:_HEAD], out)
        return bytes(head)

    def _open(self, aead: AESGCM, nonce: bytes, data: memoryview, context: Buffer, out: memoryview) -> None:
        if len(out) != len(data) - TAG_NBYTES:
            raise FrameError("size", f"{len(data) - TAG_NBYTES} encrypted bytes where {len(out)} were expected")
        try:
            aead.decrypt_into(nonce, data, context, out)
        except self._invalid:
            raise FrameError("checksum", "the tag of what was encrypted does not match") from None

    def _to_write(self, purpose: bytes, namespace: bytes) -> tuple[bytes, bytes, AESGCM]:
        # No lock, which a fork could leave locked: at worst two threads draw a salt each, or use one a little longer.
        writing = self._writing.get((purpose, namespace))
        if writing is None or writing.left <= 0:
            salt = os.urandom(16)
            aead = self._to_read(purpose, namespace, self.key_ids[0], salt)
            writing = self._writing[purpose, namespace] = _Writing(salt, aead)
        writing.left -= 1
        return self.key_ids[0], writing.salt, writing.aead

    def _to_read(self, purpose: bytes, namespace: bytes, key_id: bytes, salt: bytes) -> AESGCM:
        wanted = (purpose, namespace, key_id, salt)
        aead = self._reading.get(wanted)
        if aead is None:
            key = self._keys.get(key_id)
            if key is None:
                raise FrameError("locked", f"encrypted with key {key_id.hex()}, which is not among those given")
            if len(self._reading) >= _READ_KEYS:
                self._reading.clear()
            secret = derive(key_of(namespace), b"kvkeep encryption 1", ())
            aead = self._reading[wanted] = self._aead(_expand(key + secret, salt, purpose, KEY_NBYTES))
        return aead


def key_id_of(data: bytes) -> bytes | None:
    """The id of the key of what :meth:`Cipher.encrypt_bytes` made; None for anything else."""
    return data[1:9] if data[:1] == _SMALL and len(data) >= 37 + TAG_NBYTES else None


class _Writing:
    """The working key that encrypts now, and how many messages it may yet."""

    def __init__(self, salt: bytes, aead: AESGCM) -> None:
        self.salt, self.aead, self.left = salt, aead, MESSAGES_PER_SALT


def open_cipher(encryption: KeySource | Sequence[KeySource] | None) -> Cipher | None:
    """What ``kvkeep.open`` takes: one key's source, or several, of which the first encrypts. Raises
    :class:`ConfigError`, which never quotes a key, if a source gives none."""
    if encryption is None:
        return None
    single = isinstance(encryption, (str, os.PathLike)) or not isinstance(encryption, Sequence)
    sources: Sequence[KeySource] = [encryption] if single else encryption  # type: ignore[assignment, list-item]
    if isinstance(encryption, (bytes, bytearray, memoryview)):
        raise ConfigError("encryption: give the key by a callable, lambda: key, so that it appears in no configuration")
    return Cipher([_key(source) for source in sources])


def _key(source: KeySource) -> bytes:
    if isinstance(source, (str, os.PathLike)):
        return parse_key(*secret.read(source, "encryption"))
    if not callable(source):
        raise ConfigError('encryption: give "env:NAME", "file:PATH" or a callable, or a list of these')
    returned = source()
    if not isinstance(returned, (str, bytes, bytearray, memoryview)):
        raise ConfigError(f"encryption: the callable returned a {type(returned).__name__}; a key has {_FORMS}")
    return parse_key(returned.encode() if isinstance(returned, str) else bytes(returned), "what the callable returned")


def parse_key(data: bytes, where: str) -> bytes:
    """32 bytes from their raw, hex or base64 form. Raises :class:`ConfigError` that names ``where``, not ``data``."""
    text = data.strip()
    try:
        if len(text) == 2 * KEY_NBYTES:
            return binascii.unhexlify(text)
        if len(text) in (43, 44):
            decoded = b64decode(text.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/")) + b"=", validate=True)
            if len(decoded) == KEY_NBYTES:
                return decoded
    except (ValueError, binascii.Error):
        pass
    for raw in (data, text):
        if len(raw) == KEY_NBYTES:
            if all(byte in b"0123456789abcdefABCDEF" for byte in raw):
                raise ConfigError(f"encryption: {where} holds 32 hex digits, which are 16 bytes; a key has {_FORMS}")
            return raw
    raise ConfigError(f"encryption: {where} holds no key; a key has {_FORMS}")


def _expand(secret: bytes, salt: bytes, purpose: bytes, nbytes: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), nbytes, salt or None, purpose).derive(secret)
