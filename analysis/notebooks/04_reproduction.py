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
# # 4. Our tables beside the paper's
#
# `feedbackhook sweep recipes/liao2016/mnist.yaml` runs sixteen of the paper's conditions on MNIST by a short protocol:
# eight epochs in the place of 65, three learning rates in the place of five, one seed, and a tenth of the training set
# held out. `feedbackhook table` is what this notebook shows piece by piece.

# %%
# %matplotlib inline
from IPython.display import Markdown, display

from feedbackhook.liao2016.published import error_rates
from feedbackhook.report import theme
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.tables import as_markdown, draw

table = sweep_table("../runs/mnist")
display(draw(table))

# %% [markdown]
# Blue is three points of error or more better than SGD, orange three or more worse, as the paper colours its tables.

# %%
display(Markdown(as_markdown(table)))

# %% [markdown]
# **Best and chosen.** The paper reports the smallest test error over all epochs and rates. "Chosen" does not look at the
# test set for that, but at a held-out tenth of the training set. How much does the choice on the test set flatter?

# %%
cells = table.cells
flattery = (cells["chosen_error"] - cells["best_error"]).describe()[["mean", "50%", "max"]]
print(flattery.round(2).rename({"50%": "median"}).to_string())

# %% [markdown]
# Ours against the paper's, on logarithmic axes; on the diagonal they are equal.

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
# The paper has 39 conditions on 15 datasets. The means of those that it ran on all fifteen, in percent:

# %%
means = error_rates().dropna().mean(axis=1).sort_values().round(2)
print(means.to_string())
