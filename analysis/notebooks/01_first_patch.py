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
# # 1. A first patch
#
# Backprop sends errors back through the forward weights W. `feedbackhook.patch` sends them through other weights
# V instead, in any network as it is. Here: a small network on scikit-learn's digits, half a minute in all.

# %%
# %matplotlib inline
import torch
import torch.nn.functional as F
from IPython.display import display
from sklearn.datasets import load_digits

import feedbackhook
from feedbackhook.report.plots import layers_against_epoch

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3
y = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)


def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )


# %% [markdown]
# `patch` works in place. Eight of ten feedback signs agree with W's, the magnitudes are random:

# %%
model = network()
patch = feedbackhook.patch(model, mode="sign", concordance=0.8)
F.cross_entropy(model(x[:64]), y[:64]).backward()
print(patch)

# %% [markdown]
# The first layer has nothing before it to send an error to: it counts as patched, and nothing is rerouted there. How
# far are V and the delivered gradients from W and from backprop's?

# %%
import pandas as pd

rows = pd.DataFrame(feedbackhook.measure(patch, F.cross_entropy(model(x[:64]), y[:64])))
display(rows.pivot_table("value", ["depth", "layer"], "metric").round(2))

# %% [markdown]
# 90° would be unrelated. The further an error has travelled from the output, the further is the gradient that it
# makes from backprop's (`gradient_angle`), since the angles of all layers above add up.
#
# Does it learn? The loop stays as it was; a recorder watches each 20th step.

# %%
import tempfile


def trained(model, patch=None, folder=None, epochs=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    recorder = feedbackhook.Recorder(folder) if folder else None
    if recorder:
        patch.watch(20, recorder)
    for epoch in range(epochs):
        if recorder:
            recorder.epoch = epoch + 1
        for batch in torch.randperm(1400, generator=order).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[train][batch]), y[train][batch]).backward()
            optimizer.step()
    if recorder:
        recorder.close()
    with torch.no_grad():
        return 100 * (model(x[test]).argmax(1) != y[test]).double().mean().item()


torch.manual_seed(1)
print(f"backprop:        {trained(network()):5.2f}% test error")
for concordance in (1.0, 0.8, 0.5):
    torch.manual_seed(1)
    model = network()
    patch = feedbackhook.patch(model, "sign", concordance=concordance)
    folder = tempfile.mkdtemp() if concordance == 0.8 else None
    print(f"concordance {concordance}: {trained(model, patch, folder):5.2f}% test error")
    if folder:
        table = feedbackhook.read(folder)

# %% [markdown]
# What the recorder saw at concordance 0.8: how the angle between V's error signal and W's developed, layer by layer.

# %%
display(layers_against_epoch(table, "error_angle"))

# %% [markdown]
# `patch.remove()` puts the model back as it was:

# %%
patch.remove()
print("hooks left:", sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
