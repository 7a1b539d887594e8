"""The rules beyond those of the paper, as conditions know them."""

from feedbackhook.experiments.conditions import register_feedback
from feedbackhook.rules import make_rule, rule_values

for rule in (
    *("FA", "uSF-SN", "uSF-init", "sign-symmetry"),
    *("angle", "noise", "sparse", "quantized", "low_rank", "toeplitz", "svd"),
    *("KP", "WM", "information", "symmetric-alignment", "activation-alignment", "PFA", "PFA-o", "LDFA"),
):
    register_feedback(rule, *rule_values(make_rule(rule, {})))
for rule in ("DFA", "sDFA", "DRTP", "DKP"):
    register_feedback(rule, "shared", "scale")  # names of modules do not fit into the name of a condition
