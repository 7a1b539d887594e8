"""The recipe for Lightning.

The weights after a few steps are those of a plain loop with the same patch on the same batches, whose
gradients are the oracle's and not backprop's.
"""

from __future__ import annotations

import copy
import functools
from types import ModuleType
from typing import Any

import pytest
from support.oracle import TOLERANCE, UNLIKE
from support.trainers import (
    BRSF,
    RULES,
    SIGN,
    assert_told,
    cross_entropy,
    distance,
    images,
    load_trainer,
    plain_loop,
    sgd,
    unpatched,
    weights_of,
)
from torch.utils.data import DataLoader, TensorDataset

import feedbackhook


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    return load_trainer("lightning_trainer")


def fit(lightning: ModuleType, model: Any, data: TensorDataset, epochs: int = 1, **options: Any) -> Any:
    """Lightning's Trainer in float64, on batches of 8 in their order."""
    trainer = lightning.L.Trainer(
        max_epochs=epochs,
        precision="64-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=8), **options)
    assert trainer.global_step == epochs * len(data) // 8
    return trainer


@pytest.mark.parametrize("rule", RULES)
def test_lightning_trains_as_a_plain_loop_does(lightning, rule):
    model = lightning.Classifier(RULES[rule], lr=0.1)
    start = copy.deepcopy(unpatched(model)).double()
    fit(lightning, model, images(24))
    batches = list(DataLoader(images(24), batch_size=8))
    got = weights_of(model)
    patched = copy.deepcopy(start)
    loop = functools.partial(plain_loop, batches=batches, optimizer=sgd)
    want = loop(patched, RULES[rule], loss_of=lambda m, batch: cross_entropy(m.net, batch))
    exact = loop(copy.deepcopy(start), None, loss_of=lambda m, batch: cross_entropy(m.net, batch))
    assert distance(got, want) <= TOLERANCE
    assert distance(got, exact) > UNLIKE
    assert [row.rerouted for row in model.patch.layers] == [0, 3, 3, 3]
    assert {row["draws"] for row in model.patch.state_dict()["layers"].values()} == {3 * (rule == "brSF")}


def test_lightning_goes_on_from_a_checkpoint_with_the_same_v(lightning, tmp_path):
    start = lightning.Classifier(BRSF, lr=0.1).double()  # Lightning loads before it converts
    whole, first, second, forgetful = (copy.deepcopy(start) for _ in range(4))
    two = images(16)  # batches
    fit(lightning, whole, two, epochs=2)
    fit(lightning, first, two).save_checkpoint(tmp_path / "last.ckpt")
    fit(lightning, second, two, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert distance(weights_of(second), weights_of(whole)) <= TOLERANCE
    assert second.patch.state_dict() == whole.patch.state_dict()
    assert whole.patch.state_dict()["layers"]["net.2"]["draws"] == 4

    forgetful.on_load_checkpoint = lambda checkpoint: None  # without the hook V is another
    fit(lightning, forgetful, two, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert distance(weights_of(forgetful), weights_of(whole)) > UNLIKE

    again = lightning.Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.patch.state_dict() == first.patch.state_dict()


def test_lightnings_configure_model_holds_the_line_as_well(lightning):
    class Late(lightning.L.LightningModule):
        configured = 0

        def configure_model(self):
            self.configured += 1
            if feedbackhook.get_patch(self) is None:
                self.net = copy.deepcopy(net)
                self.patch = feedbackhook.patch(self, **SIGN)

        def training_step(self, batch, index):
            loss = cross_entropy(self.net, batch)
            self.rows = feedbackhook.measure(self.patch, loss)
            return loss

        def test_step(self, batch, index):
            cross_entropy(self.net, batch)

        def configure_optimizers(self):
            return sgd(list(self.parameters()))

    net = unpatched(lightning.Classifier().net).double()
    model, wanted = Late(), Late()
    trainer = fit(lightning, model, images(16))
    trainer.test(model, DataLoader(images(16), batch_size=8), verbose=False)
    assert model.configured > 1
    wanted.net = copy.deepcopy(net)
    want = plain_loop(
        wanted,
        SIGN,
        DataLoader(images(16), batch_size=8),
        lambda m, batch: cross_entropy(m.net, batch),
        sgd,
        tolerance=None,
    )
    assert distance(weights_of(model), want) <= TOLERANCE
    angles = [row.value for row in model.rows if row.metric == "gradient_angle" and row.layer == "net.2"]
    assert 1 < angles[0] < 179


def test_watching_lightnings_closure_is_an_error_that_names_the_way_out(lightning, tmp_path):
    model = lightning.Classifier(SIGN)
    with feedbackhook.Recorder(tmp_path) as recorder:
        model.patch.watch(1, recorder)
        with pytest.raises(RuntimeError, match=r"measure\(patch, loss\)"):
            fit(lightning, model, images(8))


def test_the_lightning_recipe_runs(lightning, tmp_path, capsys):
    lightning.main(SIGN, output=tmp_path, smoke=True)
    out = capsys.readouterr().out
    assert_told(out, ["net.0", "net.2", "net.5", "net.7"], rerouted=5)
    lightning.main(SIGN, output=tmp_path, epochs=2, resume=tmp_path / "last.ckpt", smoke=False)
    assert_told(capsys.readouterr().out, ["net.7"], rerouted=29)
