"""Executors that a user hands in: `concurrent.futures`, loky, Dask."""
