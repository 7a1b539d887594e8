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
# If V does not change, W can align with it. These are the runs of [the previous notebook](02_concordance.ipynb); every
# 13th step was recorded.

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
# At first, random feedback is unrelated to W: 90° in each layer. The band is one standard deviation over seeds:

# %%
display(layers_against_epoch(table("RndF+BN+BM"), "weight_angle"))
display(layers_against_epoch(table("RndF+BN+BM"), "error_angle"))

# %% [markdown]
# The weight angle is the angle between V and W. The error angle is the angle between the two error signals that V and W
# send back for the same incoming signal; it falls further. The layers near the output align first.
#
# At concordance 0.5 the weight angle is also 90° at first. The first figure is for V drawn once, the second for V
# redrawn after each update:

# %%
display(layers_against_epoch(table("frSF+BN+BM concordance=0.5"), "error_angle"))
display(layers_against_epoch(table("brSF+BN+BM concordance=0.5"), "error_angle"))

# %% [markdown]
# W cannot align with redrawn feedback. The heat map shows all layers for fixed feedback:

# %%
display(layer_heat_map(table("frSF+BN+BM concordance=0.5"), "error_angle"))

# %% [markdown]
# The mean error angle of the layers in the last epoch, and the test error:

# %%
last = angles[(angles["metric"] == "error_angle") & (angles["epoch"] == angles["epoch"].max())]
mean = last.groupby("run")["value"].mean().rename("error angle [°]")
runs = found.runs.set_index("run")[["condition", "best_error"]].join(mean).dropna()
display(runs.groupby("condition", sort=False).mean().round(2).sort_values("error angle [°]"))
