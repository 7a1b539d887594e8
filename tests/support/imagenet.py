"""Small runs of the ImageNet recipe, and plain loops to compare them with."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn

from support.oracle import swapped_saved_tensors
from support.recipes import RECIPES

SCRIPT = RECIPES / "imagenet" / "resnet18.py"
LR = 0.02
WEIGHT_DECAY = 0.1  # so large that a step without it would show
SMALL = "squeezenet1_1"  # where the network does not matter; it has dropout, too


def reset_accelerate():
    """Accelerate keeps one state per process; start a new one."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_tree(root, classes=3, train=8, test=4, noise=True):
    """JPEG files of 64 to 80 pixels: noise, or one color each, which no crop and no flip changes."""
    generator = np.random.default_rng(1)
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                color = generator.integers(0, 256, 3)
                pixels = np.tile(color, (64 + number % 17, 80 - number % 17, 1))
                if noise:
                    pixels = (pixels + generator.integers(0, 128, pixels.shape)) % 256
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"image{number}.JPEG")
    return root


def train(recipe, root, output, **options):
    """Run the recipe, small and in one CPU process."""
    small = {"epochs": 1, "batch_size": 8, "size": 32, "lr": LR, "watch_every": 2, "workers": 0}
    small["weight_decay"] = WEIGHT_DECAY
    try:
        recipe.main(recipe.Settings(**{**small, "root": root, "output": output, "cpu": True, **options}))
    finally:
        reset_accelerate()


def checkpoint_of(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def relative_distance(got, want):
    """Of all weights together. Two that have trained alike in float32 are less than half of its digits apart;
    without weight decay, or with another rule, they are further apart."""
    pairs = [(got[name].double(), want[name].double()) for name in want]
    difference = sum((a - b).square().sum() for a, b in pairs)
    return float((difference / sum(b.square().sum() for _, b in pairs)).sqrt())


def build(recipe, classes, **options):
    """The recipe's network and patch."""
    return recipe.rules.build(recipe.Settings(**options), classes)


def spy_on_batches(recipe, monkeypatch):
    """The mini-batches that training sees, in order."""
    seen, original = [], recipe.train_epoch

    def train_epoch(accelerator, model, optimizer, batches):
        def noted():
            for x, y in batches:
                seen.append((x.clone(), y.clone()))
                yield x, y

        return original(accelerator, model, optimizer, noted())

    monkeypatch.setattr(recipe, "train_epoch", train_epoch)
    return seen


def replay(batches, backward, rates=None, weight_decay=WEIGHT_DECAY):
    """SGD on the same mini-batches from the same start; `backward(network, x, y)` makes the gradients."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None, num_classes=3)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=weight_decay)
    for (x, y), rate in zip(batches, rates or [LR] * len(batches), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        backward(network, x, y)
        optimizer.step()
    return network.state_dict()


def by_the_oracle(network, x, y):
    feedback = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            w = layer.weight.detach()
            feedback[name] = w.sign() * math.sqrt(2 / (w.shape[2] * w.shape[3] * w.shape[0]))
    with swapped_saved_tensors(network, feedback):
        loss = F.cross_entropy(network(x), y)
    loss.backward()


def by_plain_backprop(network, x, y):
    F.cross_entropy(network(x), y).backward()
