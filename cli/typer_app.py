"""How every group of commands of `offsite` is made, so that all answer to `-h` and suggest a name once."""

import typer

CONTEXT = {"help_option_names": ["--help", "-h"]}


def command_group(name: str | None = None, *, about: str | None = None, completion: bool = False) -> typer.Typer:
    """Returns an empty group of commands.

    Args:
      name: the word at the command line; None puts the group's commands where the group is added.
      about: text of its help.
      completion: whether it offers to install completion for a shell; the root does.
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
