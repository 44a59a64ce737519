"""What a call draws in a terminal or a notebook while it runs."""
