"""The ways to run `support.problems.Net`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.oracle import call
from support.problems import Net


def piece_by_piece(model: Net, x: Tensor) -> Tensor:
    x = torch.tanh(model.stem(x))
    for block in model.blocks:
        x = block(x)
    return model.classifier(torch.tanh(x).mean((-2, -1)))


def layer_by_layer(model: Net, x: Tensor) -> Tensor:
    x = torch.tanh(model.stem(x))
    for block in model.blocks:
        x = x + block.conv2(torch.tanh(block.conv1(x)))
    return model.classifier(torch.tanh(x).mean((-2, -1)))


def checkpointed_blocks(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def step(model: Net, x: Tensor) -> Tensor:
        x = torch.tanh(model.stem(x))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.forward_head(x)

    return step


def checkpointed_sequence(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def step(model: Net, x: Tensor) -> Tensor:
        x = torch.tanh(model.stem(x))
        x = torch.utils.checkpoint.checkpoint_sequential(model.blocks, 2, x, use_reentrant=reentrant)
        return model.forward_head(x)

    return step


def half_under_autograd_off(model: Net, x: Tensor) -> Tensor:
    """A forward without gradients in between, as for a moving target or an evaluation."""
    with torch.no_grad():
        model(x)
    output = model(x)
    with torch.inference_mode():
        model(x)
    return output


def forward_in_a_thread(model: Net, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(model, x).result()


WAYS_IN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "root called": call,
    "root's forward called as a method": lambda model, x: model.forward(x),
    "features, then head": lambda model, x: model.forward_head(model.forward_features(x)),
    "part by part": piece_by_piece,
    "layer by layer": layer_by_layer,
    "inside another module": lambda model, x: nn.Sequential(nn.Identity(), model)(x),
    "shared by two modules": lambda model, x: nn.ModuleList([nn.Sequential(model), model])[0](x),
    "blocks checkpointed, non-reentrant": checkpointed_blocks(reentrant=False),
    "blocks checkpointed, reentrant": checkpointed_blocks(reentrant=True),
    "checkpointed sequence, non-reentrant": checkpointed_sequence(reentrant=False),
    "checkpointed sequence, reentrant": checkpointed_sequence(reentrant=True),
    "whole checkpointed, non-reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "whole checkpointed, reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "checkpoint in a checkpoint": lambda model, x: checkpoint(
        checkpointed_blocks(reentrant=False), model, x, use_reentrant=False
    ),
    "a forward without grad before and after": half_under_autograd_off,
    "forward in another thread": forward_in_a_thread,
}
