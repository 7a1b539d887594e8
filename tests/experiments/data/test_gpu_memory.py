"""Images in a GPU's memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data.load import ImageData, load


def bytes_of(data: ImageData) -> int:
    splits = [data.train, data.test, *([data.val] if data.val else [])]
    return sum(t.numel() * t.element_size() for split in splits for t in split)


@pytest.mark.parametrize("val_fraction", [0.0, 0.1])
def test_images_move_to_a_gpu_where_there_is_room(
    val_fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(DataConfig(val_fraction=val_fraction))
    device, needed = torch.device("cuda"), bytes_of(data)
    for free, where in ((2 * needed, "cuda"), (2 * needed - 2, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**12))
        with FakeTensorMode(allow_non_fake_inputs=True):  # as if there were a GPU, without its values
            moved = data.to(device)
            splits = [s for s in (moved.train, moved.test, moved.val) if s is not None]
            assert {t.device.type for split in splits for t in split} == {where}
            assert (moved.mean.device.type, moved.std.device.type) == ("cuda", "cuda")
            for index in (torch.tensor([3, 1]), slice(0, 2)):
                x, y = moved.batch(moved.train, index, device)
                assert (x.device.type, y.device.type) == ("cuda", "cuda")
                assert x.shape == (2, 1, 8, 8)
        assert (moved.classes, moved.val is None) == (data.classes, data.val is None)


def test_on_a_cpu_images_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AssertionError("a GPU is asked")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    data = load(DataConfig())
    assert data.to(torch.device("cpu")) is data
