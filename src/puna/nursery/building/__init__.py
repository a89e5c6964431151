"""Rebuilding the nursery's data from pinned packages (see ``puna.nursery.build``); not needed to use it."""
