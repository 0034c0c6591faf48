"""A cache's figures as a pandas frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    Frame: TypeAlias = pd.DataFrame

COLUMNS = ("event", "tier", "cause", "count", "nbytes")


def frame(rows: Iterable[Mapping[str, Any]]) -> Frame:
    """Rows with :data:`COLUMNS`; texts that are the same in many rows are categories."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError("figures as a frame need pandas: pip install 'kvkeep[pandas]'") from error
    made = pd.DataFrame(list(rows), columns=list(COLUMNS))
    return made.astype({"event": "category", "tier": "category", "cause": "category", "count": int, "nbytes": int})
