"""``python -m bench`` runs all; ``python -m bench bytes growth`` those named."""

from __future__ import annotations

import sys

from bench import bytes as data_path
from bench import growth, ttft

ALL = {"bytes": data_path.main, "growth": growth.main, "ttft": ttft.main}

names = sys.argv[1:] or list(ALL)
unknown = [name for name in names if name not in ALL]
if unknown:
    sys.exit(f"no benchmark is called {unknown[0]!r}; there are: {', '.join(ALL)}")
for name in names:
    ALL[name]()
