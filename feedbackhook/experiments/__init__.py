"""What the recipes and the command line run: data, models and training, on public names alone."""
