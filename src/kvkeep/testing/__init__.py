"""Conformance suites for stores, policies, codecs and engines, shipped for third parties."""
