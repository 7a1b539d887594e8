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
# # 4. Our tables and the paper's
#
# `feedbackhook sweep recipes/liao2016/evidence/mnist.yaml` runs twelve of the paper's conditions on MNIST with a short
# protocol: ten epochs instead of 65, five learning rates of which the worse ones end early, one seed, and a tenth of the
# training set for validation. This notebook shows the output of `feedbackhook table` step by step.

# %%
# %matplotlib inline
from IPython.display import Markdown, display

from feedbackhook.liao2016.published import error_rates
from feedbackhook.report import theme
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.tables import as_markdown, draw

table = sweep_table("../runs/evidence/mnist")
display(draw(table))

# %% [markdown]
# As in the paper's tables, blue means at least three points of error better than SGD, orange at least three points worse.

# %%
display(Markdown(as_markdown(table)))

# %% [markdown]
# **Best and chosen.** The paper reports the smallest test error over all epochs and learning rates. "Chosen" uses the
# validation tenth of the training set for this choice, not the test set. How optimistic is the choice by the test set?

# %%
cells = table.cells
flattery = (cells["chosen_error"] - cells["best_error"]).describe()[["mean", "50%", "max"]]
print(flattery.round(2).rename({"50%": "median"}).to_string())

# %% [markdown]
# Our errors against the paper's, on logarithmic axes. On the diagonal they are equal.

# %%
from matplotlib.figure import Figure

known = cells.dropna(subset=["paper_error"]).assign(
    rule=cells["condition"].str.split(r"[+ ]", regex=True).str[0]
)
with theme.style():
    figure = Figure(figsize=theme.figsize(5.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for rule, part in known.groupby("rule", sort=False):
        look = theme.look("backprop" if rule in ("SGD", "BN") else rule)
        axes.scatter(part["paper_error"], part["best_error"], c=look.color, marker=look.marker, label=rule)
    axes.axline((1, 1), slope=1, linestyle=":", color=theme.ink())
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="Liao et al. 2016: test error [%]",
        ylabel="ours: best test error [%]",
    )
    axes.legend(title="feedback", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
display(figure)

# %% [markdown]
# The paper has 39 conditions on 15 datasets. The mean errors of the conditions that it ran on all fifteen, in percent:

# %%
means = error_rates().dropna().mean(axis=1).sort_values().round(2)
print(means.to_string())
