"""`feedbackhook profile`: a network and a dataset by name."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from feedbackhook.cli import main

SMALL = ["--data.train_images", "60", "--data.test_images", "20", "--seeds", "2", "--batches", "1"]
SMALL += ["--batch_size", "20", "--threads", "1", "--device", "cpu"]


def test_the_command_prints_the_table_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    options = ["--modes", "[sign, NuSF]", "--concordances", "[1, 0.5]", "--batch_norm", "paper"]
    arguments = ["profile", "liao2016/mnist", "--data.name", "digits", *SMALL, *options]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "profile.csv")
    assert list(table["condition"].unique()) == ["sign, concordance 1", "sign, concordance 0.5", "NuSF"]
    assert all(name in said for name in table["condition"].unique())
    assert "means over 1 batch, 2 draws" in said
    assert str(tmp_path / "profile.png") in said
    assert set(table["defined"]) <= {0, 2}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert main(arguments) == 0
    assert capsys.readouterr().out in said  # the same numbers again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["liao2016/mnist", "--modes", "[sgin]"], "did you mean 'sign'"),
        (["liao2016/mnist", "--seeds", "0"], "seeds must be 1 or more"),
        (["liao2016/mnist", "--batch_norm", "layer"], "batch_norm must be none, paper or affine"),
        (["liao2016/mnist", "--batch_size", "5000"], "more than the 60 training images"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments[:1], *SMALL, *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
