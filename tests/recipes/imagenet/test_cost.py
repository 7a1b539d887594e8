"""The ImageNet recipe's dry run, smoke run and command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from support.bounds import HANG
from support.imagenet import SCRIPT, SMALL, make_tree, train


def test_the_dry_run_prints_the_hours_of_the_run(recipe, tmp_path, monkeypatch, capsys):
    root = make_tree(tmp_path / "images", train=9)
    monkeypatch.setattr(recipe.cost, "timed", lambda work: (work(), 36.0))
    train(recipe, root, tmp_path / "run", dry_run=True, steps=2, epochs=100)
    out = capsys.readouterr().out
    # 16 images in 36 s; of 27 training images 24 are in whole batches, and 12 are tested, in each epoch
    assert f"{(24 + 12) * 100 / (16 / 36) / 3600:,.1f} hours" in out
    assert "device hours" in out
    assert "100 x (27 + 12) images" in out
    network = torchvision.models.resnet18(num_classes=3)
    # Weights, their momentum, and running statistics.
    saved = [*network.parameters(), *network.parameters(), *network.buffers()]
    least = sum(tensor.nbytes for tensor in saved)
    most = least + 1000 * len(saved)  # and in the archive a kilobyte for each name, header and gap
    megabytes = float(out.split("checkpoint")[1].split("MB")[0])
    assert least / 1e6 - 0.05 <= megabytes <= most / 1e6 + 0.05  # told to a tenth
    assert f"reads and augments {64 / 36:.0f} images/s" in out
    assert not (tmp_path / "run").exists()


def test_the_dry_run_needs_no_images(recipe, tmp_path, capsys):
    small = {"model": SMALL, "steps": 1, "batch_size": 2, "size": 64}
    train(recipe, tmp_path / "nowhere", tmp_path / "run", dry_run=True, **small)
    out = capsys.readouterr().out
    assert "1 x (1,281,167 + 50,000) images" in out
    assert "not measured: there is no folder" in out
    assert " hours" in out


def test_the_smoke_run_trains_and_leaves_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(recipe, Path("nowhere"), None, smoke=True, model=SMALL)
    out = capsys.readouterr().out
    assert "epoch 2/2" in out
    assert "exact: classifier.1" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_line_reads_the_yaml_and_its_options(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--smoke",
        "true",
        "--rule",
        "sign",
        "--options.concordance",
        "0.75",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sign(concordance=0.75)" in done.stdout
