"""The paper's datasets: what they are, where they come from, and what is drawn from them.

The paper is Liao, Leibo and Poggio 2016. Where it draws classes or images at random, it does not publish
which: the draws here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    """A random choice of classes and of images from a folder of classes.

    Args:
        of: classes that the folder holds when it is whole, those in `without` not counted.
        train: training images drawn from each class.
        test: test images drawn from what is left of it; of TIMIT, from its test part.
        least_test: how few these may be where no more are left.
        least_train: how few training images may be drawn where the class has no more; None: no fewer.
        last: the class that is drawn last from the whole folder. A folder with fewer classes, where it is the
            last as well, draws the same classes; empty where it is not known, and then all must be there.
        images: in the whole folder, those in `without` not counted; None where that is not known.
        digest: of what is drawn from the whole folder, as `data_folders.digest` has it; empty where that is
            not known.
        without: folders that are no class of the draw.
        large_enough: draw from the classes alone that have images enough, first from those that have as many
            as are drawn. Else each class that is drawn must have enough.
    """

    of: int
    train: int
    test: int
    least_test: int
    without: tuple[str, ...] = ()
    large_enough: bool = False
    least_train: int | None = None
    last: str = ""
    images: int | None = None
    digest: str = ""

    @property
    def least(self) -> int:
        """Images that a class must have."""
        return (self.train if self.least_train is None else self.least_train) + self.least_test

    def training(self, count: int) -> int:
        """Of a class of ``count`` images, how many are drawn for training; what is left of it is for testing,
        at least `least_test`."""
        return min(self.train, count - self.least_test)


@dataclass(frozen=True)
class Dataset:
    """One of the paper's datasets.

    Args:
        name: what `data.name` takes.
        paper_name: its name in the paper's tables.
        network: the paper's network for it, a name of `feedbackhook.liao2016.networks.NETWORKS`.
        classes: as published, or of the paper's draw.
        train: training images.
        test: test images; of a draw, the most that there can be.
        source: its home page.
        licence: what its authors state there.
        downloads: whether torchvision can download it.
        where: its files or its folder, relative to `data.root`, as torchvision lays them out.
        draw: how its classes and images are drawn; None: the split that it comes with.
        about: whether `train` and `test` are no exact counts, since none are published.
        note: what of it is ours, or is not known to be as in the paper; shown wherever its results are.
    """

    name: str
    paper_name: str
    network: str
    classes: int
    train: int
    test: int
    source: str
    licence: str
    downloads: bool
    where: tuple[str, ...]
    draw: Draw | None = None
    about: bool = False
    note: str = ""

    @property
    def train_at_most(self) -> bool:
        """Whether there may be fewer training images than `train`."""
        return self.draw is not None and self.draw.least_train is not None

    @property
    def test_at_most(self) -> bool:
        """Whether there may be fewer test images than `test`."""
        return self.draw is not None and self.draw.least_test < self.draw.test


_NOT_STATED = "not stated by its authors"
_SEE_SOURCE = "see the source"
PAPER: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="MNIST",
            paper_name="MNIST",
            network="liao2016/mnist",
            classes=10,
            train=60_000,
            test=10_000,
            source="http://yann.lecun.com/exdb/mnist/",
            licence=_NOT_STATED,
            downloads=True,
            where=("MNIST",),
        ),
        Dataset(
            name="CIFAR10",
            paper_name="CIFAR-10",
            network="liao2016/cifar",
            classes=10,
            train=50_000,
            test=10_000,
            source="https://www.cs.toronto.edu/~kriz/cifar.html",
            licence=_NOT_STATED,
            downloads=True,
            where=("cifar-10-batches-py",),
        ),
        Dataset(
            name="CIFAR100",
            paper_name="CIFAR-100",
            network="liao2016/cifar",
            classes=100,
            train=50_000,
            test=10_000,
            source="https://www.cs.toronto.edu/~kriz/cifar.html",
            licence=_NOT_STATED,
            downloads=True,
            where=("cifar-100-python",),
        ),
        Dataset(
            name="SVHN",
            paper_name="SVHN",
            network="liao2016/svhn",
            classes=10,
            train=73_257,
            test=26_032,
            source="http://ufldl.stanford.edu/housenumbers/",
            licence="non-commercial use only",
            downloads=True,
            where=("train_32x32.mat", "test_32x32.mat"),
        ),
        Dataset(
            name="STL10",
            paper_name="STL-10",
            network="liao2016/images",
            classes=10,
            train=5_000,
            test=8_000,
            source="https://cs.stanford.edu/~acoates/stl10/",
            licence=_NOT_STATED,
            downloads=True,
            where=("stl10_binary",),
        ),
        Dataset(
            name="Caltech101",
            paper_name="Caltech101",
            network="liao2016/images",
            classes=102,  # BACKGROUND_Google is one of them
            train=102 * 30,
            test=102 * 10,
            source="https://data.caltech.edu/records/mzrjq-6wc02",
            licence="CC BY 4.0",
            downloads=True,
            where=("caltech101/101_ObjectCategories",),
            draw=Draw(of=102, train=30, test=10, least_test=1, images=9_144),
        ),
        Dataset(
            name="Caltech256-101",
            paper_name="Caltech256-101",
            network="liao2016/images",
            classes=102,
            train=102 * 30,
            test=102 * 10,
            source="https://data.caltech.edu/records/nyy15-4j048",
            licence=_NOT_STATED,
            downloads=True,
            where=("caltech256/256_ObjectCategories",),
            draw=Draw(
                of=256,
                train=30,
                test=10,
                least_test=10,
                without=("257.clutter",),
                last="088.golf-ball",
                images=29_780,
            ),
        ),
        Dataset(
            name="iCubWorld",
            paper_name="iCubWorld",
            network="liao2016/images",
            classes=10,
            train=10 * 3 * 200,
            test=2_001,  # of which all of the paper's error rates are multiples; about 200 a category
            source="https://robotology.github.io/iCubWorld/",
            licence=_SEE_SOURCE,
            downloads=False,
            where=("iCubWorld/train", "iCubWorld/test/categorization"),
            about=True,
            note="release 1.0 (Fanello et al. 2013), of whose four test sets `categorization` is read; the "
            "paper does not say which it uses.",
        ),
        Dataset(
            name="Flowers17",
            paper_name="Flowers17",
            network="liao2016/images",
            classes=17,
            train=17 * 40,
            test=17 * 20,
            source="https://www.robots.ox.ac.uk/~vgg/data/flowers/17/",
            licence=_SEE_SOURCE,
            downloads=False,
            where=("flowers-17",),
            note="the first of its three splits, without its validation images; the paper does not say which "
            "it uses, nor whether it trains on those.",
        ),
        Dataset(
            name="Flowers102",
            paper_name="Flowers102",
            network="liao2016/images",
            classes=102,
            train=1_020,
            test=6_149,
            source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
            licence=_NOT_STATED,
            downloads=True,
            where=("flowers-102",),
        ),
        Dataset(
            name="PubFig83-ID",
            paper_name="PubFig83-ID",
            network="liao2016/images",
            classes=80,
            train=80 * 85,
            test=80 * 15,
            source="http://vision.seas.harvard.edu/pubfig83/",
            licence=_SEE_SOURCE,
            downloads=False,
            where=("pubfig83",),  # pubfig83.v1
            draw=Draw(of=83, train=85, test=15, least_test=1, large_enough=True, least_train=1),
        ),
        Dataset(
            name="SUFR-W-ID",
            paper_name="SUFR-W-ID",
            network="liao2016/images",
            classes=80,
            train=80 * 10,
            test=80 * 5,
            source="http://klab.tch.harvard.edu/cbmm/other/SUFR_README.txt",
            licence=_SEE_SOURCE,
            downloads=False,
            where=("SUFR-W/SUFR_in_the_wild",),  # of SUFR 1.3, the images and the list in one folder
            draw=Draw(of=400, train=10, test=5, least_test=1, large_enough=True, least_train=1),
        ),
        Dataset(
            name="LFW-ID",
            paper_name="LFW-ID",
            network="liao2016/images",
            classes=80,
            train=80 * 10,
            test=80 * 5,
            source="http://vis-www.cs.umass.edu/lfw/",
            licence=_NOT_STATED,
            downloads=False,
            where=("lfw-py/lfw_funneled",),
            draw=Draw(
                of=5_749,
                train=10,
                test=5,
                least_test=5,
                large_enough=True,
                last="Amelie_Mauresmo",
                images=13_233,
                digest="597ee184dea96691",
            ),
        ),
        Dataset(
            name="MIT-Indoor67",
            paper_name="MIT-Indoor67",
            network="liao2016/images",
            classes=67,
            train=67 * 80,
            test=67 * 20,
            source="https://web.mit.edu/torralba/www/indoor.html",
            licence=_SEE_SOURCE,
            downloads=False,
            where=("indoorCVPR_09",),  # with the published TrainImages.txt and TestImages.txt
        ),
        Dataset(
            name="TIMIT-80",
            paper_name="TIMIT-80",
            network="liao2016/timit",
            classes=61,
            train=61 * 400,
            test=61 * 100,
            source="https://catalog.ldc.upenn.edu/LDC93S1",
            licence="licence of the Linguistic Data Consortium",
            downloads=False,
            where=("TIMIT",),
            draw=Draw(of=61, train=400, test=100, least_test=1, least_train=1),
            note="classes and features are ours, since the paper describes neither: the 61 phones of TIMIT, "
            "not 80 classes, each as 15 frames of 123 features.",
        ),
    )
}
"""By the names that `data.name` takes."""


def papers_network(dataset: str) -> str | None:
    """The paper's network for a dataset; on digits that for MNIST. None where the paper has none."""
    known = PAPER.get("MNIST" if dataset == "digits" else dataset)
    return None if known is None else known.network
