"""Datasets as arrays in one file, `npz:PATH`: what is read, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.datasets import run

from feedbackhook.experiments.config import ConfigError, DataConfig, RunConfig
from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.training.run import train


def drawn(*shape: int, kind: Any = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(kind)


def write(path: Path, **changes: Any) -> DataConfig:
    """A file of 12 training and 6 test samples of 3 classes; arrays can be changed, or left out by None."""
    arrays: dict[str, Any] = {
        "x_train": drawn(12, 7, kind=np.float64),
        "y_train": np.arange(12) % 3,
        "x_test": drawn(6, 7, kind=np.float64, seed=1),
        "y_test": np.arange(6) % 3,
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return DataConfig(f"npz:{path}", cache="none")


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((8, 9), np.uint8), ((8, 9, 1), np.uint8), ((8, 9, 3), np.uint8), ((7,), np.float32), ((7,), np.int16)],
    ids=["gray", "one channel", "RGB", "features", "whole numbers"],
)
def test_samples_are_read_as_they_are(shape: tuple[int, ...], kind: Any, tmp_path: Path) -> None:
    x = {"x_train": drawn(12, *shape, kind=kind), "x_test": drawn(6, *shape, kind=kind, seed=1)}
    data = load(write(tmp_path / "data.npz", **x))
    for split, array in ((data.train, x["x_train"]), (data.test, x["x_test"])):
        if len(shape) == 1:
            want = torch.from_numpy(array.astype(np.float32))[:, :, None, None]
        else:
            want = torch.from_numpy(array.reshape(len(array), 8, 9, -1)).permute(0, 3, 1, 2)
        assert torch.equal(split.images, want)
    assert data.train.labels.tolist() == [0, 1, 2] * 4
    assert data.classes == 3


FLOATS = np.zeros((12, 8, 8), np.float32)
NAN = np.full((12, 7), np.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"has no y_test; it has x_test, x_train, y_train"),
        ({"x_train": FLOATS}, r"x_train is float32 of shape \(12, 8, 8\).*as uint8"),
        ({"x_train": drawn(12, 3, 8, 8)}, r"x_train is uint8 of shape \(12, 3, 8, 8\)"),
        ({"x_test": drawn(6, 8, kind=np.float64)}, "differ in kind"),
        ({"x_test": drawn(6, 8, 8)}, "differ in kind"),
        ({"x_train": NAN}, r"x_train\[0\] has a value that is not finite"),
        ({"x_train": NAN[:0], "y_train": np.arange(0)}, "x_train is empty"),
        ({"y_train": np.arange(11) % 3}, "12 samples, and y_train has 11 classes"),
        ({"y_train": np.arange(12) / 3}, r"y_train must be whole numbers of shape \(N,\), not float64"),
        ({"y_train": np.arange(12) % 3 + 1}, r"each of the classes 0 to 2, and holds \[1, 2, 3\]"),
        ({"y_test": np.arange(6)}, r"y_test holds \[3, 4, 5\], which y_train does not"),
        ({"classes": np.array(["a", "b"])}, "classes 0 to 1"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "data.npz", **changes))


@pytest.mark.parametrize(
    "content", [None, b"", b"no arrays", b"PK\x03\x04 cut"], ids=["missing", "empty", "text", "cut"]
)
def test_a_file_that_holds_no_arrays_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.npz is (missing|not a file of arrays)"):
        load(DataConfig(f"npz:{path}", cache="none"))


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file of arrays"):
        load(write(tmp_path / "data.npz", x_train=np.array([{}] * 12, dtype=object)))


def test_a_check_describes_the_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "check", write(tmp_path / "data.npz").name)
    assert code == 0
    text = "\n".join(lines)
    assert "train" in text
    assert "12" in text
    code, lines = run(capsys, "check", write(tmp_path / "data.npz", y_test=None).name)
    assert code != 0
    assert "has no y_test" in "\n".join(lines)


def test_features_are_learned(tmp_path: Path) -> None:
    config = RunConfig(condition="SGD", data=write(tmp_path / "data.npz"), output=str(tmp_path / "run"))
    config.model.name = "liao2016/timit"
    config.protocol.epochs, config.protocol.batch_size, config.protocol.device = 2, 6, "cpu"
    result = train(config)
    assert result.status == "finished"
    assert result.last_error is not None
