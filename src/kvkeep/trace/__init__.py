"""Traces: what was asked of a cache, with no more than hashes, sizes and times.

:func:`read` takes a file of any kind that is known and gives a :class:`Trace`; :class:`Recorder` writes kvkeep's own
kind. A file that cannot be read is a :class:`~kvkeep.errors.ConfigError` that names the file and the line.
"""

from kvkeep.trace.base import Request, Trace, merge
from kvkeep.trace.files import read, read_all
from kvkeep.trace.recording import Recorder

__all__ = ["Recorder", "Request", "Trace", "merge", "read", "read_all"]
