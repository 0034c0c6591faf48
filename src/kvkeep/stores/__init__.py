"""Stores: one file a medium. Look one up by name with :func:`kvkeep.registry.lookup`."""
