"""Removal leaves no trace: whatever happened before it, the model is as it was."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.oracle import (
    assert_bit_equal,
    assert_matches_oracle,
    by_backprop,
    gradients,
    probe,
    read_gradients,
)
from support.problems import (
    Net,
    draw,
    mlp,
    patched,
    random_feedback,
    redrawn,
)
from support.traces import global_hooks, no_trace_left, traces

import feedbackhook


def run_nothing(model, patch):
    pass


def run_a_step(model, patch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients(model, draw(3, 2, 9, 9))
    optimizer.step()


def run_a_failing_forward(model, patch):
    with pytest.raises(RuntimeError):
        model(draw(3, 5, 9, 9))


def run_while_disabled(model, patch):
    patch.enabled = False
    gradients(model, draw(3, 2, 9, 9))


def run_exact(model, patch):
    with patch.exact():
        gradients(model, draw(3, 2, 9, 9))


def run_without_grad(model, patch):
    with torch.no_grad():
        model(draw(3, 2, 9, 9))


def run_two_forwards_without_backward(model, patch):
    model(draw(3, 2, 9, 9))
    model(draw(3, 2, 9, 9))


BEFORE_REMOVAL = [
    run_nothing,
    run_a_step,
    run_a_failing_forward,
    run_while_disabled,
    run_exact,
    run_without_grad,
    run_two_forwards_without_backward,
]
MODES = {
    "tensor": lambda model: {"mode": "tensor", "feedback": random_feedback(model)},
    "sign": lambda model: {"mode": "sign"},
    "sign, redrawn": lambda model: {"mode": "sign", "redraw": "update"},
    "brSF": lambda model: {"mode": "brSF"},
}


@pytest.mark.parametrize("run", BEFORE_REMOVAL, ids=lambda run: run.__name__)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_removal_leaves_no_trace(options, run):
    model, x = redrawn(Net()), draw(3, 2, 9, 9)
    unpatched, exact = traces(model), by_backprop(model, x)
    with no_trace_left(model):
        patch = feedbackhook.patch(model, **options(model))
        assert traces(model) != unpatched, "a patch that leaves no trace cannot be seen to be removed"
        run(model, patch)
        patch.remove()
    with no_trace_left(model):
        assert_bit_equal(gradients(model, x), exact)


def test_removal_twice_is_fine():
    model = mlp()
    with no_trace_left(model):
        _, patch = patched(model)
        patch.remove()
        patch.remove()
    assert_bit_equal(gradients(model, draw(3, 4)), by_backprop(mlp(), draw(3, 4)))


def test_removal_twice_spares_the_patch_that_came_between():
    plain, model, x = mlp(), mlp(), draw(3, 4)
    _, first = patched(model, "sign")
    first.remove()
    patched(model)
    first.remove()
    assert_matches_oracle(gradients(model, x), plain, random_feedback(plain), x)


def test_the_context_manager_removes_also_after_an_error():
    model = redrawn(Net())
    with no_trace_left(model), pytest.raises(KeyboardInterrupt), feedbackhook.patch(model, "sign"):
        raise KeyboardInterrupt


def test_unpatch_and_get_patch_do_without_the_handle():
    model = redrawn(Net())
    assert feedbackhook.get_patch(model) is None
    with no_trace_left(model):
        patch = feedbackhook.patch(model, "sign")
        assert feedbackhook.get_patch(model) is patch
        feedbackhook.unpatch(model)
    assert feedbackhook.get_patch(model) is None


def test_a_graph_built_before_removal_keeps_its_feedback():
    """Removal must not turn a graph that is already built into something between feedback and backprop."""
    plain, x = mlp(), draw(3, 4)
    model, patch = patched(mlp())
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    patch.remove()
    probe(output).backward()
    assert_matches_oracle(read_gradients(model, leaf, output), plain, random_feedback(plain), x)


def test_a_model_can_be_patched_again_after_removal():
    plain, x = mlp(), draw(3, 4)
    model, patch = patched(mlp(), "sign")
    patch.remove()
    feedback = random_feedback(plain, seed=9)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x)


@pytest.mark.parametrize("removed", [False, True], ids=["dropped with the model", "removed first"])
def test_model_and_patch_are_freed(removed):
    def build():
        model, patch = patched(mlp())
        gradients(model, draw(3, 4))
        if removed:
            patch.remove()
        return weakref.ref(model), weakref.ref(patch), weakref.ref(model[0].weight)

    gc.collect()
    feedbackhook.patch(mlp()).remove()  # takes off what the collector must not: here that of other tests
    hooks = global_hooks()
    references = build()
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    if not removed:
        feedbackhook.patch(mlp()).remove()
    assert global_hooks() == hooks, "a hook of torch's own outlives the patch that set it"
