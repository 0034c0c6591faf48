"""``python -m bench`` runs all; ``python -m bench bytes growth`` those named."""

from __future__ import annotations

import sys
from importlib import import_module

ALL = ("bytes", "codecs", "crypt", "growth", "remote", "replay", "ttft", "values")

names = sys.argv[1:] or ALL
unknown = [name for name in names if name not in ALL]
if unknown:
    sys.exit(f"no benchmark is called {unknown[0]!r}; there are: {', '.join(ALL)}")
for name in names:
    import_module(f"bench.{name}").main()
