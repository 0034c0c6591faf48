"""Replays of traces: how much a policy would have found, at what capacity, and how far that is from the best.

:func:`replay` gives a pandas DataFrame, :func:`rows` the same as a list of dicts. The policies are those that serve
production, by name.
"""

from kvkeep.sim.capacity import parse_capacity
from kvkeep.sim.replay import frame, replay, rows

__all__ = ["frame", "parse_capacity", "replay", "rows"]
