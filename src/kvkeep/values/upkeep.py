"""What the commands do with an index of values: tell whose an entry is, forget it, encrypt it anew.

What stands in an index beside entries (tags' generations, claims) says nothing about anybody, and is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path

from kvkeep.crypt import Cipher, key_id_of
from kvkeep.errors import FrameError
from kvkeep.stores.base import Store
from kvkeep.values import INDEXES
from kvkeep.values.entry import decode, naming
from kvkeep.values.index import Index

BATCH = 500


def index_of(store: Store, directory: Path | None) -> Index | None:
    """The index that lies in ``directory``, or beside the blocks of a server's ``store``; None if there is none."""
    if directory is not None:
        from kvkeep.values.sqlite import FILE, SqliteIndex

        return SqliteIndex(directory) if (directory / FILE).exists() else None
    if type(store).__module__ not in INDEXES:
        return None
    module, _, name = INDEXES[type(store).__module__].partition(":")
    index: Index = getattr(import_module(module), name)(store)
    return index


def belongs(name: bytes, body: bytes, namespace: bytes, cipher: Cipher | None) -> bool | None:
    """Is it an entry of this tenant's? None if only who has its key could tell."""
    key_id = key_id_of(body)
    if key_id is None:
        entry = decode(name, body)
        if entry is None:
            return False
        mac = naming(namespace)
        mac.update(entry.key)
        return mac.digest() == name
    if cipher is None or key_id not in cipher.key_ids:
        return None
    try:
        cipher.decrypt_bytes(body, context=name, namespace=namespace)
    except FrameError:
        return False
    return True


def forget(index: Index, namespace: bytes | None, cipher: Cipher | None) -> Counter[str]:
    """Delete this tenant's entries, or everything if ``namespace`` is None: how many were ``dropped``, and how many
    are ``locked``, so that nobody can tell whose they are."""
    counts: Counter[str] = Counter()
    for name, body in _entries(index):
        mine = True if namespace is None else belongs(name, body, namespace, cipher)
        if mine is None:
            counts["locked"] += 1
        elif mine:
            counts["dropped"] += index.delete(name)[0]
    index.tidy()
    return counts


def rotate(index: Index, cipher: Cipher, namespaces: Collection[bytes], *, plain: bool) -> Counter[str]:
    """Encrypt every entry of these tenants with the first key: how many were ``rotated`` or ``current``, and how many
    are left, by cause: ``locked`` or ``plain``."""
    counts: Counter[str] = Counter()
    for name, body in _entries(index):
        key_id = key_id_of(body)
        if key_id == cipher.key_ids[0]:
            counts["current"] += 1
            continue
        owner = next((one for one in namespaces if belongs(name, body, one, cipher)), None)
        if owner is None:
            counts["locked"] += key_id is not None or decode(name, body) is not None
        elif key_id is None and not plain:
            counts["plain"] += 1
        else:
            text = body if key_id is None else cipher.decrypt_bytes(body, context=name, namespace=owner)
            # What has been set meanwhile is under the first key already.
            index.replace(name, body, cipher.encrypt_bytes(text, context=name, namespace=owner))
            counts["rotated"] += 1
    index.tidy()
    return counts


def _entries(index: Index) -> Iterator[tuple[bytes, bytes]]:
    names = index.names()
    for start in range(0, len(names), BATCH):
        some = names[start : start + BATCH]
        for name, found in zip(some, index.get_many(some), strict=True):
            if found is not None:
                yield name, found.body
