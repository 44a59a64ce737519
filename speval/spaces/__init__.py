"""Eval spaces: eager ones, encoded before the run, and lazy ones, read from an iterator during the run."""
