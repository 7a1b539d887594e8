"""Make folders of Flowers17 for `imagefolder:`, with and without its validation images in the training set.

    python recipes/liao2016/evidence/flowers17_folders.py data

Reads data/flowers-17 and writes data/flowers17-680, with `trn1` of the first split for training, and
data/flowers17-1020, with `trn1` and `val1`; both are tested on `tst1`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from jsonargparse import auto_cli
from scipy.io import loadmat

FOLDERS = {"flowers17-680": ["trn1"], "flowers17-1020": ["trn1", "val1"]}


def main(data: Path) -> None:
    """Copy the images.

    Args:
        data: the folder that holds flowers-17.
    """
    splits = loadmat(str(data / "flowers-17/datasplits.mat"))
    for folder, training in FOLDERS.items():
        for split, names in {"train": training, "test": ["tst1"]}.items():
            for number in sorted(int(n) for name in names for n in splits[name].ravel()):
                kind = (number - 1) // 80  # 80 images of each class in a row
                image = Path(f"image_{number:04d}.jpg")
                target = data / folder / split / f"{kind:02d}"
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(data / "flowers-17/jpg" / image, target / image)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
