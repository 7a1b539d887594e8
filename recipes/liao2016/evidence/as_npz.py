"""Put a folder of images, PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, into one file for `npz:`.

    python recipes/liao2016/evidence/as_npz.py data/cifar10-jpeg data/cifar10-jpeg.npz

Classes are numbered in alphabetical order. All images must have the same size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from PIL import Image


def main(folder: Path, output: Path) -> None:
    """Write the file.

    Args:
        folder: the folder of images.
        output: the file to write.
    """
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    arrays = {}
    for split in ("train", "test"):
        paths = [path for name in classes for path in sorted((folder / split / name).iterdir())]
        arrays[f"x_{split}"] = np.stack([np.asarray(Image.open(path)) for path in paths])
        arrays[f"y_{split}"] = np.array([classes.index(path.parent.name) for path in paths])
    np.savez(output, **arrays)
    print(f"{output}: {len(arrays['y_train'])} training and {len(arrays['y_test'])} test images, {classes}")


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
