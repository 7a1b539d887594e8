"""Figures and tables, from a run folder's tidy table alone."""

import feedbackhook.liao2016.published  # noqa: F401 - registers the paper's error rates
