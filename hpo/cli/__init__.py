"""The command line, a thin layer over `hpo.api`."""
