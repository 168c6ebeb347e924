"""`python -m hpo` is the command `hpo`."""

from hpo.cli import main

main(prog_name="hpo")
