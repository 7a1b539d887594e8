"""The ImageNet recipe in two processes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from support.bounds import HALF_OF_FLOAT32, HANG
from support.imagenet import (
    LR,
    SCRIPT,
    WEIGHT_DECAY,
    build,
    checkpoint_of,
    make_tree,
    relative_distance,
    replay,
    spy_on_batches,
    train,
)

import feedbackhook


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(SCRIPT), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    "rule",
    [("sign-symmetry", {}), ("sign", {"concordance": 0.75, "redraw": "update"})],
    ids=lambda rule: rule[0],
)
def test_two_processes_equal_a_plain_loop_over_the_halves_of_each_batch(recipe, tmp_path, monkeypatch, rule):
    """Each process normalizes its half of a batch with the statistics of that half, because there is no
    SyncBatchNorm. The running statistics are the first process's. Augmentation does not change images of one
    color."""
    rule, rule_options = rule
    root = make_tree(tmp_path / "images", test=5, noise=False)  # 15 test images: the last batch is filled up
    given = {"root": root, "rule": rule, "batch_size": 8, "size": 32, "lr": LR, "workers": 0, "cpu": "true"}
    given["weight_decay"] = WEIGHT_DECAY
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    arguments += [part for name, value in rule_options.items() for part in (f"--options.{name}", value)]
    for epochs in (1, 2):  # the second resumes from the first's checkpoint
        done = torchrun(*arguments, "--output", tmp_path / "two", "--epochs", epochs)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(f"epoch {epochs}/{epochs}") == 1
        assert "2 x cpu" in done.stdout
    checkpoint = checkpoint_of(tmp_path / "two")

    batches = spy_on_batches(recipe, monkeypatch)
    train(recipe, root, tmp_path / "one", rule="backprop", epochs=2)
    assert len(batches) == 6

    def over_halves(mode, **options):
        patches = []

        def backward(network, x, y):
            if mode is not None and not patches:
                exclude = feedbackhook.classifier(network)
                patches.append(feedbackhook.patch(network, mode, exclude=exclude, seed=0, **options))
            for number, (half, labels) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                before = {name: buffer.clone() for name, buffer in network.named_buffers()}
                (F.cross_entropy(network(half), labels) / 2).backward()
                if number:  # the first process's statistics are kept
                    for name, buffer in network.named_buffers():
                        buffer.copy_(before[name])

        return replay(batches, backward)

    assert relative_distance(checkpoint["model"], over_halves(rule, **rule_options)) < HALF_OF_FLOAT32
    assert relative_distance(checkpoint["model"], over_halves(None)) > 1e-2
    assert feedbackhook.read(tmp_path / "two")["epoch"].max() == 2

    network, _ = build(recipe, 3, rule="backprop", seed=0)
    network.load_state_dict(checkpoint["model"])
    _, test = recipe.image_folders(root, 32)
    one = recipe.evaluate(Accelerator(cpu=True), network, torch.utils.data.DataLoader(test, 8))
    for name, value in one.items():
        assert checkpoint["metrics"][name] == pytest.approx(value, rel=HALF_OF_FLOAT32), name


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_smoke_run_in_two_processes():
    done = torchrun("--smoke", "true", "--cpu", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert "2 x cpu" in done.stdout
