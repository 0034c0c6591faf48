"""The arithmetic of the codecs: compiled where that can be, NumPy where it cannot, the same bytes either way.

``kernels()`` is whichever is there *now*. The compiler runs in the background, started when a codec is made, so a
request never waits for it: until the library is there NumPy does the work, and nobody can tell but by the time it
takes. ``python -m kvkeep.codecs.kernels`` compiles ahead (for an image) and says which one is used.

Arguments of the functions:

- ``x``: a layer group's values, flat, as :class:`~kvkeep.codecs.values.Shape` says; ``dtype`` their type.
- ``stored``: bytes of the group in the codec's form, little-endian.
- ``skip``: the first tokens, which the codec keeps exactly and leaves out of its scales.
- ``*_encode`` returns False for what it cannot code: a value that is not finite, or above 2^48.

Forms. A *level* is how far a scale lies below its *top*, in floats cut to one bit of mantissa (``int8``'s keys: half
octaves, 4 bits) or three (8 bits).

``int8``
    Tops of the values u16 a layer · tops of the keys u8 a head (exponents) · levels of each key channel, two a byte ·
    levels of each token's values · the numbers, in the block's order. value = number × scale / 127.
``int4``
    Tops u16 ×2 a layer · levels of each key channel of 64 tokens · lowest of these in steps, i8 · the same for each
    token's 64 values · numbers 0 … 15, two a byte: channel d beside d + dim/2. value = (number + lowest) × step.
``uqz``
    Arrays: step of each head's keys (u16, the upper half of a float32) · tops of the values u16 a layer · means of the
    key channels in ``grid`` steps, i16 · levels of each token's values · key numbers i8 · value numbers i8.
    key = number × step + mean; value = number × step.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from kvkeep.codecs import compiled, reference

log = logging.getLogger("kvkeep")

_current: Any = reference
_thread: threading.Thread | None = None
_lock = threading.Lock()


def kernels() -> Any:
    """:mod:`kvkeep.codecs.reference`, or what does the same faster."""
    if _thread is None:
        prepare()
    return _current


def prepare() -> None:
    """Load the compiled kernels; where they have to be compiled first, that happens in a thread. Returns at once."""
    global _thread
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_prepare, name="kvkeep-kernels", daemon=True)
            _thread.start()


def wait(seconds: float | None = None) -> bool:
    """Until it is clear which kernels this process uses: are they compiled ones?"""
    prepare()
    assert _thread is not None
    _thread.join(seconds)
    return _current is not reference


def _after_fork() -> None:
    """The child has no thread that would still finish."""
    global _thread, _lock
    _lock = threading.Lock()
    if _current is reference:
        _thread = None


os.register_at_fork(after_in_child=_after_fork)


def _prepare() -> None:
    # Nothing is imported here: a child that is forked meanwhile would wait for that import for ever.
    global _current
    path = compiled.library() or compiled.build()
    if path is None:
        log.info("no C compiler: codecs run on NumPy, several times slower (pip install 'kvkeep[fast]' brings one)")
        return
    try:
        found = compiled.Compiled(path)
    except (OSError, AttributeError) as error:
        log.warning("%s cannot be loaded, so codecs run on NumPy: %s", path, error)
        return
    if compiled.agrees(found):
        _current = found
    else:
        log.warning("%s does not compute what NumPy does, so codecs run on NumPy", path)


if __name__ == "__main__":
    print("compiled" if wait() else "NumPy")
