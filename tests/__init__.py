"""The tests: read in a row, their names are the specification."""
