"""Figures and tables, from a run folder's tidy table alone."""
