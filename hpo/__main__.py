"""The command `hpo`, which is `python -m hpo`, too."""

import sys


def start() -> None:
    """Run the command; Ctrl-C while it loads ends it without a traceback, as it does later."""
    try:
        from hpo.cli.app import main
    except KeyboardInterrupt:
        sys.exit("hpo: interrupted")
    main(prog_name="hpo")


if __name__ == "__main__":
    start()
