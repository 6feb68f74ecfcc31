"""The making of command groups of `offsite`, so that every group answers to `-h` and suggests a name once."""

import typer

CONTEXT = {"help_option_names": ["--help", "-h"]}


def command_group(name: str | None = None, *, about: str | None = None, completion: bool = False) -> typer.Typer:
    """Returns an empty group of commands.

    Args:
      name: word of the group at the command line; None puts the group's commands where the group is added.
      about: help text of the group.
      completion: whether the group offers to install completion for a shell; the root group does.
    """
    return typer.Typer(
        name=name,
        help=about,
        no_args_is_help=bool(about),
        add_completion=completion,
        context_settings=CONTEXT,
        suggest_commands=False,  # click suggests names itself, and the reader needs them once
        pretty_exceptions_enable=False,
    )
