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
# Backprop sends error signals back through the forward weights W. `feedbackhook.patch` sends them through feedback
# weights V instead, in any network, without changing its code. This notebook trains a small network on scikit-learn's
# digits and takes half a minute.

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
# `patch` modifies the model in place. With `concordance=0.8`, eight of ten feedback signs match those of W. The
# magnitudes are random:

# %%
model = network()
patch = feedbackhook.patch(model, mode="sign", concordance=0.8)
F.cross_entropy(model(x[:64]), y[:64]).backward()
print(patch)

# %% [markdown]
# The input of the first layer requires no gradient: the layer is patched, but no error signal is rerouted there. How
# far is V from W, and how far are the gradients from backprop's?

# %%
import pandas as pd

rows = pd.DataFrame(feedbackhook.measure(patch, F.cross_entropy(model(x[:64]), y[:64])))
display(rows.pivot_table("value", ["depth", "layer"], "metric").round(2))

# %% [markdown]
# 90° means unrelated. The further a layer is from the output, the further its gradient is from backprop's
# (`gradient_angle`), because the angles of all layers above accumulate.
#
# Does the network learn? The training loop stays the same; a recorder records every 20th step.

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
# The recording at concordance 0.8 shows the angle between the error signals computed with V and with W, by layer:

# %%
display(layers_against_epoch(table, "error_angle"))

# %% [markdown]
# `patch.remove()` restores the model:

# %%
patch.remove()
print("hooks left:", sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
