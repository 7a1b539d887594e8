# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. How many signs must agree?
#
# The question of Liao, Leibo and Poggio (2016): send the errors through weights V of which a chosen share
# (`concordance`) has W's signs, with random magnitudes. The runs here are
# `feedbackhook sweep recipes/liao2016/concordance.yaml`: the paper's MNIST network on scikit-learn's digits with Batch
# Normalization and Batch Manhattan, ten epochs, three seeds. Of each run its table is kept in `analysis/runs`.

# %%
# %matplotlib inline
import pandas as pd
from IPython.display import display

from feedbackhook.liao2016.published import error_rates
from feedbackhook.report.compare import compare
from feedbackhook.report.plots import error_against_concordance
from feedbackhook.report.runs import collect

found = collect("../runs/concordance")
print(len(found.runs), "runs have ended; left out:", found.skipped or "none")

# %% [markdown]
# Fixed feedback (frSF: magnitudes and flips are drawn once) beside redrawn feedback (brSF: after each update of the
# weights), and the paper's own errors, which are for MNIST, dashed:

# %%
rule = found.runs["condition"].str.split("+").str[0]
runs = found.runs.assign(rule=rule.replace("BN", "backprop"), error=found.runs["best_error"])
paper = pd.DataFrame(
    [
        (name, concordance, error_rates().loc[f"{name}+BN+BM concordance={concordance:g}", "MNIST"])
        for name in ("frSF", "brSF")
        for concordance in (0, 0.25, 0.5, 0.75, 1)
    ],
    columns=["rule", "concordance", "error"],
)
display(error_against_concordance(runs[["rule", "concordance", "error"]], paper, "Liao et al. 2016"))

# %% [markdown]
# The mean over seeds with its 95% interval, and each condition less the first, `BN+BM`. With three seeds the intervals
# are wide, and there are too few runs for a paired test:

# %%
comparison = compare(found)
columns = ["configuration", "runs", "best_mean", "best_low", "best_high"]
display(comparison.means[columns].round(2).set_index("configuration"))
display(comparison.tests.query("error == 'best'")[["first", "second", "difference", "verdict"]].head(3))

# %% [markdown]
# **What to see.** With three quarters of the signs or more, fixed feedback is as good as backprop. At half of the
# signs, which says nothing about W, fixed feedback still learns well and redrawn feedback does not: to what is fixed the
# forward weights can align ([the next notebook](03_alignment_over_training.ipynb)). With fewer the error signals
# point the wrong way. The paper's errors on MNIST have the same order.
