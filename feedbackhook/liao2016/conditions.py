"""The rules and the training procedure of Liao, Leibo and Poggio 2016, as conditions know them."""

from feedbackhook.experiments.conditions import Procedure, register_feedback, register_procedure

for rule in ("uSF", "NuSF"):
    register_feedback(rule)
for rule in ("brSF", "frSF"):  # their concordance is 1 minus the paper's p
    register_feedback(rule, "concordance")
register_feedback("RndF")
# the paper lets this condition, and no other, take larger mini-batches after the third epoch
register_procedure("uSF+BM", Procedure("batch500", {3: 500}))
