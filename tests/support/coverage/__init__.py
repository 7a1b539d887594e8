"""One comparison of a whole model under a patch with what oracles say, and the models to compare."""
