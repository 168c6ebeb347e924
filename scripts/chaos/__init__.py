"""A study under faults: see __main__.py."""
