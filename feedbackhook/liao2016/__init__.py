"""Liao, Leibo and Poggio (AAAI 2016): networks, datasets, conditions and published errors."""
