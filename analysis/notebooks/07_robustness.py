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
# # 7. Adversarial robustness, honestly
#
# An attack that follows a gradient is as strong as that gradient. On a patched network, `loss.backward()` brings V's
# gradient to the input, not the loss's own. An attack along it fails more often, and the network seems robust. This is
# gradient masking (Athalye, Carlini and Wagner 2018), not robustness. `patch.exact()` is the switch: within it, the
# backward of a patched graph is plain backprop.

# %%
# %matplotlib inline
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import feedbackhook
from feedbackhook.report import theme

torch.set_num_threads(1)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
y = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)


def trained(mode, epochs=15, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )
    patch = feedbackhook.patch(model, mode, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[train][batch]), y[train][batch]).backward()
            optimizer.step()
    return model, patch


# %% [markdown]
# Two attacks within a distance of epsilon in every pixel (pixels are 0 to 1). FGSM takes one step along the signs of the
# input's gradient (Goodfellow, Shlens and Szegedy 2015). PGD takes ten smaller ones, and after each returns into the
# allowed box (Madry et al. 2018). `exact` says which gradient they follow.

# %%
from contextlib import nullcontext


def input_gradient(model, patch, images, exact):
    images = images.clone().requires_grad_()
    loss = F.cross_entropy(model(images), y[test])
    with patch.exact() if exact else nullcontext():
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient


def fgsm(model, patch, epsilon, exact):
    return (x[test] + epsilon * input_gradient(model, patch, x[test], exact).sign()).clamp(0, 1)


def pgd(model, patch, epsilon, exact, steps=10):
    images = x[test]
    for _ in range(steps):
        images = images + epsilon / 4 * input_gradient(model, patch, images, exact).sign()
        images = images.clamp(x[test] - epsilon, x[test] + epsilon).clamp(0, 1)
    return images


@torch.no_grad()
def error(model, images):
    return 100 * (model(images).argmax(1) != y[test]).double().mean().item()


networks = {
    "backprop": trained("symmetric"),
    "sign, concordance 0.75": trained("sign", concordance=0.75),
    "random": trained("random"),
}
rows = []
for name, (model, patch) in networks.items():
    for attack in (fgsm, pgd):
        for gradient, exact in (("V's", False), ("exact", True)):
            for epsilon in (0.0, 0.05, 0.1, 0.15, 0.2):
                rows.append(
                    {
                        "trained by": name,
                        "attack": attack.__name__.upper(),
                        "gradient": gradient,
                        "epsilon": epsilon,
                        "error": error(model, attack(model, patch, epsilon, exact)),
                    }
                )
table = pd.DataFrame(rows)
display(
    table[table["epsilon"] == 0.1]
    .pivot_table("error", "trained by", ["attack", "gradient"], sort=False)
    .round(1)
)

# %% [markdown]
# Test error in percent at epsilon 0.1. For the network trained by backprop (its V is W) both gradients are the same. For
# the others, the attack along V's gradient is weaker, and only the exact one says how robust they are.

# %%
with theme.style():
    figure = Figure(figsize=theme.figsize(9.0, 4.6), layout="constrained")
    for axes, attack in zip(figure.subplots(1, 2, sharey=True), ("FGSM", "PGD"), strict=True):
        for name, color in zip(networks, theme.sequence(3), strict=True):
            for gradient, style in (("V's", "--"), ("exact", "-")):
                part = table.query("`trained by` == @name and attack == @attack and gradient == @gradient")
                axes.plot(
                    part["epsilon"],
                    part["error"],
                    color=color,
                    linestyle=style,
                    label=f"{name}, {gradient} gradient",
                )
        axes.set(
            xlabel="epsilon [share of the pixels' range]", title=attack, xticks=[0, 0.05, 0.1, 0.15, 0.2]
        )
    figure.axes[0].set_ylabel("test error [%]")
    figure.axes[0].set_ylim(0, 102)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="x-small")
display(figure)

# %% [markdown]
# The gap between the dashed and the solid line of a color is what the attack along V's gradient flatters. How far apart
# are the two gradients? The angle at the input, in degrees, mean over the test images:

# %%
for name, (model, patch) in networks.items():
    delivered, exact = (input_gradient(model, patch, x[test], exact) for exact in (False, True))
    angles = torch.rad2deg(torch.acos(F.cosine_similarity(delivered, exact, eps=0).clamp(-1, 1)))
    print(f"{name:24} {angles.nanmean().item():5.1f}°")

# %% [markdown]
# So report robustness under `patch.exact()`, or after `patch.remove()`. One small network and one seed say nothing about
# whether feedback weights make networks more robust: compare the solid lines over several seeds, at equal clean error.
