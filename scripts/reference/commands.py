"""Commands with their arguments, help, examples and options, from click."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from hpo.cli.app import main as hpo_command
from scripts.reference.markdown import table, unwrapped

__all__ = ["command_sections", "command_summaries"]


def command_summaries() -> str:
    rows = []
    for name, command in leaf_commands(hpo_command, "hpo"):
        text = unwrapped(command.help or "").split("\n\n")[0]
        rows.append((f"[`{name}`](#{name.replace(' ', '-')})", text))
    return table(["command", "what it does"], rows)


def command_sections() -> str:
    return "\n".join(command_section(name, command) for name, command in leaf_commands(hpo_command, "hpo"))


def leaf_commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    """Yield each command that does something, with its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaf_commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def command_section(name: str, command: click.Command) -> str:
    """Return the section of a command."""
    context = click.Context(command)
    prose, _, examples = inspect.cleandoc(command.help or "").partition("\b\n")
    arguments = [one.make_metavar(context) for one in command.params if isinstance(one, click.Argument)]
    options = [one for one in command.params if isinstance(one, click.Option)]
    usage = " ".join([name, *arguments, "[OPTIONS]"])
    shown = f"\n```\n{examples.strip()}\n```\n" if examples else ""
    rows = [(f"`{option_usage(one, context)}`", option_text(one)) for one in options]
    return f"## `{name}`\n\n`{usage}`\n\n{unwrapped(prose)}\n{shown}\n{table(['option', 'meaning'], rows)}"


def option_usage(option: click.Option, context: click.Context) -> str:
    return option.opts[0] if option.is_flag else f"{option.opts[0]} {option.metavar or option.make_metavar(context)}"


def option_text(option: click.Option) -> str:
    default = f" Default: `{option.default}`." if option.show_default else ""
    repeated = " May be repeated." if option.multiple else ""
    return f"{option.help}{default}{repeated}"
