"""Run one command, and turn errors into one line and an exit status."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from feedbackhook.plugins import PluginError

logger = logging.getLogger(__name__)

_USAGE_ERROR = 2
_ANALYSIS_PACKAGES = ("altair", "jinja2", "vl_convert")  # installed by the extra `analysis`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    A diverged run is a result, not an error, so its status is 0.

    Args:
        argv: the command and its arguments; None: those of the process.

    Returns:
        The exit status: 0 for success, 1 if runs of a sweep failed, 2 if the command cannot run as given, 130
        after an interruption, 143 after SIGTERM.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        extra = "analysis" if error.name in _ANALYSIS_PACKAGES else "experiments"
        return _refuse(f"{error}: pip install 'feedbackhook[{extra}]'", error)
    except PluginError as error:
        return _print_error(str(error))


def _run(arguments: list[str]) -> int:
    # imported here, since plain `pip install feedbackhook` does not install the commands' dependencies
    from feedbackhook import ExactGradientError
    from feedbackhook.cli.commands import COMMANDS
    from feedbackhook.cli.parsers import build_parser, config_first, run_command, suggestion
    from feedbackhook.experiments.config import ConfigError
    from feedbackhook.experiments.parser_messages import plain_words
    from feedbackhook.experiments.training.stopping import exit_status
    from feedbackhook.report.errors import ReportError
    from feedbackhook.store.errors import StoreError

    try:
        parser = build_parser(COMMANDS)
        given = parser.instantiate(parser.parse_args(config_first(COMMANDS, arguments or ["--help"])))
        return run_command(COMMANDS, given)
    except ArgumentError as error:
        message = plain_words(error)
        return _refuse(message + suggestion(COMMANDS, arguments, message), error)
    except (ConfigError, StoreError, ReportError, ExactGradientError) as error:
        return _refuse(str(error), error)
    except UnicodeDecodeError as error:
        return _refuse(f"the configuration file is not UTF-8 text: {error}", error)
    except KeyboardInterrupt as stop:
        return exit_status(stop)


def _refuse(message: str, error: Exception) -> int:
    """Print one line on stderr, in the first process of each machine only."""
    from feedbackhook.experiments.training.processes import ReportedByMain, is_local_main

    logger.debug("refused", exc_info=error)
    if is_local_main() and not isinstance(error, ReportedByMain):
        return _print_error(message)
    return _USAGE_ERROR


def _print_error(message: str) -> int:
    print(f"feedbackhook: error: {' '.join(message.split())}", file=sys.stderr)
    return _USAGE_ERROR
