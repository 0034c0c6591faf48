"""Codecs: one file each."""
