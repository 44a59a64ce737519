"""Database files that a stranger could send: crafted ones, damaged ones, and odd ones."""
