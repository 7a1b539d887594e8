"""Datasets: what is known of them, reading, splitting, caching, checking."""
