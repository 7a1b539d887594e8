"""Patching, training and removing leaves nothing behind, however often."""

import gc
import weakref

import torch
from support.problems import draw, mlp
from torch import nn
from torch.optim import optimizer as optimizers

import feedbackhook


def cycle(model):
    with feedbackhook.patch(model, "brSF", concordance=0.8) as patch:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        patch.on_error_signal("2", lambda grad_input, grad_output: None)
        for _ in range(2):
            optimizer.zero_grad()
            model(draw(3, 4)).sum().backward()
            optimizer.step()
        feedbackhook.measure(patch)


def census():
    gc.collect()
    objects = gc.get_objects()
    return {
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in objects),
        "numbers": sum(thing.numel() for thing in objects if issubclass(type(thing), torch.Tensor)),
        "patches": sum(issubclass(type(thing), feedbackhook.Patch) for thing in objects),
        "modules": sum(issubclass(type(thing), nn.Module) for thing in objects),
        "step hooks": len(optimizers._global_optimizer_post_hooks),
    }


def assert_no_more_than(before):
    """What earlier tests left may be collected meanwhile, so that there may be less."""
    now = census()
    assert {name: now[name] for name in now if now[name] > before[name]} == {}


def test_fifty_patches_on_one_model_leave_no_more_than_one():
    model = mlp()
    cycle(model)
    before = census()
    for _ in range(50):
        cycle(model)
    assert_no_more_than(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_patched_model_that_is_dropped_is_freed():
    before = census()
    for _ in range(5):
        model = mlp()
        feedbackhook.patch(model, "brSF")
        model(draw(3, 4)).sum().backward()
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None
    feedbackhook.patch(mlp()).remove()  # takes off what the last of them has left with torch
    assert_no_more_than(before)


def test_a_graph_keeps_no_feedback_beyond_its_backward():
    model = mlp()
    with feedbackhook.patch(model, "sign"):
        loss = model(draw(3, 4)).sum()
        before = census()["numbers"]
        loss.backward()
        gradients = sum(p.numel() for p in model.parameters())
        assert census()["numbers"] <= before + gradients


def test_a_model_that_is_collected_while_an_optimizer_walks_its_hooks_does_no_harm():
    """A patch that was never removed leaves hooks with torch that do nothing, until the next is removed."""

    def trained():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        feedbackhook.patch(model, "random")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    before = len(optimizers._global_optimizer_post_hooks)
    gc.disable()
    try:
        trained()  # a cycle, and so left to the collector
        handle = optimizers.register_optimizer_step_post_hook(lambda *_: gc.collect() and None)
        try:
            trained()
            trained()
        finally:
            handle.remove()
    finally:
        gc.enable()
    gc.collect()
    feedbackhook.patch(mlp()).remove()
    assert len(optimizers._global_optimizer_post_hooks) == before
