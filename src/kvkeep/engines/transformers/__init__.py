"""Hugging Face Transformers: ``generate()`` that does not read the same prompt twice.

``attach(model, cache)`` puts a hook before and after the model's forward and wraps ``model.generate``; ``detach``
takes them away. Within ``generate`` the hook acts on a forward whose cache is empty and whose token ids it sees: it
fills the cache with the longest prefix that is kept and lets the model compute the rest. After that forward the
prompt's blocks are kept, and at the end of ``generate`` those of the decoded tokens, so that a chat's next turn
starts where the last one ended. A hit always leaves the model the last token of the prompt, or it would have nothing
to predict from. Outside ``generate`` the model is as before.

**Batches.** A Transformers cache has one length for all rows, so a batch reuses the longest *common* past
``P = min(pad_i + hit_i)`` (rows padded on the left, ``pad_i`` slots each): a longer hit of one row would leave its
neighbours' slots unknown. Padded slots hold zeros; the mask hides them. Equal rows (beams, return sequences) are
looked up, loaded and kept once.

**Fast and exact.** Restored values are the bits that were stored. But matrix products round differently at different
shapes, so in reduced precision a suffix computed after a restored prefix can differ in rounding from one prefill in
one piece, as with every engine's own prefix cache. ``exact=True`` computes every prompt in segments of ``segment``
tokens, restores at their borders only and keeps nothing that was computed otherwise (decoded tokens, a tail), so a hit
is bit-identical to a miss. It costs 2–3 % of a prefill at 256 tokens, serves one sequence at a time, and its blocks
are used by exact mode only, on the same kind of device with the same versions and threads.

**Left alone**, with one log line a reason: models whose state cannot be cut into blocks (sliding window, recurrent,
hybrid, encoder-decoder, shared layers), caches other than :class:`~transformers.DynamicCache` (static, quantized,
offloaded) or with content, ``use_cache=False``, ``inputs_embeds``, images and other inputs beside tokens, training,
autocast, several devices, right padding or odd positions, foreign forward hooks, a prompt beyond the length at which
dynamic or long rope changes its frequencies.

**Identity** is by bytes: see :func:`describe`. It is looked at again at each call, by the tensors' addresses, versions
and a sample of their values, so switched, merged or trained adapters and loaded weights count at once. What changes
a few values behind torch's back (``parameter.data[0] = …``) may be missed: ``attach`` again after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedModel

from kvkeep.cache import KVCache
from kvkeep.engines.transformers.attachment import Attachment, Generate, Report
from kvkeep.engines.transformers.checks import unservable
from kvkeep.engines.transformers.identity import describe
from kvkeep.errors import ConfigError

__all__ = ["Report", "attach", "describe", "detach", "report"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


def attach(model: Model, cache: KVCache, *, exact: bool = False, segment: int = 256, wait: float = 0.0) -> Model:
    """Make ``model.generate`` reuse and keep prefixes in ``cache``; returns ``model``, a PEFT model too.

    ``exact``: a hit is bit-identical to a miss (see the module). ``segment``: its tokens, rounded up to whole blocks.
    ``wait``: seconds to wait while another thread, process or machine reads the same prefix, to load it then.
    Beside the cache's own budget, an attached model keeps up to 1 GiB of memory that prefixes were restored into; where
    the cache holds blocks already, up to 512 MiB of it are touched at once, in the background.
    A model that cannot be served is returned as it was, with a warning in the log that says why. Raises
    :class:`ConfigError` for what is no Transformers model, or one that is attached already, or whose measured quality
    the cache's codec passes the limit of.
    """
    base = _base(model)
    if not hasattr(cache, "bind"):
        raise ConfigError(f"cache is what kvkeep.open returns, not {cache!r}")
    if segment < 1:
        raise ConfigError(f"segment is at least 1 token, not {segment}")
    if not 0 <= wait < float("inf"):
        raise ConfigError(f"wait is a number of seconds, not {wait}")
    if _attachment(base) is not None:
        raise ConfigError("this model is attached already: detach(model) first")
    attachment = Attachment(base, cache, segment if exact else 0, wait)
    reason = unservable(base) or attachment.identify()
    if reason:
        logger.warning("kvkeep leaves %s alone: %s", type(base).__name__, reason)
        return model
    attachment.install()
    return model


def detach(model: Model) -> Model:
    """Undo :func:`attach`; nothing happens to a model that is not attached."""
    attachment = _attachment(_base(model))
    if attachment is not None:
        attachment.remove()
    return model


def report(model: Any) -> Report | None:
    """What happened to the last ``generate``; None before the first, or for a model that is not attached."""
    attachment = _attachment(_base(model))
    return attachment.last if attachment is not None else None


def _base(model: Any) -> Any:
    """The Transformers model itself, out of a PEFT model."""
    inner: Callable[[], Any] | None = (
        None if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", None)
    )
    base = inner() if inner is not None else model
    if not isinstance(base, PreTrainedModel):
        raise ConfigError(f"a {type(model).__name__} is no Transformers model")
    return base


def _attachment(model: Any) -> Attachment | None:
    found = model.__dict__.get("generate")
    return found._attachment if isinstance(found, Generate) else None
