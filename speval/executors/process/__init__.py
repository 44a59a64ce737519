"""Plain functions, each slot in a worker process."""
