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
# # 2. How many signs must match?
#
# Liao, Leibo and Poggio (2016) send error signals back through weights V that have random magnitudes and share a chosen
# fraction of the signs of W, the `concordance`. These runs are from
# `feedbackhook sweep recipes/liao2016/concordance.yaml`: the paper's MNIST network on scikit-learn's digits, with Batch
# Normalization and Batch Manhattan, ten epochs and three seeds. `analysis/runs` contains the metrics of each run.

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
# Fixed feedback (frSF: magnitudes and flips are drawn once) and redrawn feedback (brSF: after each update of the
# weights). The dashed lines are the paper's errors, which are for MNIST:

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
# The mean over seeds with its 95% interval, and the difference of each condition to the first, `BN+BM`. With three
# seeds the intervals are wide, and there are too few runs for a paired test:

# %%
comparison = compare(found)
columns = ["configuration", "runs", "best_mean", "best_low", "best_high"]
display(comparison.means[columns].round(2).set_index("configuration"))
display(comparison.tests.query("error == 'best'")[["first", "second", "difference", "verdict"]].head(3))

# %% [markdown]
# **Result.** With three quarters of the signs or more, fixed feedback is as good as backprop. With half of the signs, V
# carries no information about W. Fixed feedback still learns well there, and redrawn feedback does not, because the
# forward weights can align only with fixed feedback ([the next notebook](03_alignment_over_training.ipynb)). With fewer
# matching signs, the error signals point in the wrong direction. The paper's errors on MNIST have the same order.
