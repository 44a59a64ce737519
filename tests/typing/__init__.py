"""The types of the public face, as a user's type checker sees them: read by mypy and pyright in tests/test_typing.py, not run."""
