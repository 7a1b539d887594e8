"""What the recipes and the command line run: data, models, training and sweeps, on public names alone."""

# imported for the datasets, networks and conditions that they register
import feedbackhook.experiments.models.cifar
import feedbackhook.experiments.other_rules
import feedbackhook.liao2016  # noqa: F401
from feedbackhook import plugins

plugins.load()
