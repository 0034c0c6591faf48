"""S3 and what speaks its language: one object a block, whole or absent, for every machine that can reach the bucket.

::

    s3://bucket/prefix?region=eu-central-1&endpoint=https://…&lookup_timeout=1&load_timeout=2&save_timeout=10&rate=20e6

Credentials come from where AWS' own tools take them (``AWS_ACCESS_KEY_ID`` and so on, files, the instance); an address
has none. Objects are made with ``If-None-Match: *``, so the first write wins. The bucket's lifecycle rules expire them:
this store neither evicts nor has a time to live. Far slower than a server in the same rack: a tier for prompts that are
worth seconds of prefill. Requests run side by side in a few threads, each within the deadline.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from kvkeep.buffers import Buffer, nbytes_of
from kvkeep.errors import ConfigError, StoreError, ValueTooLargeError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Item, Store
from kvkeep.stores.url import options

if TYPE_CHECKING:
    from obstore.store import S3Store as Bucket

THREADS = 32
LARGEST_NBYTES = (1 << 30) + (1 << 20)
NUMBERS = ("lookup_timeout", "load_timeout", "save_timeout", "rate")

Reply = TypeVar("Reply")


class S3Store(Store):
    """``S3Store("bucket", prefix="kv")``."""

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        region: str | None = None,
        endpoint: str | None = None,
        lookup_timeout: float = 1.0,
        load_timeout: float = 2.0,
        save_timeout: float = 10.0,
        rate: float = 20e6,
    ) -> None:
        """A load or a save has its own seconds, and what its bytes take at ``rate`` bytes a second."""
        try:
            from obstore.store import S3Store as Bucket
        except ImportError as error:
            raise ConfigError("S3 needs obstore: pip install 'kvkeep[s3]'") from error
        if not bucket:
            raise ConfigError("an address of S3 names its bucket: s3://bucket/prefix")
        self._where = f"s3://{bucket}/{prefix}".rstrip("/")
        self._lookup_timeout, self._load_timeout, self._save_timeout = lookup_timeout, load_timeout, save_timeout
        self._rate = rate
        options: dict[str, Any] = {"prefix": prefix or None}
        if region is not None:
            options["region"] = region
        if endpoint is not None:
            options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
        longest = timedelta(seconds=save_timeout + LARGEST_NBYTES / rate)
        client: Any = {"timeout": longest, "connect_timeout": timedelta(seconds=load_timeout)}
        client["allow_http"] = endpoint is not None and endpoint.startswith("http://")
        # Nothing is retried: a cache answers itself.
        self._new: Callable[[], Bucket] = lambda: Bucket(
            bucket, client_options=client, retry_config={"max_retries": 0}, **options
        )
        self._closed = False
        self._start()
        _open.add(self)

    def _start(self) -> None:
        self._bucket = self._new()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvkeep-s3")  # started when needed
        self._lock = threading.Lock()
        self._stuck = 0  # threads that nobody waits for any more

    @classmethod
    def from_url(cls, url: str, *, ttl: float | None = None) -> S3Store:
        if ttl is not None:
            raise ConfigError("S3 has no ttl of ours: give the bucket a lifecycle rule that expires objects")
        path, _, query = url.partition("://")[2].partition("?")
        if "@" in path:
            raise ConfigError("an address of S3 has no user and password: set AWS_ACCESS_KEY_ID and its like")
        bucket, _, prefix = path.partition("/")
        told = options(query, "S3", texts=("region", "endpoint"), numbers=NUMBERS)
        return cls(bucket, prefix=prefix.strip("/"), **told)

    def __repr__(self) -> str:
        return f"S3Store({self._where})"

    # Questions

    def contains(self, key: BlockKey) -> bool:
        return self.contains_many([key])[0]

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        import obstore

        def there(key: BlockKey) -> bool:
            try:
                obstore.head(self._bucket, key.hex())
            except FileNotFoundError:
                return False
            return True

        return self._each(there, keys, self._lookup_timeout)

    def get(self, key: BlockKey) -> Buffer | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[BlockKey]) -> list[Buffer | None]:
        import obstore

        deadline = time.monotonic() + self._load_timeout
        sizes: list[int] = []

        def value(key: BlockKey) -> Buffer | None:
            try:
                found = obstore.get(self._bucket, key.hex())
            except FileNotFoundError:
                return None
            nbytes = found.meta["size"]
            if nbytes > LARGEST_NBYTES:
                return b""  # no frame of ours
            with self._lock:
                sizes.append(nbytes)
            return memoryview(found.bytes())

        return self._each(value, keys, lambda: deadline + sum(sizes) / self._rate - time.monotonic())

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        """By listing the prefix: one request for each 1,000 objects."""
        import obstore

        def listed(_: None) -> list[tuple[BlockKey, int]]:
            found = []
            for batch in obstore.list(self._bucket):
                for each in batch:
                    if len(each["path"]) == 64 and not set(each["path"]) - set("0123456789abcdef"):
                        found.append((BlockKey(bytes.fromhex(each["path"])), each["size"]))
            return found

        return iter(self._each(listed, [None], 60.0)[0])

    def ping(self) -> None:
        self.contains(BlockKey(bytes(32)))

    # Commands

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        self.put_many([(key, parts)])

    def put_many(self, items: Sequence[Item]) -> int:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        sizes = [nbytes_of(parts) for _, parts in items]
        if sizes and max(sizes) > LARGEST_NBYTES:
            raise ValueTooLargeError(f"{max(sizes)} bytes: the largest value is {LARGEST_NBYTES}")

        def put(item: Item) -> None:
            key, parts = item
            with suppress(AlreadyExistsError):
                obstore.put(self._bucket, key.hex(), b"".join(parts), mode="create", use_multipart=False)

        self._each(put, items, self._save_timeout + sum(sizes) / self._rate)
        return len(items)

    def delete(self, key: BlockKey) -> bool:
        import obstore

        there = self.contains(key)
        if there:
            self._each(lambda name: obstore.delete(self._bucket, name), [key.hex()], self._save_timeout)
        return there

    def after_fork(self) -> None:
        self._start()

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        _open.discard(self)

    def _each(
        self, work: Callable[[Any], Reply], arguments: Sequence[Any], seconds: float | Callable[[], float]
    ) -> list[Reply]:
        """``work`` of each argument, side by side, within ``seconds`` in all."""
        from obstore.exceptions import BaseError

        if self._closed:
            raise StoreError("this store is closed", cause="closed")
        with self._lock:
            if self._stuck >= THREADS:
                raise StoreError("no answer to earlier requests yet", cause="timeout")
        end = None if callable(seconds) else time.monotonic() + seconds
        futures: list[Future[Reply]] = []
        replies: list[Reply] = []
        try:
            futures += [self._threads.submit(work, argument) for argument in arguments]
            for future in futures:
                while True:
                    left = seconds() if callable(seconds) else (end or 0.0) - time.monotonic()
                    try:
                        replies.append(future.result(max(0.0, left)))
                        break
                    except FutureTimeoutError:
                        if future.done() or (callable(seconds) and seconds() > 0):
                            continue  # just now; or more bytes are on their way than were known
                        raise StoreError("no answer in time", cause="timeout") from None
        except (BaseError, OSError, ValueError) as error:
            raise _failure(error) from None
        except RuntimeError:  # the threads were shut down meanwhile
            raise StoreError("this store is closed", cause="closed") from None
        finally:
            for future in futures:
                if not future.cancel() and not future.done():
                    with self._lock:
                        self._stuck += 1
                    future.add_done_callback(self._unstuck)
        return replies

    def _unstuck(self, _: Future[Any]) -> None:
        with self._lock:
            self._stuck -= 1


def _failure(error: Exception) -> StoreError:
    """In our words: what obstore says repeats the address and the request."""
    from obstore import exceptions

    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError | PermissionError):
        return StoreError("the bucket refuses these credentials", cause="auth")
    text = str(error).partition("\n")[0]  # behind it, obstore shows its insides
    if "169.254." in text or "/api/token" in text:  # it asked the machine's cloud for some
        return StoreError("there are no credentials: set AWS_ACCESS_KEY_ID and its like", cause="auth")
    if "timed out" in text or "timeout" in text:
        return StoreError("no answer in time", cause="timeout")
    if "error sending request" in text or "connect" in text.lower():
        return StoreError("the bucket's server cannot be reached", cause="unreachable")
    if "credential" in text.lower():
        return StoreError("there are no credentials: set AWS_ACCESS_KEY_ID and its like", cause="auth")
    if isinstance(error, FileNotFoundError):
        return StoreError("there is no such bucket", cause="error")
    return StoreError(f"the bucket's server answered with an error ({type(error).__name__})", cause="error")


_open: weakref.WeakSet[S3Store] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_open):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)
