"""Eval spaces: encoded at once, or read from an iterator during the run."""
