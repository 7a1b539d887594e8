"""TIMIT-80 on made recordings and transcriptions: which segments are read, and their features."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bounds import HALF_OF_FLOAT32, ROUNDING
from support.datasets import config, error, no_decoding, run, same, shrink, truncate

from feedbackhook.cli import main
from feedbackhook.experiments.config import ConfigError, DataConfig, ModelConfig, SweepConfig
from feedbackhook.experiments.data import readers
from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.data.registry import DATASETS, Draw
from feedbackhook.experiments.data.verify import check
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.sweep.estimate import estimate
from feedbackhook.experiments.sweep.grid import plan
from feedbackhook.liao2016 import draws
from feedbackhook.liao2016 import timit as audio
from feedbackhook.store.recorder import read

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")

PHONES = ("h#", "iy", "s")
SECOND = 16_000


def speech(seconds: float, seed: int) -> np.ndarray:
    """Noise under a tone, of 16 bit."""
    rng, time = np.random.default_rng(seed), np.arange(int(seconds * SECOND)) / SECOND
    wave = 0.3 * np.sin(2 * np.pi * (200 + 150 * seed) * time) + 0.05 * rng.standard_normal(len(time))
    return (wave * 32767).clip(-32768, 32767).astype(np.int16)


def write_sentence(
    folder: Path, name: str, phones: str, seed: int, upper: bool = True, kind: str = "NIST"
) -> None:
    """A recording, a fifth of a second of each phone, and its transcription."""
    folder.mkdir(parents=True, exist_ok=True)
    labels, width = phones.split(), SECOND // 5
    suffixes = (".WAV", ".PHN") if upper else (".wav", ".phn")
    soundfile.write(
        folder / f"{name}{suffixes[0]}", speech(len(labels) / 5, seed), SECOND, subtype="PCM_16", format=kind
    )
    lines = (f"{i * width} {(i + 1) * width} {label}\n" for i, label in enumerate(labels))
    (folder / f"{name}{suffixes[1]}").write_text("".join(lines))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three phones, of which three segments each are drawn for training and one for testing."""
    folder = tmp_path / "TIMIT"
    write_sentence(folder / "TRAIN" / "DR1" / "FCJF0", "SX37", "h# iy s iy h#", 1)
    write_sentence(folder / "TRAIN" / "DR2" / "MABC0", "SI9", "h# s iy s h#", 2, kind="WAV")
    write_sentence(folder / "TRAIN" / "DR2" / "MABC0", "SA1", "h# s s s s h#", 3)
    write_sentence(folder / "TEST" / "DR1" / "FAKS0", "SX43", "h# iy s h#", 4)
    (folder / "TEST" / "DR1" / "FAKS0" / "SX43.TXT").write_text("0 12800 She had your dark suit.\n")
    monkeypatch.setattr(audio, "PHONES", PHONES)
    monkeypatch.setattr(audio, "_RECORDINGS", {"train": 2, "test": 1})
    draw = Draw(folder_classes=3, train=3, test=1, min_test=1, min_train=1)
    shrink(monkeypatch, "TIMIT-80", classes=3, train=9, test=3, draw=draw)
    return tmp_path


def timit(root: Path, **changes: object) -> DataConfig:
    return config("TIMIT-80", root, **({"size": None} | changes))


def test_timit_has_61_phones() -> None:
    assert len(set(audio.PHONES)) == len(audio.PHONES) == DATASETS["TIMIT-80"].classes == 61
    assert audio.FRAMES * 3 * (audio.BANDS + 1) == 1845


def hertz(mel: float) -> float:
    """Slaney's scale: linear below 1 kHz, 27 steps to each factor of 6.4 above it."""
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def static(samples: np.ndarray, frame: int) -> np.ndarray:
    """The 40 bands and the energy of one frame, by a discrete Fourier transform written out."""
    padded = np.concatenate([np.zeros(200), samples.astype(np.float64), np.zeros(200)])
    n = np.arange(400)
    windowed = padded[160 * frame :][:400] * (0.5 - 0.5 * np.cos(2 * np.pi * n / 400))
    bins = np.arange(201)
    power = np.abs(np.exp(-2j * np.pi * np.outer(bins, n) / 400) @ windowed) ** 2
    highest = 15 + 27 * np.log(8) / np.log(6.4)  # 8 kHz
    edges = [hertz(mel) for mel in np.linspace(0, highest, 42)]
    bands = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        triangle = np.minimum((bins * 40 - low) / (middle - low), (high - bins * 40) / (high - middle))
        bands.append(np.maximum(triangle, 0) * 2 / (high - low) @ power)
    return np.log(np.maximum([*bands, power.sum()], 1e-10))


@pytest.mark.parametrize("frame", [0, 1, 23, 50])
def test_the_features_of_a_frame_are_the_defined_ones(frame: int, tmp_path: Path) -> None:
    write_sentence(tmp_path, "A", "s s s", 7)
    samples = speech(0.6, 7) / 32768
    found = audio.utterance(str(tmp_path / "A.WAV"))
    assert found.shape == (61, 123)
    assert found.dtype == np.float32
    last = len(found) - 1
    around = {t: static(samples, min(max(t, 0), last)) for t in range(frame - 4, frame + 5)}

    def first(t: int) -> np.ndarray:
        t = min(max(t, 0), last)
        return sum(n * (around[min(t + n, last)] - around[max(t - n, 0)]) for n in (1, 2)) / 10

    second = sum(n * (first(frame + n) - first(frame - n)) for n in (1, 2)) / 10
    # Powers are sums in float32, and their logarithms are as far off as they are, relatively. Differences
    # are sums of those with weights below 1.
    for part, expected in zip(np.split(found[frame], 3), (around[frame], first(frame), second), strict=True):
        np.testing.assert_allclose(part, expected, atol=HALF_OF_FLOAT32, rtol=0)
    assert np.abs(found[frame, :41] - static(samples, frame + 2)).max() > 0.1  # another frame's differ


def test_fifteen_frames_are_centered_on_the_segment() -> None:
    features = np.arange(40 * 123, dtype=np.float32).reshape(40, 123)
    segment = audio.Segment(3200, 3680, 0)  # its middle is sample 3440, at 21.5 frames
    assert segment.frame == 22
    assert np.array_equal(audio.centered(features, 22), features[15:30].ravel())
    rows = audio.centered(features, 2).reshape(15, 123)[:, 0] / 123
    assert rows.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (audio.centered(features, 39).reshape(15, 123)[:, 0] / 123)[-8:].tolist() == [39] * 8
    with pytest.raises(ValueError, match="ends before the segment"):
        audio.centered(features, 41)


def test_segments_are_read_with_their_features_and_then_from_the_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = timit(root, cache=str(root / "cache"))
    data = load(given)
    assert data.train.images.shape == (9, 1845, 1, 1)
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.bincount().tolist() == [3, 3, 3]
    assert data.test.labels.bincount().tolist() == [1, 1, 1]
    found = readers.find(given)
    for split, part in (("train", data.train), ("test", data.test)):
        for item, image, label in zip(found.splits[split], part.images, part.labels, strict=True):
            place, _, rest = item.name.partition(" (")
            phone, _, start = rest.rstrip(")").partition(" at ")
            assert PHONES[label] == phone
            assert not Path(place).name.startswith("SA")
            features = audio.utterance(place)
            frame = round((int(start) + SECOND / 10) / 160)
            assert np.array_equal(image.flatten().numpy(), audio.centered(features, frame))
    no_decoding(monkeypatch)
    assert same(load(given).train, data.train)


def test_features_are_normalized_each_by_the_training_set(root: Path) -> None:
    data = load(timit(root))
    x, y = data.batch(data.train, slice(None), torch.device("cpu"))
    raw = data.train.images.double()
    mean, std = raw.mean(0), raw.std(0, correction=0)
    expected = (raw - mean) / std
    # Four roundings: of the mean, and of the difference, the deviation and the quotient.
    bound = ROUNDING["float32"] * (mean.abs() / std + 3 * expected.abs())
    assert ((x - expected).abs() <= bound * (1 + HALF_OF_FLOAT32)).all()  # products of roundings come on top
    again, _ = data.batch(data.train, slice(None), torch.device("cpu"))
    assert torch.equal(x, again)  # what is held is not changed
    assert torch.equal(y, data.train.labels)
    few = load(timit(root, train_images=6, val_fraction=0.5))
    assert (len(few.train.labels), few.val is not None) == (3, True)


def test_a_draw_is_fixed_whatever_the_case_of_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(root: Path) -> list[str]:
        splits = readers.find(timit(root)).splits
        return [item.name.removeprefix(str(root)).lower() for items in splits.values() for item in items]

    first = drawn(root)
    other = root / "other"
    for sentence in sorted((root / "TIMIT").rglob("*.*")):
        path = other / "TIMIT" / str(sentence.relative_to(root / "TIMIT")).lower()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sentence.read_bytes())
        if path.suffix == ".wav":  # a converted copy beside the original, as some have
            path.with_name(f"{path.name}.wav").write_bytes(sentence.read_bytes())
    assert drawn(other) == first
    found = set()
    for seed in range(6):
        monkeypatch.setattr(draws, "SEED", seed)
        found.add(tuple(drawn(root)))
    assert len(found) > 1


def test_a_check_of_a_whole_copy_ends_well(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(capsys, "check", "TIMIT-80", "--root", str(root))
    assert status == 0
    rows = {line.split()[0]: line.split()[1:3] for line in lines if line.strip()}
    assert (rows["all"], rows["train"], rows["test"]) == (["3", "14"], ["3", "9"], ["3", "3"])
    assert any("3 classes, at most 9 segments" in line for line in lines)
    assert any(line.startswith("Note: the classes and features are ours") for line in lines)
    assert lines[-1] == "TIMIT-80 is complete: nothing is missing or damaged"


def test_a_rare_phone_is_used_with_what_there_is_and_told(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw = Draw(folder_classes=3, train=4, test=1, min_test=1, min_train=1)
    shrink(monkeypatch, "TIMIT-80", train=12, draw=draw)
    assert load(timit(root)).train.labels.bincount().tolist() == [4, 3, 3]
    assert "fewer samples than are drawn: 10 instead of 12 for training; list all" in caplog.text
    train = root / "TIMIT" / "TRAIN"
    assert check(timit(root)).short == [
        f"{train} contains 3 segments of {phone} instead of 4" for phone in ("iy", "s")
    ]
    monkeypatch.setattr(audio, "PHONES", (*PHONES, "zh"))
    message = error(timit(root, cache="none"))
    assert f"{train} contains no segment of zh (and 1 more; list all with: feedbackhook data check" in message


def test_what_is_missing_or_damaged_is_named(root: Path) -> None:
    train, test = root / "TIMIT" / "TRAIN", root / "TIMIT" / "TEST" / "DR1" / "FAKS0"
    speaker = train / "DR1" / "FCJF0"
    (speaker / "SX37.PHN").rename(speaker / "SX38.PHN")
    phn = train / "DR2" / "MABC0" / "SI9.PHN"
    phn.write_text(phn.read_text() + "16000 15999 iy\n16000 iy\n16000 17000 ih\n")
    (test / "SX43.WAV").write_bytes(b"NIST_1A\n   1024\nno recording")
    faults = check(timit(root)).problems
    assert faults[:5] == [
        f"{speaker / 'SX37.PHN'} is missing, but {speaker / 'SX37.WAV'} exists",
        f"{speaker / 'SX38.WAV'} is missing, but {speaker / 'SX38.PHN'} exists",
        f"{phn} is damaged: line 6 is not 'START END PHONE'",
        f"{phn} is damaged: line 7 is not 'START END PHONE'",
        f"{phn} is damaged: line 8 has 'ih', which is not a phone of TIMIT",
    ]
    assert len(faults) == 9
    assert all(fault.startswith(f"{test / 'SX43.WAV'} (") for fault in faults[5:])
    assert "cannot be decoded: " in faults[5]
    assert f"TIMIT-80 could not be read: {faults[0]} (and 4 more; list all" in error(timit(root))


def test_a_recording_that_is_not_timits_is_named(root: Path) -> None:
    path = root / "TIMIT" / "TEST" / "DR1" / "FAKS0" / "SX43.WAV"
    whole = path.read_bytes()
    soundfile.write(path, speech(0.8, 4), 8000, subtype="PCM_16", format="WAV")
    assert f"{path} (" in error(timit(root))
    assert "12800 samples of 1 channel(s) at 8000 Hz instead of one channel at 16000 Hz" in error(timit(root))
    soundfile.write(path, speech(0.3, 4), SECOND, subtype="PCM_16", format="NIST")
    assert "the recording ends before the segment" in error(timit(root))
    path.write_bytes(whole)
    truncate(path.with_suffix(".PHN"))
    assert "SX43.PHN is damaged" in error(timit(root)) or "contains no segment" in error(timit(root))


def test_a_copy_with_fewer_recordings_says_that_other_segments_are_drawn(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "_RECORDINGS", {"train": 3, "test": 1})
    assert check(timit(root)).differs == [
        f"{root / 'TIMIT' / 'TRAIN'} contains 2 of the 3 published recordings; the draw has other "
        "segments than from the complete set"
    ]


def test_a_copy_that_is_not_there_is_said_with_its_home_page(root: Path) -> None:
    assert f"{root / 'nowhere' / 'TIMIT'} is missing; torchvision cannot download it: get it from https" in (
        error(timit(root / "nowhere"))
    )
    (root / "TIMIT" / "TEST").rename(root / "TIMIT" / "elsewhere")
    assert check(timit(root)).problems == [f"{root / 'TIMIT' / 'TEST'} is missing"]


@pytest.mark.parametrize("package", ["librosa", "soundfile"])
def test_a_package_that_is_missing_is_named(
    package: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for use in (load, check):
        with pytest.raises(ConfigError, match=rf"needs {package}, .*pip install 'feedbackhook\[audio\]'"):
            use(timit(root))


def test_the_papers_network_trains_on_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = root / "run"
    command = ["train", "--data.name", "TIMIT-80", "--data.root", str(root), "--data.cache", "none"]
    command += ["--model.name", "liao2016/timit", "--model.batch_norm", "paper", "--protocol.batch_size", "3"]
    command += ["--protocol.epochs", "2", "--protocol.device", "cpu", "--record.figures", "false"]
    assert main([*command, "--output", str(output)]) == 0
    table = read(output)
    assert set(table["layer"].dropna()) >= {"fc1", "fc2", "fc3"}
    losses = table[table["metric"] == "train_loss"]["value"]
    assert len(losses) == 2
    assert losses.iloc[1] < losses.iloc[0]
    command[command.index("liao2016/timit")] = "liao2016/images"
    assert main([*command, "--output", str(root / "other")]) == 2
    assert "liao2016/images takes images, but the data are 1845 features" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["liao2016/mnist", "liao2016/images", "cifar/resnet20", "timm/resnet18", "torchvision/resnet18"]
)
def test_a_network_of_images_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name} takes images, but the data are 1845 features: set model.name"
    ):
        build(ModelConfig(name), 61, 1845, (1, 1))


def test_what_is_of_images_has_no_effect_or_is_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(timit(root, size=8)).train.images.shape == (9, 1845, 1, 1)
    assert "data.size 8 has no effect: TIMIT-80 has features, not images" in caplog.text
    with pytest.raises(ConfigError, match=r"data.augmentation needs images, but these data are features"):
        load(timit(root)).augmentation({})


def test_a_sweep_is_planned_and_timed_on_it(tmp_path: Path) -> None:
    config = SweepConfig(["SGD"], ["TIMIT-80"], output=str(tmp_path / "sweep"))
    [first, *_] = runs = plan(config)
    assert first.config.model.name == "liao2016/timit"
    assert estimate(runs[:1])[first.name].seconds > 0
