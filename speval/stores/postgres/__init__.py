"""The PostgreSQL store: evaluations in a schema of a PostgreSQL database."""
