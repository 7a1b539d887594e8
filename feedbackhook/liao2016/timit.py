"""TIMIT-80: phones, each as 15 frames of 123 features of the speech around it.

Liao, Leibo and Poggio 2016 classify 80 classes by 1,845 features, and describe neither; both are chosen here.

- Classes: the 61 phones with which TIMIT is transcribed, silences and closures among them. Nothing published
  says what the paper's 80 are, so no other classes are made up.
- Samples: segments of the transcription (.PHN), 400 of each phone from the speakers of TRAIN and 100 from
  those of TEST, in a fixed random draw. The rare phones (such as `eng`) have fewer. The two sentences that
  all speakers read (SA1, SA2) are left out, as is usual.
- Features, as in Mohamed, Dahl and Hinton 2012 and Graves, Mohamed and Hinton 2013: 40 logarithmic mel bands
  and the logarithmic energy of frames of 25 ms every 10 ms, with their first and second differences; 15 such
  frames, the middle one at the middle of the segment, the first or last frame repeated where the recording
  ends. 15 x 123 = 1,845, which is the paper's number.
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
from feedbackhook.experiments.data.folders import ranked
from feedbackhook.experiments.data.items import Item, Sources, root, way_out
from feedbackhook.experiments.data.registry import Dataset

RATE = 16_000  # samples a second
WINDOW, STEP = 400, 160  # samples of a frame, and from one to the next: 25 ms, 10 ms
BANDS, FRAMES = 40, 15
_FLOOR = 1e-10  # of power, which has a logarithm then
_RECORDINGS = {"train": 3_696, "test": 1_344}  # without SA1 and SA2: 8 each of 462 and of 168 speakers
_REACH = 2  # frames on either side from which a difference is taken

_LABELS = (
    "aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h# hh hv ih ix iy "
    "jh k kcl l m n ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z zh"
)
PHONES: tuple[str, ...] = tuple(_LABELS.split())
"""The 61 labels of TIMIT's transcriptions; a class is a place in this list."""


class Segment(NamedTuple):
    """A phone of a recording: its first sample and that behind its last, and its class."""

    start: int
    end: int
    label: int

    @property
    def frame(self) -> int:
        """The frame whose middle is nearest to the segment's."""
        return round((self.start + self.end) / 2 / STEP)


def timit(dataset: Dataset, config: DataConfig) -> Sources:
    """TIMIT as the Linguistic Data Consortium publishes it (LDC93S1): TRAIN/DIALECT/SPEAKER/SENTENCE.WAV with
    SENTENCE.PHN, and TEST alike, in any case. The recordings are NIST SPHERE or RIFF.

    Raises:
        ConfigError: librosa or soundfile is not installed.
    """
    assert dataset.draw is not None
    draw, folder = dataset.draw, root(config) / dataset.where[0]
    for package in ("librosa", "soundfile"):
        _import(package)
    if not folder.is_dir():
        return Sources(faults=[f"{folder} is missing"], way_out=way_out(config, False, None, dataset.source))
    found = Sources(way_out=f"copy TIMIT anew ({dataset.source}) into the place of {folder}")
    features = lru_cache(maxsize=4)(utterance)  # items of one recording follow one another
    every: list[Item] = []
    splits: dict[str, list[Item]] = {}
    for part, split in enumerate(("train", "test")):
        by_phone: dict[str, list[Item]] = {phone: [] for phone in PHONES}
        place = _within(folder, split.upper())
        if not place.is_dir():
            found.faults.append(f"{place} is missing")
            continue
        transcribed = list(_transcribed(place, found.faults))
        if len(transcribed) < _RECORDINGS[split]:
            found.differs.append(
                f"{place} holds {len(transcribed):,} of the {_RECORDINGS[split]:,} recordings that were "
                "published; other segments are drawn than from the whole set"
            )
        for recording, segments in transcribed:
            for segment in segments:
                name = f"{recording} ({PHONES[segment.label]} at {segment.start})"
                item = Item(name, partial(_read, features, recording, segment), segment.label)
                by_phone[PHONES[segment.label]].append(item)
        wanted, drawn = (draw.train, draw.test)[part], set()
        for phone, items in by_phone.items():
            names = ranked((item.name.lower() for item in items), f"{folder}/".lower())
            drawn |= set(names[:wanted])
            if 0 < len(items) < wanted:
                found.short.append(f"{place} holds {len(items)} segments of {phone} in the place of {wanted}")
            elif not items:
                found.faults.append(f"{place} holds no segment of {phone}")
            every += items
        splits[split] = sorted(
            (item for items in by_phone.values() for item in items if item.name.lower() in drawn),
            key=lambda item: item.name,
        )
    found.folder = sorted(every, key=lambda item: item.name)
    if not found.faults:
        found.splits = splits
    return found


def utterance(path: str) -> NDArray[np.float32]:
    """The features (T, 123) of a recording's T frames.

    Of frame t, around sample 160 t, the 400 samples under Hann's window, zeros beyond the ends; the powers of
    their spectrum in 40 mel bands (Slaney's, from 0 to 8 kHz) and in sum, to the natural logarithm, are c_t;
    the differences are d_t = sum_n n (c_{t+n} - c_{t-n}) / (2 sum_n n^2) with n = 1, 2 (as in HTK), and those
    of d.

    Raises:
        ValueError: it is no recording, or not one of 16 kHz and one channel.
    """
    librosa, soundfile = _import("librosa"), _import("soundfile")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(str(error)) from error
    if rate != RATE or samples.shape[1] != 1 or len(samples) < WINDOW:
        shape = f"{len(samples)} samples of {samples.shape[1]} channel(s) at {rate} Hz"
        raise ValueError(f"it holds {shape}, not one channel at {RATE} Hz")
    spectrum = librosa.stft(samples[:, 0], n_fft=WINDOW, hop_length=STEP, window="hann", pad_mode="constant")
    power = np.abs(spectrum) ** 2
    bands = librosa.feature.melspectrogram(S=power, sr=RATE, n_fft=WINDOW, n_mels=BANDS)
    static = np.log(np.maximum(np.vstack([bands, power.sum(0)]), _FLOOR))
    difference = partial(librosa.feature.delta, width=2 * _REACH + 1, order=1, mode="nearest")
    first = difference(static)
    features: NDArray[np.float32] = np.vstack([static, first, difference(first)]).T.astype(np.float32)
    return features


def centred(features: NDArray[np.float32], frame: int) -> NDArray[np.float32]:
    """The features of 15 frames, one after the other, of which ``frame`` is the middle one.

    Raises:
        ValueError: it is later than the recording's end.
    """
    if frame > len(features):
        raise ValueError(f"the recording ends before the segment: it has no frame {frame}")
    around = np.arange(frame - FRAMES // 2, frame + FRAMES // 2 + 1)
    chosen: NDArray[np.float32] = features[around.clip(0, len(features) - 1)]
    return chosen.ravel()


def _read(
    features: Callable[[str], NDArray[np.float32]], path: Path, segment: Segment
) -> tuple[NDArray[np.float32], int]:
    return centred(features(str(path)), segment.frame), segment.label


def _transcribed(folder: Path, faults: list[str]) -> Iterator[tuple[Path, list[Segment]]]:
    """Recordings with their segments, in the order of their names; what is amiss joins ``faults``."""
    files = {str(path).lower(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in sorted(files.items()):
        stem, _, kind = name.rpartition(".")
        if Path(stem).name in ("sa1", "sa2") or kind not in ("wav", "phn") or stem.endswith(".wav"):
            continue  # the last: a copy that some have beside the original
        other = {"wav": "phn", "phn": "wav"}[kind]
        if f"{stem}.{other}" not in files:
            faults.append(f"{path.with_suffix(f'.{other.upper()}')} is missing; {path} is there")
        elif kind == "phn":
            yield files[f"{stem}.wav"], list(_segments(path, faults))


def _segments(path: Path, faults: list[str]) -> Iterator[Segment]:
    """Those of a transcription, whose lines are `START END PHONE`."""
    for number, line in enumerate(path.read_text("latin-1").splitlines(), 1):
        match = re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(\S+)\s*", line)
        if match is None or int(match[1]) > int(match[2]):
            faults.append(f"{path} is damaged: line {number} is not 'START END PHONE'")
        elif match[3] not in PHONES:
            faults.append(f"{path} is damaged: line {number} has {match[3]!r}, which is no phone of TIMIT's")
        else:
            yield Segment(int(match[1]), int(match[2]), PHONES.index(match[3]))


def _within(folder: Path, name: str) -> Path:
    """The entry of this name, in whatever case."""
    return next(
        (path for path in sorted(folder.iterdir()) if path.name.lower() == name.lower()), folder / name
    )


def _import(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"TIMIT-80 is read by {package}, which cannot be imported ({error}): "
            "pip install 'feedbackhook[audio]'"
        ) from error
