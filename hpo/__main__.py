"""`python -m hpo` is the command `hpo`."""

from hpo.cli.app import main

main(prog_name="hpo")
