"""Lends single calls of a transformers model another attention, and leaves all its other calls and copies alone."""
