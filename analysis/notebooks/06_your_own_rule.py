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
# # 6. Your own rule
#
# A rule defines V. It is a frozen dataclass of options with two methods, registered by name. This rule is not in the
# library: all signs of V match those of W, but only a share of the synapses exists.

# %%
# %matplotlib inline
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display
from sklearn.datasets import load_digits

import feedbackhook

torch.set_num_threads(1)


@feedbackhook.register_rule("few_synapses")
@dataclass(frozen=True)
class Sparse:
    """V = B o sign(W) / sqrt(share fan_in), B one with probability `share`, else zero, drawn once."""

    share: float = 0.1

    def draw(self, weight, rng):
        return {
            "B": (rng.uniform(weight) < self.share).to(weight.dtype),
            "fan_in": torch.tensor(rng.layer.fan_in),
        }

    def feedback(self, weight, parts):
        return parts["B"] * weight.sign() / (self.share * parts["fan_in"]).sqrt()


# %% [markdown]
# The rule is now a mode like any other. Which angle is expected? For Gaussian W, cos = sqrt(2 share / pi): the mean of
# |w| over the existing entries, divided by the norms.

# %%
layer = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400))
torch.nn.init.normal_(layer[1].weight)
for share in (1.0, 0.5, 0.1, 0.01):
    with feedbackhook.patch(layer, "few_synapses", share=share) as patch:
        measured = {(row.layer, row.metric): row.value for row in feedbackhook.measure(patch)}[
            "1", "weight_angle"
        ]
    expected = np.degrees(np.arccos(np.sqrt(2 * share / np.pi)))
    print(f"share {share:4}: {measured:5.1f}° measured, {expected:5.1f}° expected")

# %% [markdown]
# Option names are checked. With the same seed, V is the same on every device and after every resume:

# %%
try:
    feedbackhook.patch(layer, "few_synapses", shar=0.1)
except TypeError as error:
    print(error)

# %% [markdown]
# How few synapses are enough? A small network with Batch Normalization on digits, with three seeds each:

# %%
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16 - 0.3
y = torch.tensor(digits.target)


def error(share, seed, epochs=8):
    torch.manual_seed(seed)
    layers = []
    for width in (64, 128, 128):
        layers += [torch.nn.Linear(width, 128), torch.nn.BatchNorm1d(128), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(128, 10))
    if share is not None:
        feedbackhook.patch(model, "few_synapses", share=share, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return 100 * (model.eval()(x[1400:]).argmax(1) != y[1400:]).double().mean().item()


shares = [None, 1.0, 0.3, 0.1, 0.03, 0.01]
table = pd.DataFrame({share or "backprop": [error(share, seed) for seed in range(3)] for share in shares})
display(table.rename(index="seed {}".format).round(2).T.assign(mean=lambda t: t.mean(axis=1).round(2)))

# %%
from matplotlib.figure import Figure

from feedbackhook.report import theme

with theme.style():
    figure = Figure(figsize=theme.figsize(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    sparse = table.drop(columns="backprop")
    axes.plot(sparse.columns, sparse.mean(), marker="o", label="sparse")
    axes.fill_between(list(sparse.columns), sparse.min(), sparse.max(), alpha=0.2)
    axes.axhline(
        table["backprop"].mean(), color=theme.look("backprop").color, linestyle="--", label="backprop"
    )
    axes.set(xscale="log", xlabel="share of synapses in V", ylabel="test error [%]", title="Sparse feedback")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
display(figure)

# %% [markdown]
# The band spans the best and the worst of three seeds.
#
# ## A rule that learns
#
# A rule with `initial` and `local_gradient` learns its V. `initial` returns the tensors to learn. After each backward of a
# layer, `local_gradient` returns their gradients from what the layer has seen: `local.input`, `local.output`,
# `local.error`, `local.weight`, and its own `local.weight_gradient`. What it reads is declared in `learns_from`. Here V
# descends half of norm(V - scale sign(W))^2, so that it comes to the signs of W.


# %%
@feedbackhook.register_rule("learned_signs")
@dataclass(frozen=True)
class LearnedSigns:
    """V descends half of norm(V - scale sign(W))^2."""

    scale: float = 0.05
    learns_from = "activity"

    def initial(self, weight, rng):
        return {"V": self.scale * rng.normal(weight)}

    def local_gradient(self, local, parts):
        return {"V": parts["V"] - self.scale * local.weight.sign()}

    def feedback(self, weight, parts):
        return parts["V"]


# %% [markdown]
# The learned tensors are parameters of the patch, and an optimizer of one's choice steps them:

# %%
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 128),
    torch.nn.ReLU(),
    torch.nn.Linear(128, 128),
    torch.nn.ReLU(),
    torch.nn.Linear(128, 10),
)
patch = feedbackhook.patch(model, "learned_signs")
optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.05)
for step, batch in enumerate(torch.randperm(1400).repeat(3).split(50)):
    optimizer.zero_grad()
    F.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    if step % 20 == 0:
        rows = {(row.layer, row.metric): row.value for row in feedbackhook.measure(patch)}
        print(
            f"step {step:2}: {rows['2', 'weight_angle']:4.1f}°, signs agree {rows['2', 'sign_agreement']:4.0%}"
        )

# %% [markdown]
# Without `patch.parameters()` in an optimizer, the first step is an error that says so. To add a rule to the library, put it
# into `feedbackhook/rules` with its source, and test its angle or its gradients as in `tests/rules`.
