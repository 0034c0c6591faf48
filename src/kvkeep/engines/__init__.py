"""Engines: a source, a sink and glue each. Only `engines/X.py` imports engine X."""
