"""What kvkeep says, in a vLLM server's log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.logger import init_logger

from kvkeep.errors import ConfigError

log = init_logger("vllm.kvkeep")


def join() -> None:
    """Lines of tiers and stores, which know nothing of vLLM, go where vLLM's own go, in their form and with kvkeep's
    name; unless the process has given them a place already. Called again it changes nothing."""
    ours, theirs = logging.getLogger("kvkeep"), logging.getLogger("vllm")
    if not ours.hasHandlers():
        ours.setLevel(theirs.level)
        ours.addFilter(_name)
        for handler in theirs.handlers:
            ours.addHandler(handler)


def _name(record: logging.LogRecord) -> bool:
    record.msg = f"kvkeep: {record.msg}"
    return True


@contextmanager
def refusing() -> Iterator[None]:
    """The reason of a :class:`ConfigError` gets a line of its own: vLLM shows it only inside long tracebacks."""
    try:
        yield
    except ConfigError as error:
        log.error("kvkeep: %s", error)
        raise
