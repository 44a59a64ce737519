"""The types of the public face, as a user's type checker sees them: read by those, not run."""
