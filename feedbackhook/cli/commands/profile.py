"""`feedbackhook profile`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from feedbackhook.cli.parsers import Command, config_from
from feedbackhook.cli.printing import plain_console


def _arguments(parser: ArgumentParser) -> None:
    from feedbackhook.experiments.profiling import ProfileConfig

    parser.add_class_arguments(ProfileConfig, as_positional=True)


def _profile(given: Namespace) -> int:
    from feedbackhook.experiments.profiling import ProfileConfig, profile

    config = config_from(ProfileConfig, given)
    found = profile(config)
    console = plain_console()
    console.print(str(found))
    if config.output is not None:
        for path in found.write(config.output):
            console.print(str(path))
    return 0


PROFILE = Command(
    name="profile",
    help="compare gradients under rules with backprop's, before any training",
    description=(
        "Compare layers' gradients under a grid of rules and concordances with backprop's, before any "
        "training: how deep do they still point backprop's way?"
    ),
    arguments=_arguments,
    run=_profile,
)
