"""The command for first steps: init."""

from __future__ import annotations

import click

from hpo.cli.options import command_line
from hpo.cli.writer import say


@click.command("init", short_help="Write a first study file.")
@click.argument("name", metavar="[NAME]", default="my_study")
@click.option("--model", is_flag=True, help="Also write own_model.py, a network to change.")
@click.option("--data", is_flag=True, help="Also write own_data.py, a data set to change.")
@click.option("--loop", is_flag=True, help="Write own_loop.py, a training loop to change, with a study of it.")
def init_command(name: str, model: bool, data: bool, loop: bool) -> None:
    """Write NAME.toml, a commented study of the data and the code in this folder. It runs as it is.

    Data is a folder of images (photos/train/<class>/ or photos/<class>/), one of torchvision's sets in data/, or a
    function that returns (train, test). Code is a network that takes num_classes, or a training loop that takes
    trial. Without data, the study trains on scanned digits.

    \b
    hpo init flowers
    hpo init --model --data
    """
    from hpo.api import first_steps

    asked = {"model": model, "data": data, "loop": loop}
    for line in first_steps.write_first_study(name, examples=[kind for kind, is_asked in asked.items() if is_asked]):
        say(line)
    say(f"next: {command_line('run', name.removesuffix('.toml') + '.toml')}")
