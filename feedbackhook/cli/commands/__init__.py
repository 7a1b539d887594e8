"""One module for each command, or for a few that belong together."""

from feedbackhook.cli.commands.compare import COMPARE
from feedbackhook.cli.commands.data import DATA
from feedbackhook.cli.commands.inspect import INSPECT
from feedbackhook.cli.commands.profile import PROFILE
from feedbackhook.cli.commands.report import PLOT, REPORT, TABLE
from feedbackhook.cli.commands.sweep import SWEEP
from feedbackhook.cli.commands.train import TRAIN

COMMANDS = (TRAIN, SWEEP, TABLE, REPORT, COMPARE, INSPECT, PROFILE, PLOT, DATA)
"""The commands, in the order in which `feedbackhook --help` lists them."""
