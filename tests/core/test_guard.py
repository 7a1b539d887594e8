"""The guard: an error signal that goes through a weight itself raises by the layer's name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.oracle import (
    assert_bit_equal,
    assert_matches_oracle,
    assert_matches_oracle_or_names_a_layer,
    by_backprop,
    gradients,
    probe,
    read_gradients,
)
from support.problems import (
    MLP_UPSTREAM,
    draw,
    mlp,
    outside_every_forward,
    patched_copy,
    random_feedback,
    redrawn,
)
from torch import Tensor, nn

import feedbackhook


@pytest.mark.parametrize("warmed_up", [False, True], ids=["never called", "after a proper step"])
def test_a_weight_used_outside_every_forward_raises_by_name(warmed_up):
    model, x = mlp(), draw(3, 4)
    feedbackhook.patch(model, "sign")
    if warmed_up:
        gradients(model, x)
    loss = probe(outside_every_forward(model, x))
    with pytest.raises(RuntimeError, match=r"'[02]'"):
        loss.backward()


def test_the_guards_error_is_one_of_ours_and_the_next_step_is_right():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    with pytest.raises(RuntimeError) as caught:
        probe(outside_every_forward(model, x)).backward()
    assert type(caught.value).__module__.startswith("feedbackhook")
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=MLP_UPSTREAM)


@pytest.mark.parametrize("ending", ["removed", "disabled", "exact"])
def test_the_guard_rests_when_the_patch_does(ending):
    plain, x = mlp(), draw(3, 4)
    model, _ = patched_copy(plain)
    patch = feedbackhook.get_patch(model)
    if ending == "exact":
        with patch.exact():
            got = gradients(model, x, outside_every_forward)
    else:
        patch.remove() if ending == "removed" else setattr(patch, "enabled", False)
        got = gradients(model, x, outside_every_forward)
    assert_bit_equal(got, by_backprop(plain, x, outside_every_forward))


USES_THAT_NO_BRACKET_UNDERSTANDS = {
    "matrix product": lambda x, fc: x @ fc.weight.T,
    "einsum": lambda x, fc: torch.einsum("ni,oi->no", x, fc.weight),
    "product from the left": lambda x, fc: (fc.weight @ x.T).T,
    "addmm from the left": lambda x, fc: torch.addmm(fc.bias, fc.weight, x.T[:4, :1].expand(4, 4)),
    "elementwise product": lambda x, fc: (x.unsqueeze(1) * fc.weight).sum(-1),
    "bilinear form": lambda x, fc: F.bilinear(x, x, fc.weight.unsqueeze(0).expand(3, -1, -1)[:, :, :4]),
}


@pytest.mark.parametrize(
    "use", USES_THAT_NO_BRACKET_UNDERSTANDS.values(), ids=USES_THAT_NO_BRACKET_UNDERSTANDS
)
def test_a_weight_in_another_function_raises_by_name(use):
    """Inside the forward too: the call cannot be rerouted, so its error signal would be exact."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return use(torch.tanh(self.fc1(x)), self.fc2)

    model = redrawn(Odd())
    feedbackhook.patch(model, "sign")
    with pytest.raises(feedbackhook.ExactGradientError, match="'fc2'"):
        probe(model(draw(3, 4))).backward()


def test_fused_attention_is_the_oracle_or_raises_by_name():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = torch.tanh(self.fc(x))
            return self.attention(x, x, x, need_weights=False)[0]

    plain, x = redrawn(Attention()), draw(2, 3, 4)
    model = redrawn(Attention())
    feedback = random_feedback(plain, ["fc", "attention.out_proj"])
    feedbackhook.patch(model, "tensor", include=list(feedback), feedback=feedback)
    assert_matches_oracle_or_names_a_layer(lambda: gradients(model, x), plain, feedback, x)


def test_parameters_replaced_after_patching():
    """`load_state_dict(assign=True)` and plain assignment bring new parameters: they are looked up again."""
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    gradients(model, x)
    others = redrawn(copy.deepcopy(plain), seed=3)
    model.load_state_dict(copy.deepcopy(others.state_dict()), assign=True)
    assert_matches_oracle(gradients(model, x), others, feedback, x, unlike=MLP_UPSTREAM)
    model[2].weight = nn.Parameter(plain[2].weight.detach().clone())
    others[2].weight = plain[2].weight
    assert_matches_oracle(gradients(model, x), others, feedback, x, unlike=MLP_UPSTREAM)


def test_a_penalty_on_the_weights_adds_its_own_gradient():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (probe(output) + sum(p.square().sum() for p in model.parameters())).backward()
    for parameter in model.parameters():
        parameter.grad -= 2 * parameter.detach()
    assert_matches_oracle(read_gradients(model, leaf, output), plain, feedback, x, unlike=MLP_UPSTREAM)


def inside_and_outside(model: nn.Sequential, x: Tensor) -> Tensor:
    return model(x)[:, :3] + outside_every_forward(model, x)[:, :3]


@pytest.mark.parametrize("step", [inside_and_outside], ids=lambda step: step.__name__)
def test_a_use_outside_beside_one_that_was_seen(step):
    model, x = mlp(), draw(3, 4)
    feedbackhook.patch(model, "sign")
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match=r"'[02]'"):
            gradients(model, x, step)


def into_a_frozen_weight(model: nn.Sequential, x: Tensor) -> Tensor:
    model[2].weight.requires_grad_(False)
    return F.linear(torch.tanh(model[0](x)), model[2].weight)


def test_a_frozen_weight_outside_every_module_is_found_on_request_alone():
    """No hook of ours runs before its product does; the README says so, and what to do."""
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    output = into_a_frozen_weight(model, x)
    (finding,) = patch.audit(output)
    assert (finding.name, finding.patched) == ("2", True)
    probe(output).backward()
