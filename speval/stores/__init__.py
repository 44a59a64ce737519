"""Stores: where evaluations live.

Owns the contract (``base``) and its implementations. Invariant: nothing above this package knows any SQL.
"""
