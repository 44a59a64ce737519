"""The display of a running call in a terminal or a notebook."""
