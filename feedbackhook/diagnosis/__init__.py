"""What a rule does to a network's gradients: before training (`profile`), and whether a figure can be trusted
(`diagnose`)."""
