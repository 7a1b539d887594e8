"""The commands of each page: those of `feedbackhook` run, on small data; what others name exists."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from PIL import Image
from support import trees
from support.documents import PAGES, blocks, commands, name_of, pages_with
from support.paths import ROOT

from feedbackhook.cli import main
from feedbackhook.cli.commands import COMMANDS
from feedbackhook.cli.parsers import build_parser, config_first, config_from
from feedbackhook.experiments.config import SweepConfig
from feedbackhook.experiments.sweep.grid import plan
from feedbackhook.store.recorder import Recorder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BRIEF = [
    "--protocol.epochs",
    "1",
    "--protocol.device",
    "cpu",
    "--record.figures",
    "false",
    "--data.cache",
    "none",
]
SMALL = {
    "MNIST": ["--protocol.batch_size", "10"],
    "imagefolder:PATH": [
        "--protocol.batch_size",
        "2",
        "--model.name",
        "timm/test_resnet",
        "--data.size",
        "32",
    ],
}
"""What suits the small copies of datasets."""

PROFILED = ["--batch_size", "1"]

GIVEN = {
    "runs/concordance": "analysis/runs/concordance",
    "runs/experiment_a-digits": "analysis/runs/evidence/mnist",
    "runs/signs": "analysis/runs/concordance",
}
"""Runs that earlier commands of a page take minutes to make, and runs in the repository like them."""

LINES = {" ".join(words): (name_of(page), words) for page in reversed(PAGES) for words in commands(page)}
"""The words of each command line, and the first page that has it."""

OURS = {line: words for line, (_, words) in LINES.items() if words[0] == "feedbackhook"}
OTHERS = {line: words for line, (_, words) in LINES.items() if words[0] != "feedbackhook"}
RUN = [line for line in OURS if LINES[line][0].startswith(("README", "docs")) and OURS[line][1] != "sweep"]
RUN.sort(key=lambda line: OURS[line][1] != "train")  # others use the runs that it leaves


SAVED = {
    name: text
    for page in PAGES
    for name, text in re.findall(
        r"Save\s+this as `([\w.]+)`:\n\n```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
}
"""Files that a page says to save."""

PARSER = cache(build_parser)


def parsed(words: list[str]) -> Namespace:
    """Parse a command of `feedbackhook`, configuration files included."""
    parser = PARSER(COMMANDS)
    return parser.instantiate(parser.parse_args(config_first(COMMANDS, words[1:])))


@pytest.mark.parametrize("line", sorted(OURS.keys() - set(RUN)))
def test_options_and_files_exist(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of commands that take minutes or data."""
    saved = tmp_path / "saved.yaml"
    saved.write_text(SAVED.get(OURS[line][2], ""))
    monkeypatch.chdir(ROOT)
    parsed([str(saved) if word in SAVED else word for word in OURS[line]])


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("more", [[], ["--small", "digits"]], ids=" ".join)
def test_a_sweep_that_a_page_says_to_save_can_run(name: str, more: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(SAVED[name])
    config = config_from(SweepConfig, parsed(["feedbackhook", "sweep", str(path), *more])["sweep"])
    assert all(run.resolved.output for run in plan(config))


def test_an_option_that_does_not_exist_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match="concordanse"):
        parsed(["feedbackhook", "train", "--feedback.concordanse", "1"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a clone with some data, in which earlier commands have left their runs."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("recipes", "analysis"):
        (folder / name).symlink_to(ROOT / name)
    for name, like in GIVEN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copytree(ROOT / like, folder / name)
    (folder / "data").mkdir()
    for split in ("train", "test"):
        for kind in "ab":
            image = folder / "PATH" / split / kind / "0.png"
            image.parent.mkdir(parents=True)
            Image.effect_noise((20, 20), 50).convert("RGB").save(image)
    with Recorder(folder / "runs/resnet18") as recorder:
        recorder.add(0, 0, "error_angle", 90.0, "fc", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trees.mnist(folder / "data", patch)
        trees.caltech101(folder / "data", patch)
        yield folder


def test_commands_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, since some use what others leave: see `RUN`."""
    failed = {}
    for line in RUN:
        words = fitted(OURS[line][1:])
        if "--help" in words:
            with pytest.raises(SystemExit):
                main(words)
            status = 0
        else:
            status = main(words)
        printed = capsys.readouterr()
        if status or not printed.out:
            failed[line] = printed.err or "nothing was printed"
    assert failed == {}


def fitted(words: list[str]) -> list[str]:
    """The words of a command, with options that fit the small data."""
    if words[0] == "train" and "--help" not in words:
        fitting = [option for name, options in SMALL.items() if name in words for option in options]
        return [*without(words, "--data.download", "--model.weights"), *BRIEF, *fitting]
    if words[0] == "profile":
        return [words[0], "timm/test_resnet", *words[2:], *PROFILED]
    if words[0] == "plot":
        whole = "--figures" in words or "resnet18" in words[1]
        return [*words, "--formats", "[png]", *([] if whole else ["--figures", "[error]"])]
    return words


def without(words: list[str], *options: str) -> list[str]:
    """Without options that need a network, and their values."""
    left_out = {i + k for i, word in enumerate(words) if word in options for k in (0, 1)}
    return [word for i, word in enumerate(words) if i not in left_out]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("line", OTHERS)
def test_what_other_commands_name_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = OTHERS[line]
    if program == "make":
        assert words[0] in TARGETS
    elif program == "pip":
        assert words[:2] == ["install", "-e"]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
        assert extras is not None
        assert set((extras[1] or "").split(",")) <= {"", *PROJECT["optional-dependencies"]}
    elif program == "dask":
        assert words[0] in {found.name for found in importlib.metadata.entry_points(group="dask_cli")}
    elif program == "torchrun" and words[2:4] == ["-m", "feedbackhook"]:
        parsed(words[3:])
    else:
        assert program in ("python", "torchrun")
        at_file = 2 if program == "torchrun" else 0
        script_takes(words[at_file], words[at_file + 1 :])


def script_takes(script: str, options: list[str]) -> None:
    """The first part of an option is a parameter of the script, a field of what it takes, or of a sweep."""
    assert Path(script).is_file()
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(script).parent.glob("*.py"))
    known = {
        *re.findall(r"\b(\w+):", sources),
        *re.findall(r"--(\w+)", sources),
        *SweepConfig.__dataclass_fields__,
    }
    for option in options:
        if option.startswith("--"):
            assert option[2:].partition(".")[0] in known, option


@pytest.mark.parametrize("page", pages_with("yaml"), ids=name_of)
def test_yaml_is_a_sweeps(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language != "yaml":
            continue
        given = {"conditions": ["SGD"], "datasets": ["digits"], **yaml.safe_load(block.text)}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        config = config_from(SweepConfig, parsed(["feedbackhook", "sweep", str(path)])["sweep"])
        assert list(config.conditions) == list(given["conditions"])
