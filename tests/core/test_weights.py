"""Every way that a weight is used: attention, derived and tied weights, views, other dtypes and layouts."""

import copy

import peft
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from support.oracle import (
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_backward_hooks,
    by_saved_tensors,
    gradients,
    probe,
)
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import feedbackhook


def random_feedback(model):
    """A random V for each layer that `patch` would patch, and those layers' names."""
    with feedbackhook.patch(model, "symmetric") as patch:
        return {row.name: torch.randn(row.shape, dtype=torch.float64) for row in patch.layers}


def patched(model, feedback):
    model = copy.deepcopy(model)
    return model, feedbackhook.patch(model, "tensor", feedback=feedback)


# --- attention -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Projects one input to queries, keys and values for `nn.MultiheadAttention`."""

    def __init__(self, which, **options):
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.which, self.kdim, self.vdim = which, self.attention.kdim, self.attention.vdim

    def forward(self, x):
        x = self.before(x)
        keys, values = x.flip(1)[..., : self.kdim], x.roll(1, 1)[..., : self.vdim]
        arguments = {"self": (x, x, x), "cross": (x, keys, values), "memory": (x, keys, keys)}[self.which]
        return self.attention(*arguments, need_weights=self.which == "cross")[0]


ATTENTION = {
    "self": lambda: Attention("self"),
    "cross": lambda: Attention("cross"),
    "one memory": lambda: Attention("memory"),
    "other sizes": lambda: Attention("cross", kdim=6, vdim=5),
    "no bias": lambda: Attention("self", bias=False),
    "bias for keys and values": lambda: Attention("self", add_bias_kv=True, add_zero_attn=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True),
    "encoder layer, in evaluation": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True), 2, enable_nested_tensor=False
    ),
}


@pytest.mark.parametrize("make", ATTENTION.values(), ids=ATTENTION.keys())
def test_attention_sends_its_errors_through_every_projection(make):
    plain, x = make().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    feedback = random_feedback(plain)
    model, patch = patched(plain, feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input"])
    assert all(row.rerouted >= 1 for row in patch.layers)
    assert any(row.kind == "MultiheadAttention" for row in patch.layers)


def test_decoder_layers_attend_to_a_memory():
    plain = nn.TransformerDecoderLayer(8, 2, 16, dropout=0, batch_first=True).double()
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    feedback = random_feedback(plain)
    model, _ = patched(plain, feedback)

    def step(model, x):
        return model(x, memory)

    assert_matches_oracle(gradients(model, x, step), plain, feedback, x, step=step, unlike=["input"])


def test_attention_gradients_pass_the_compiler():
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    feedback = random_feedback(plain)
    model, _ = patched(plain, feedback)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(_, x):
        return compiled(x)

    got = gradients(model, x, step)
    torch.compiler.reset()
    for (name, ours), oracle in zip(
        got.named().items(), gradients(*patched(plain, feedback)[:1], x).named().values(), strict=True
    ):
        torch.testing.assert_close(ours, oracle, msg=name)
    assert not torch.allclose(got.input, by_backprop(plain, x).input)


# --- derived weights ---------------------------------------------------------------------------------------


def between(layer):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), layer, nn.Tanh(), nn.Conv2d(6, 3, 1))


class LowRank(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight):
        return weight + (self.a @ self.b).reshape(weight.shape)


def with_low_rank(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", LowRank(6, 36))
    return layer


DERIVED = {
    "weight standardization": lambda: timm.layers.StdConv2d(4, 6, 3),
    "scaled weight standardization": lambda: timm.layers.ScaledStdConv2d(4, 6, 3),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    "weight norm by hook": lambda: weight_norm(nn.Conv2d(4, 6, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    "spectral norm by hook": lambda: spectral_norm(nn.Conv2d(4, 6, 3)),
    "low rank": lambda: with_low_rank(nn.Conv2d(4, 6, 3)),
}


# Torch cannot copy a module with a weight norm by hook, as the oracle would have to.
COPIED = {name: make for name, make in DERIVED.items() if name != "weight norm by hook"}


@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED.keys())
def test_feedback_takes_the_place_of_the_derived_weight(make):
    plain, x = between(make()).double(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    feedback = random_feedback(plain)
    assert list(feedback) == ["0", "2", "4"]
    model, patch = patched(plain, feedback)
    got, oracle = gradients(model, x), by_backward_hooks(plain, feedback, x)
    backprop = by_backprop(plain, x)
    assert torch.equal(got.output, backprop.output)
    for name, expected in oracle.named().items():
        torch.testing.assert_close(got.named()[name], expected, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.allclose(got.parameters["0.weight"], backprop.parameters["0.weight"])
    assert [row.rerouted for row in patch.layers] == [1, 1, 1]


@pytest.mark.parametrize("make", DERIVED.values(), ids=DERIVED.keys())
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_sign_is_that_of_the_derived_weight(make):
    model = between(make())
    seen = []
    with feedbackhook.patch(model, "uSF") as patch:
        patch.on_error_signal("2", lambda grad_input, grad_output: seen.append((grad_input, grad_output)))
        model(torch.randn(2, 2, 8, 8)).square().sum().backward()
        v = patch.feedback("2")
    ((grad_input, grad_output),) = seen
    padding = model[2].padding
    torch.testing.assert_close(grad_input, F.conv_transpose2d(grad_output, v, padding=padding))
    assert set(v.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    "make", [parametrizations.spectral_norm, spectral_norm], ids=["spectral norm", "spectral norm by hook"]
)
def test_looking_at_a_derived_weight_does_not_move_its_buffers(make):
    model = nn.Sequential(nn.Linear(4, 50), make(nn.Linear(50, 40)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    with feedbackhook.patch(model, "sign") as patch:
        patch.feedback("1")
        feedbackhook.measure(patch)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_a_derived_weight_outside_every_forward_is_an_error():
    model = nn.Sequential(nn.Linear(4, 5), parametrizations.weight_norm(nn.Linear(5, 3)))
    feedbackhook.patch(model)
    with pytest.raises(feedbackhook.ExactGradientError, match="the weight of '1'"):
        F.linear(model[0](torch.randn(2, 4)), model[1].weight).sum().backward()


class SometimesStandardized(nn.Linear):
    standardizes = True

    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True) if self.standardizes else self.weight
        return F.linear(x, weight, self.bias)


def test_feedback_and_weight_are_those_of_the_last_forward():
    model = nn.Sequential(nn.Linear(4, 5), SometimesStandardized(5, 3)).double()
    layer, x = model[1], torch.randn(3, 4, dtype=torch.float64)
    patch = feedbackhook.patch(model, "uSF")
    seen = []
    patch.on_error_signal("1", lambda grad_input, grad_output: seen.append((grad_input, grad_output)))
    for layer.standardizes in (True, False, True):
        model(x).square().sum().backward()
        plain = layer.weight.detach()
        used = plain - plain.mean(1, keepdim=True) if layer.standardizes else plain
        assert torch.equal(patch.weight("1"), used)
        assert torch.equal(patch.feedback("1"), used.sign())
        grad_input, grad_output = seen.pop()
        torch.testing.assert_close(grad_input, grad_output @ used.sign())


class LocalReparameterization(nn.Linear):
    """A Bayesian layer: W is the mean, and the variances are another matrix of its shape."""

    def __init__(self, columns, rows):
        super().__init__(columns, rows)
        self.log_variance = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x):
        noise = torch.linspace(-1, 1, self.out_features, dtype=x.dtype)
        return F.linear(x, self.weight) + F.linear(x.square(), self.log_variance.exp()).sqrt() * noise


class Gated(nn.Linear):
    """A child of the same shape, whose weight is derived too."""

    def __init__(self, columns, rows):
        super().__init__(columns, rows)
        self.gate = parametrizations.weight_norm(nn.Linear(columns, rows))

    def forward(self, x):
        return F.linear(x, self.weight) + self.gate(x)


@pytest.mark.filterwarnings("ignore:these weights belong to no layer")
@pytest.mark.parametrize("kind", [LocalReparameterization, Gated])
def test_another_derived_matrix_of_the_same_shape_is_not_the_layers_weight(kind):
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), kind(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, feedback = torch.randn(3, 4, dtype=torch.float64), {"2": torch.randn(5, 6, dtype=torch.float64)}
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "tensor", include=["2"], feedback=feedback)
    got = gradients(model, x)
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["input", "0.weight"])
    assert [(row.calls, row.rerouted) for row in patch.layers] == [(1, 1)]
    assert torch.equal(patch.weight("2"), model[2].weight)


# --- low-rank adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_of_peft(use_dora):
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    config = peft.LoraConfig(r=2, target_modules=["2"], use_dora=use_dora, init_lora_weights=False)
    plain = peft.get_peft_model(base, config).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    feedback = random_feedback(plain)
    assert any("lora_A" in name for name in feedback)
    model, _ = patched(plain, feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input"])


# --- views, tied weights, repeated calls ------------------------------------------------------------


class Slices(nn.Module):
    """Uses halves of a weight, then its transpose, never the module that holds it."""

    def __init__(self):
        super().__init__()
        self.first, self.whole = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        upper, lower = self.whole.weight.chunk(2)
        x = torch.tanh(torch.cat([F.linear(x, upper), F.linear(x, lower)], dim=-1))
        return F.linear(torch.tanh(F.linear(x, self.whole.weight.t())), self.whole.weight[1:, :].view(5, 6))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Autoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed; both convolutions share theirs."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv1d(3, 4, 3), nn.Linear(6, 6, bias=False)
        self.decoder = nn.ConvTranspose1d(4, 3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.head(torch.tanh(self.decoder(torch.tanh(self.encoder(x)))))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(Slices, (4, 6)), (Twice, (4, 6)), (Autoencoder, (4, 3, 6))],
    ids=["views of a weight", "one module three times", "tied convolutions"],
)
def test_one_weight_in_several_calls(make, shape):
    plain, x = make().double(), torch.randn(shape, dtype=torch.float64)
    feedback = random_feedback(plain)
    model, _ = patched(plain, feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input"])


class OneRow(nn.Module):
    """Uses a single row of a weight, which gives an output without features; in one sample, a number."""

    def __init__(self, copied=False):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.row, self.copied = 1, copied

    def forward(self, x):
        row = self.head.weight[self.row]
        return F.linear(torch.tanh(self.first(x)), row.clone() if self.copied else row)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,)], ids=str)
@pytest.mark.parametrize("copied", [False, True], ids=["view", "copy"])
def test_a_single_row_of_a_weight(copied, shape):
    plain, x = OneRow(copied).double(), torch.randn(shape, dtype=torch.float64)
    feedback = random_feedback(plain)
    model, patch = patched(plain, feedback)
    got = gradients(model, x)
    assert_unlike(got, by_backprop(plain, x), ["input", "first.weight"])
    # The oracle knows views alone.
    assert_same_gradients(got, by_saved_tensors(as_view(plain), feedback, x))
    assert [row.rerouted for row in patch.layers] == [1, 1]


def as_view(plain):
    twin = copy.deepcopy(plain)
    twin.copied = False
    return twin


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,)], ids=str)
@pytest.mark.parametrize("mode", ["KP", "information", "activation-alignment", "LDFA"])
def test_feedback_learns_from_a_single_row(mode, shape):
    """What it learns from a matrix of one row."""
    model, x = OneRow().double(), torch.randn(shape, dtype=torch.float64)
    patch = feedbackhook.patch(model, mode)
    probe(model(x)).backward()
    learned = {name: p.grad for name, p in patch.named_parameters()}
    patch.remove()
    patch = feedbackhook.patch(model, mode)
    model.zero_grad()
    model.row = slice(1, 2)
    probe(model(x).squeeze(-1)).backward()
    for name, p in patch.named_parameters():
        if name.startswith("head"):
            torch.testing.assert_close(learned[name], p.grad)
    if mode == "KP":
        torch.testing.assert_close(learned["head.V"], model.head.weight.grad)


@pytest.mark.parametrize("shape", [(5, 4), (4,)], ids=str)
def test_direct_feedback_to_a_single_row(shape):
    """Row k of the error that is sent is B times what arrives for sample k."""
    model, x = OneRow().double(), torch.randn(shape, dtype=torch.float64)
    patch = feedbackhook.patch(model, "DFA")
    sent = []
    patch.on_error_signal("head", lambda grad_input, grad_output: sent.append((grad_input, grad_output)))
    probe(model(x)).backward()
    ((grad_input, grad_output),) = sent
    b = patch.projection("head")
    assert b.shape == (6, 1)
    torch.testing.assert_close(grad_input, grad_output.unsqueeze(-1) * b[:, 0])


def test_tied_weights_with_different_rules_are_refused():
    with pytest.raises(ValueError, match="'encoder' and 'decoder' share a weight; give them the same rule"):
        feedbackhook.patch(Autoencoder(), {"encoder": "uSF", "decoder": "frSF"})


# --- layouts and dtypes ------------------------------------------------------------------------------


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 144, 5),
    )  # fmt: skip


def test_channels_last():
    plain, x = convolutions().double(), torch.randn(2, 3, 14, 14, dtype=torch.float64)[..., :13, :13]
    plain = plain.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    feedback = random_feedback(plain)
    model, _ = patched(plain, feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_follows_double_precision(dtype):
    """In half precision the gradients are the double-precision ones to rounding, and not backprop's."""
    model, x = convolutions().to(dtype), torch.randn(2, 3, 13, 13).to(dtype)
    feedback = {name: v.to(dtype) / v[0].numel() ** 0.5 for name, v in random_feedback(model).items()}
    got = gradients(patched(model, feedback)[0], x)
    double = copy.deepcopy(model).double()
    exact = gradients(patched(double, {n: v.double() for n, v in feedback.items()})[0], x.double())
    backprop = by_backprop(double, x.double())
    for name in ("input", "0.weight", "4.weight"):
        ours, theirs, plain = (g.named()[name].double() for g in (got, exact, backprop))
        assert got.named()[name].dtype == dtype
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
        assert (ours - plain).norm() > 0.3 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_reroutes_as_without_it(dtype):
    model, x = convolutions(), torch.randn(2, 3, 13, 13)
    patch = feedbackhook.patch(model, "sign", concordance=0.6)

    def under_autocast(model, x):
        with torch.autocast("cpu", dtype=dtype):
            return model(x).float()

    plain, mixed = gradients(model, x), gradients(model, x, under_autocast)
    patch.enabled = False
    backprop = gradients(model, x)
    for name in ("input", "0.weight", "4.weight"):
        theirs = plain.named()[name]
        assert mixed.named()[name].dtype == torch.float32
        assert (mixed.named()[name] - theirs).norm() < 0.15 * theirs.norm()
        assert (backprop.named()[name] - theirs).norm() > 0.3 * theirs.norm()


def test_a_gradient_scaler_scales_the_rerouted_gradients():
    model, x = convolutions(), torch.randn(2, 3, 13, 13)
    patch = feedbackhook.patch(model, "brSF")
    expected = gradients(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(probe(model(x))).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.parameters[name])
    before = patch.feedback("2")
    scaler.step(optimizer)
    assert not torch.equal(patch.feedback("2"), before)


def test_a_step_that_the_scaler_skips_redraws_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    patch = feedbackhook.patch(model, "brSF")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((2, 3), float("inf"))).sum()).backward()
    before = patch.feedback("1")
    scaler.step(optimizer)
    assert torch.equal(patch.feedback("1"), before)


class Transposed(nn.Linear):
    """Calls with a view of its own weight, which as a square has the weight's shape."""

    def forward(self, x):
        return F.linear(x, self.weight.t())


def test_a_view_of_a_square_weight_is_a_view_of_its_feedback():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Transposed(4, 4, bias=False)).double()
    x, feedback = torch.randn(3, 4, dtype=torch.float64), random_feedback(plain)
    model, _ = patched(plain, feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input"])


@pytest.mark.parametrize("offset", [0, 24], ids=["from its start", "from its middle"])
def test_views_where_weight_and_feedback_lie_in_larger_storages(offset):
    plain, x = Slices().double(), torch.randn(4, 6, dtype=torch.float64)
    flat = torch.randn(offset + 36, dtype=torch.float64)
    plain.whole.weight = nn.Parameter(flat[offset:].view(6, 6))
    feedback = random_feedback(plain)
    feedback["whole"] = torch.randn(50, dtype=torch.float64)[7:43].view(6, 6)
    model = plain
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    got = gradients(model, x)
    patch.remove()
    assert_matches_oracle(got, plain, feedback, x, unlike=["input"])
