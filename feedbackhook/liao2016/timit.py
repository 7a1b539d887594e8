"""Reads TIMIT-80: phones, each as 15 frames of 123 features of the speech around it.

Liao, Leibo and Poggio 2016 distinguish 80 classes by 1,845 features but describe neither; both are chosen
here.

- Classes: the 61 phones of TIMIT's transcriptions, including silences and closures. No publication says what
  the paper's 80 classes are, so none are invented.
- Samples: segments of the transcription (.PHN), 400 of each phone from the speakers of TRAIN and 100 from
  those of TEST, in a fixed random draw. Rare phones (such as `eng`) have fewer. The two sentences that all
  speakers read (SA1, SA2) are left out, as usual.
- Features, as in Mohamed, Dahl and Hinton 2012 and Graves, Mohamed and Hinton 2013: 40 logarithmic mel bands
  and the logarithmic energy of frames of 25 ms, every 10 ms, with their first and second differences; 15 such
  frames, the middle one at the middle of the segment. Beyond the ends of the recording its first or last
  frame is repeated. 15 x 123 = 1,845, the paper's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data.items import Item, Sources, hint_if_missing, root
from feedbackhook.experiments.data.registry import Dataset
from feedbackhook.liao2016.draws import ranked

RATE = 16_000  # samples per second
WINDOW, STEP = 400, 160  # samples in a frame, and from one frame to the next: 25 ms, 10 ms
BANDS, FRAMES = 40, 15
_FLOOR = 1e-10  # smallest power, so that its logarithm exists
_RECORDINGS = {"train": 3_696, "test": 1_344}  # without SA1 and SA2: 8 each of 462 and of 168 speakers
_REACH = 2  # frames on either side from which a difference is computed

_LABELS = (
    "aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h# hh hv ih ix iy "
    "jh k kcl l m n ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z zh"
)
PHONES: tuple[str, ...] = tuple(_LABELS.split())
"""The 61 labels of TIMIT's transcriptions; a class is a position in this list."""


class Segment(NamedTuple):
    """A phone in a recording: its first sample, the sample after its last, and its class."""

    start: int
    end: int
    label: int

    @property
    def frame(self) -> int:
        """The frame whose middle is closest to the segment's."""
        return round((self.start + self.end) / 2 / STEP)


def read(dataset: Dataset, config: DataConfig) -> Sources:
    """Find the segments of TIMIT, and draw from them.

    The files, as the Linguistic Data Consortium publishes them (LDC93S1), are
    TRAIN/DIALECT/SPEAKER/SENTENCE.WAV with SENTENCE.PHN, and TEST likewise, in upper or lower case. The
    recordings are NIST SPHERE or RIFF.

    Raises:
        ConfigError: librosa or soundfile is not installed.
    """
    folder = root(config) / dataset.paths[0]
    for package in ("librosa", "soundfile"):
        _import(package)
    if not folder.is_dir():
        hint = hint_if_missing(config, downloadable=False, home_page=dataset.home_page)
        return Sources(problems=[f"{folder} is missing"], hint=hint)
    found = Sources(hint=f"replace {folder} with a new copy of TIMIT ({dataset.home_page})")
    features = lru_cache(maxsize=4)(utterance)  # the items of one recording follow each other
    every: list[Item] = []
    splits: dict[str, list[Item]] = {}
    for split in ("train", "test"):
        place = _within(folder, split.upper())
        if not place.is_dir():
            found.problems.append(f"{place} is missing")
            continue
        by_phone = _segments_by_phone(place, _RECORDINGS[split], features, found)
        splits[split] = _drawn(by_phone, dataset, split, folder, place, found)
        every += [item for items in by_phone.values() for item in items]
    found.folder = sorted(every, key=lambda item: item.name)
    if not found.problems:
        found.splits = splits
    return found


def _segments_by_phone(
    place: Path, published: int, features: Callable[[str], NDArray[np.float32]], found: Sources
) -> dict[str, list[Item]]:
    """The segments of each phone in one part of TIMIT, which has ``published`` recordings."""
    by_phone: dict[str, list[Item]] = {phone: [] for phone in PHONES}
    transcribed = list(_transcribed(place, found.problems))
    if len(transcribed) < published:
        found.differs.append(
            f"{place} contains {len(transcribed):,} of the {published:,} published recordings; the draw has "
            "other segments than from the complete set"
        )
    for recording, segments in transcribed:
        for segment in segments:
            name = f"{recording} ({PHONES[segment.label]} at {segment.start})"
            item = Item(name, partial(_read, features, recording, segment), segment.label)
            by_phone[PHONES[segment.label]].append(item)
    return by_phone


def _drawn(
    by_phone: dict[str, list[Item]], dataset: Dataset, split: str, folder: Path, place: Path, found: Sources
) -> list[Item]:
    """The segments of one part of TIMIT that are drawn, in the order of their names."""
    assert dataset.draw is not None
    wanted = {"train": dataset.draw.train, "test": dataset.draw.test}[split]
    drawn = set()
    for phone, items in by_phone.items():
        names = ranked((item.name.lower() for item in items), f"{folder}/".lower())
        drawn |= set(names[:wanted])
        if 0 < len(items) < wanted:
            found.short.append(f"{place} contains {len(items)} segments of {phone} instead of {wanted}")
        elif not items:
            found.problems.append(f"{place} contains no segment of {phone}")
    return sorted(
        (item for items in by_phone.values() for item in items if item.name.lower() in drawn),
        key=lambda item: item.name,
    )


def utterance(path: str) -> NDArray[np.float32]:
    """Return the features (T, 123) of the T frames of a recording.

    Frame t has the 400 samples around sample 160 t, with zeros beyond the ends, multiplied by a Hann window.
    c_t is the natural logarithm of the power of its spectrum in 40 mel bands (Slaney's, from 0 to 8 kHz) and
    in total. The first differences are d_t = sum_n n (c_{t+n} - c_{t-n}) / (2 sum_n n^2) with n = 1, 2 (as in
    HTK); the second differences are those of d.

    Raises:
        ValueError: the file is not a recording with one channel at 16 kHz.
    """
    librosa, soundfile = _import("librosa"), _import("soundfile")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(str(error)) from error
    if rate != RATE or samples.shape[1] != 1 or len(samples) < WINDOW:
        shape = f"{len(samples)} samples of {samples.shape[1]} channel(s) at {rate} Hz"
        raise ValueError(f"it has {shape} instead of one channel at {RATE} Hz")
    spectrum = librosa.stft(samples[:, 0], n_fft=WINDOW, hop_length=STEP, window="hann", pad_mode="constant")
    power = np.abs(spectrum) ** 2
    bands = librosa.feature.melspectrogram(S=power, sr=RATE, n_fft=WINDOW, n_mels=BANDS)
    static = np.log(np.maximum(np.vstack([bands, power.sum(0)]), _FLOOR))
    difference = partial(librosa.feature.delta, width=2 * _REACH + 1, order=1, mode="nearest")
    first = difference(static)
    features: NDArray[np.float32] = np.vstack([static, first, difference(first)]).T.astype(np.float32)
    return features


def centered(features: NDArray[np.float32], frame: int) -> NDArray[np.float32]:
    """Return the concatenated features of 15 frames, with ``frame`` in the middle.

    Raises:
        ValueError: ``frame`` is after the end of the recording.
    """
    if frame > len(features):
        raise ValueError(f"the recording ends before the segment, which needs frame {frame}")
    around = np.arange(frame - FRAMES // 2, frame + FRAMES // 2 + 1)
    chosen: NDArray[np.float32] = features[around.clip(0, len(features) - 1)]
    return chosen.ravel()


def _read(
    features: Callable[[str], NDArray[np.float32]], path: Path, segment: Segment
) -> tuple[NDArray[np.float32], int]:
    return centered(features(str(path)), segment.frame), segment.label


def _transcribed(folder: Path, problems: list[str]) -> Iterator[tuple[Path, list[Segment]]]:
    """Recordings with their segments, sorted by name; add what is wrong to ``problems``."""
    files = {str(path).lower(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in sorted(files.items()):
        stem, _, kind = name.rpartition(".")
        if Path(stem).name in ("sa1", "sa2") or kind not in ("wav", "phn") or stem.endswith(".wav"):
            continue  # the last: a copy that some have next to the original
        other = {"wav": "phn", "phn": "wav"}[kind]
        if f"{stem}.{other}" not in files:
            problems.append(f"{path.with_suffix(f'.{other.upper()}')} is missing, but {path} exists")
        elif kind == "phn":
            yield files[f"{stem}.wav"], list(_segments(path, problems))


def _segments(path: Path, problems: list[str]) -> Iterator[Segment]:
    """The segments of a transcription, whose lines are `START END PHONE`."""
    for number, line in enumerate(path.read_text("latin-1").splitlines(), 1):
        match = re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(\S+)\s*", line)
        if match is None or int(match[1]) > int(match[2]):
            problems.append(f"{path} is damaged: line {number} is not 'START END PHONE'")
        elif match[3] not in PHONES:
            problems.append(
                f"{path} is damaged: line {number} has {match[3]!r}, which is not a phone of TIMIT"
            )
        else:
            yield Segment(int(match[1]), int(match[2]), PHONES.index(match[3]))


def _within(folder: Path, name: str) -> Path:
    """The entry with this name, in upper or lower case."""
    return next(
        (path for path in sorted(folder.iterdir()) if path.name.lower() == name.lower()), folder / name
    )


def _import(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"TIMIT-80 needs {package}, which cannot be imported ({error}): pip install 'feedbackhook[audio]'"
        ) from error
