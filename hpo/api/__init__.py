"""The public functions: run a study, read it, export its best trial."""
