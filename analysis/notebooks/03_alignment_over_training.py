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
# # 3. Alignment over training
#
# Where V does not change, W can come to align with it. These are the runs of
# [the previous notebook](02_concordance.ipynb); each 13th step was watched.

# %%
# %matplotlib inline
import pandas as pd
from IPython.display import display

from feedbackhook.report.plots import layer_heat_map, layers_against_epoch
from feedbackhook.report.runs import collect

found = collect("../runs/concordance")
angles = found.rows(of_layers=["weight_angle", "error_angle"])
errors = found.rows(["test_error"])


def table(condition):
    """The rows of one condition's three runs."""
    runs = found.runs.loc[found.runs["condition"] == condition, "run"]
    return pd.concat([rows[rows["run"].isin(runs)] for rows in (angles, errors)])


# %% [markdown]
# Random feedback has nothing to do with W at first: 90° in each layer. In a band of one standard deviation over
# seeds:

# %%
display(layers_against_epoch(table("RndF+BN+BM"), "weight_angle"))
display(layers_against_epoch(table("RndF+BN+BM"), "error_angle"))

# %% [markdown]
# The weight angle is between all of V and W; the error angle is between the two error signals that they send for the
# errors that really arrive, and falls further. The layers near the output align first.
#
# At concordance 0.5 the weight angle is 90° at first as well. Drawn once (above) and redrawn after each update (below):

# %%
display(layers_against_epoch(table("frSF+BN+BM concordance=0.5"), "error_angle"))
display(layers_against_epoch(table("brSF+BN+BM concordance=0.5"), "error_angle"))

# %% [markdown]
# To what is redrawn nothing can align. The same over all layers at once, for the fixed one:

# %%
display(layer_heat_map(table("frSF+BN+BM concordance=0.5"), "error_angle"))

# %% [markdown]
# The mean error angle of the layers in the last epoch beside the error:

# %%
last = angles[(angles["metric"] == "error_angle") & (angles["epoch"] == angles["epoch"].max())]
mean = last.groupby("run")["value"].mean().rename("error angle [°]")
runs = found.runs.set_index("run")[["condition", "best_error"]].join(mean).dropna()
display(runs.groupby("condition", sort=False).mean().round(2).sort_values("error angle [°]"))
