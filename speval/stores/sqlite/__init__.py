"""Evaluations in one SQLite file."""
