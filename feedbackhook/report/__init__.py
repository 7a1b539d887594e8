"""Tables, figures and pages about runs and sweeps, from what they stored."""
