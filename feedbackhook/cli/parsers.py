"""A command's description, and the parser made from all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from feedbackhook.names import nearest

Config = TypeVar("Config")


@dataclass(frozen=True)
class Command:
    """One command, or a group of commands.

    Args:
        name: the word on the command line.
        help: its line in the list of commands.
        description: what `feedbackhook NAME --help` says first.
        arguments: adds its arguments to a parser.
        run: runs it and returns the exit status.
        takes_config: whether `--config FILE` is an option and FILE may stand first instead.
        subcommands: the commands of a group, which has neither `arguments` nor `run`.
    """

    name: str
    help: str
    description: str
    arguments: Callable[[ArgumentParser], object] | None = None
    run: Callable[[Namespace], int] | None = None
    takes_config: bool = False
    subcommands: tuple[Command, ...] = ()


def build_parser(commands: Sequence[Command]) -> ArgumentParser:
    """The parser of the whole command line."""
    parser = _parser(
        "Train networks whose error signals travel through feedback weights of your choice.",
        prog="feedbackhook",
    )
    _add_commands(parser, commands, "command")
    return parser


def config_first(commands: Iterable[Command], arguments: list[str]) -> list[str]:
    """Turn `train FILE ...` into `train --config FILE ...`."""
    names = {command.name for command in commands if command.takes_config}
    if len(arguments) > 1 and arguments[0] in names and not arguments[1].startswith("-"):
        return [arguments[0], "--config", *arguments[1:]]
    return arguments


def run_command(commands: Iterable[Command], given: Namespace, dest: str = "command") -> int:
    """Run the command that was parsed."""
    name = given[dest]
    command = next(command for command in commands if command.name == name)
    if command.run is None:
        return run_command(command.subcommands, given[name], "action")
    return command.run(given[name])


def suggestion(commands: Iterable[Command], arguments: Sequence[str], message: str) -> str:
    """Return options like the one that a parser's message calls unknown, to append to it; "" if none is."""
    match = re.search(r"(?:unrecognized arguments: |does not accept option ')(-*)([\w.-]+)", message)
    command = next((command for command in commands if command.name == arguments[0]), None)
    if match is None or command is None or command.arguments is None:
        return ""
    parser = _parser(command.description)
    command.arguments(parser)
    dashes, name = match.groups()
    known = re.findall(r"(?<![\w-])--([\w.-]+)", parser.format_help())
    return nearest(f"{dashes}{name}", [f"{dashes}{option}" for option in known])


def config_from(config: type[Config], given: Namespace) -> Config:
    """The dataclass `config` from the arguments that were parsed."""
    kind: Any = config
    made: Config = kind(**{field.name: given[field.name] for field in fields(kind)})
    return made


def _parser(description: str, **options: Any) -> ArgumentParser:
    return ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False, **options)


def _add_commands(parser: ArgumentParser, commands: Iterable[Command], dest: str) -> None:
    added = parser.add_subcommands(required=True, dest=dest)
    for command in commands:
        child = _parser(command.description)
        if command.takes_config:
            child.add_argument(
                "--config", action="config", help="a YAML file; may also be given first, without --config"
            )
        if command.arguments is not None:
            command.arguments(child)
        added.add_subcommand(command.name, child, help=command.help)
        if command.subcommands:  # jsonargparse asks for the outer level first
            _add_commands(child, command.subcommands, "action")
