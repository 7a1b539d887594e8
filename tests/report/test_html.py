"""A sweep's page: what it holds, and in a browser what it does."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import yaml
from support.run_folders import leave_run

from feedbackhook import Recorder
from feedbackhook.cli import main
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import ConfigError, RunConfig, SweepConfig, SweepProtocolConfig
from feedbackhook.experiments.stored import check_same
from feedbackhook.experiments.sweep.grid import PlannedRun, plan
from feedbackhook.liao2016.published import error_rates
from feedbackhook.report import theme
from feedbackhook.report.html import charts
from feedbackhook.report.html.page import page, write
from feedbackhook.report.tables import COLOURS, MARKS, sweep_table

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FOLDER = "imagefolder:/data/<script>window.injected=1</script>/birds"  # a name that would be a script
CONDITIONS = [
    "SGD",
    "BN+BM",
    "brSF+BN+BM concordance=0.5",
    "brSF+BN+BM",
    "frSF+BN+BM concordance=0.5",
    "frSF+BN+BM concordance=1",
]
REASON = "</script><script>window.injected=1</script><img src=x onerror='window.injected=1'> & disk full"
FAILED, UNBEGUN = "MNIST-BN+BM-rate0.1-seed0", "birds-BN+BM-rate0.1-seed1"


def make(folder: Path, conditions: list[str], datasets: list[str], **protocol: Any) -> list[PlannedRun]:
    """The plan of a sweep whose runs are yet to be left in their folders."""
    config = SweepConfig(conditions, datasets, protocol=SweepProtocolConfig(**protocol), output=str(folder))
    config.model.name = "liao2016/mnist"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(asdict(config)))
    return plan(config)


def add_angles(run: PlannedRun, epochs: int) -> None:
    """What a run records of layers beside what `leave_run` does."""
    with Recorder(run.folder.path) as recorder:
        for epoch in range(1, epochs + 1):
            for depth, layer in enumerate(("conv1", "fc2")):
                value = 80.0 - epoch if depth else float("nan")  # the first layer has none
                recorder.add(10 * epoch, epoch, "error_angle", value, layer, depth)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rates and seeds of two epochs on two datasets: one run failed, one is not begun, one was made with
    another version of torch, and there is a folder of no planned run."""
    path = tmp_path_factory.mktemp("html") / "sweep"
    for place, run in enumerate(
        make(path, CONDITIONS, ["MNIST", FOLDER], epochs=2, lr_factors=[1.0, 0.1], seeds=2)
    ):
        if run.name == UNBEGUN:
            continue
        error = 1 + (7 * place) % 31 + run.seed / 3
        leave_run(run.config, [(90.0, 90.0), (2 * error, 50.0), (error, 40.0)], 2)
        if run.name == FAILED:
            result = run.folder.result()
            assert result is not None
            result.status, result.reason = "failed", REASON
            run.folder.write_result(result)
        elif "SF" in run.condition and run.rate == 0.1:
            add_angles(run, 2)
    other = path / "MNIST-SGD-rate1-seed0" / "config.yaml"
    content = yaml.safe_load(other.read_text())
    content["provenance"]["versions"]["torch"] = "2.8.0+other"
    other.write_text(yaml.safe_dump(content))
    shutil.copytree(path / "MNIST-SGD-rate1-seed0", path / "<b>old<b>")
    return path


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return page(folder)


class Parsed(HTMLParser):
    """Elements with their attributes, and the text within those that the tests look into."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}  # by the id of the element or section
        self.cells: dict[tuple[str | None, str | None], str] = {}
        self.headings: list[str] = []
        self._path: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self._path.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._path.pop()[0] == tag, "elements are nested and closed"

    def handle_data(self, data: str) -> None:
        if self._path and self._path[-1][0] in ("h1", "h2"):
            self.headings.append(data)
        for tag, attributes in self._path:
            if tag == "b" and ("td", attributes) != self._path[-2]:
                cell = self._path[-2][1]
                place = (cell["data-condition"], cell["data-dataset"])
                self.cells[place] = self.cells.get(place, "") + data
            for name in ("id", "aria-labelledby"):
                if key := attributes.get(name):
                    self.texts[key] = self.texts.get(key, "") + data


@pytest.fixture(scope="module")
def parsed(html: str) -> Parsed:
    return Parsed(html)


def csv(parsed: Parsed, name: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(json.loads(parsed.texts["data"])[name]))


def test_the_sections_come_in_order_and_the_page_says_what_it_is(parsed: Parsed) -> None:
    assert parsed.headings == [
        "sweep",
        "Summary",
        "Error by condition and dataset",
        "Error against concordance",
        "Learning curves",
        "Alignment by layer",
        "Runs",
        "Left out",
    ]
    elements = dict(parsed.elements)
    assert elements["html"] == {"lang": "en"}
    names = {attributes.get("name"): attributes for tag, attributes in parsed.elements if tag == "meta"}
    assert names["viewport"]["content"] == "width=device-width, initial-scale=1"
    assert all("scope" in attributes for tag, attributes in parsed.elements if tag == "th")
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"]) for tag, attributes in parsed.elements if tag == "a"]
    assert {link[1:] for link in links} <= set(ids)


def test_nothing_is_asked_of_the_network(html: str, parsed: Parsed) -> None:
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "iframe", "img", "object", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "import " not in html[html.rindex("<script") :]
    assert "default-src 'none'" in html  # so that a browser refuses what these lines may have missed


def test_the_grid_holds_the_numbers_marks_and_colours_of_the_table(
    folder: Path, html: str, parsed: Parsed
) -> None:
    cells = sweep_table(folder).cells
    assert len(parsed.cells) == len(cells) == 12
    for cell in cells.to_dict("records"):
        star = "" if cell["ended"] == cell["runs"] else " *"
        text = f"{cell['best_error']:.2f}{MARKS[cell['class_of_best']]}{star}"
        assert parsed.cells[cell["condition"], cell["dataset"]] == text
    assert sum(text.endswith("*") for text in parsed.cells.values()) == 2
    errors = parsed.texts["errors"]
    for cell in cells.to_dict("records"):
        for name in ("best", "chosen"):
            assert f"[{cell[f'{name}_low']:.2f}, {cell[f'{name}_high']:.2f}]" in errors
        assert f"chosen {cell['chosen_error']:.2f}" in errors
    sgd = cells.iloc[0]
    assert f"paper 0.67 ({sgd['difference']:+.2f})" in errors
    assert "3 of 4 runs" in errors
    assert {f".{kind} {{ background: {colour};" in html for kind, colour in COLOURS.items()} == {True}


def test_the_summary_says_what_was_run_and_how_to_run_it_again(folder: Path, parsed: Parsed) -> None:
    summary = " ".join(parsed.texts["summary"].split())
    assert "48 runs are planned: 46 finished, 1 failed, 1 not begun. 2 of them are in no figure" in summary
    for words in ("Epochs 2", "0.0005 × 1, 0.1", "Seeds 0, 1", "mini-batch 100", "Held out 10%"):
        assert words in summary
    assert f"feedbackhook sweep {folder}/sweep.yaml --output {folder}-again" in summary
    assert "they differ between runs" in summary
    assert "2.8.0+other in 1 run MNIST-SGD-rate1-seed0" in summary


def test_runs_of_the_same_origin_are_not_said_to_differ(tmp_path: Path) -> None:
    for run in make(tmp_path, ["SGD", "BN"], ["MNIST"], epochs=1, lr_factors=1):
        leave_run(run.config, [(90.0, 90.0), (5.0, 5.0)], 1)
    summary = Parsed(page(tmp_path)).texts["summary"]
    assert "the same in all runs" in summary
    assert "differ" not in summary
    assert "All are in the figures" in summary


def test_the_summary_tells_of_other_batch_sizes(tmp_path: Path) -> None:
    make(tmp_path, ["uSF+BM"], ["MNIST"], epochs=4, lr_factors=1)
    assert "100; uSF+BM also 100, 500 after epoch 3" in Parsed(page(tmp_path)).texts["summary"]


def test_names_and_reasons_are_text_and_nothing_else(html: str, parsed: Parsed) -> None:
    assert "<script>window" not in html
    assert [tag for tag, _ in parsed.elements].count("script") == 4
    assert REASON in parsed.texts["left-out"]
    assert "<b>old<b>: sweep.yaml does not plan it" in parsed.texts["left-out"]
    assert REASON in parsed.texts["runs"]
    assert set(csv(parsed, "runs")["dataset"]) == {"MNIST", FOLDER}


def test_whatever_is_left_out_is_named(folder: Path, parsed: Parsed) -> None:
    missing = sweep_table(folder).missing
    assert set(missing) == {FAILED, UNBEGUN, "<b>old<b>"}
    for run, reason in missing.items():
        assert f"{run}: {reason}" in parsed.texts["left-out"]


def test_each_run_has_its_configuration_and_a_command_that_repeats_it(
    folder: Path, parsed: Parsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = parsed.texts["runs"]
    planned = plan(sweep_table(folder).config)
    for run in planned:
        assert run.name in details
    run = next(run for run in planned if run.name == "MNIST-frSF+BN+BM-concordance=0.5-rate0.1-seed1")
    assert (run.folder.path / "config.yaml").read_text() in details
    name, *arguments = shlex.split(
        next(line for line in details.splitlines() if f"{run.name}/config" in line)
    )
    given: list[RunConfig] = []

    def keep(config: RunConfig, **_: Any) -> None:
        given.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("feedbackhook.experiments.training.run.train", keep)
    assert name == "feedbackhook"
    assert main(arguments) == 2
    assert given[0].output == f"{run.folder.path}-again"
    check_same(run.folder, given[0])  # which leaves out where it goes


def test_the_command_of_the_sweep_is_that_sweep_in_another_folder(
    folder: Path, parsed: Parsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [shlex.split(line) for line in parsed.texts["summary"].splitlines() if "sweep.yaml" in line]
    given: list[SweepConfig] = []
    monkeypatch.setattr(
        "feedbackhook.experiments.sweep.run.sweep", lambda config, *_: given.append(config) or {}
    )
    for line in lines:
        assert main(line[1:]) == 0
    again, on = given
    assert again.output == f"{folder}-again"
    assert on == sweep_table(folder).config
    assert [run.name for run in plan(again)] == [run.name for run in plan(on)]


def test_the_concordance_curve_is_the_tables_and_the_papers(folder: Path, parsed: Parsed) -> None:
    points = csv(parsed, "concordance")
    ours = points[points["source"] == "measured"]
    cells = sweep_table(folder).cells.set_index(["dataset", "condition"])
    for series, concordance, condition in (
        ("brSF+BN+BM", 0.5, CONDITIONS[2]),
        ("brSF+BN+BM", 1.0, CONDITIONS[3]),  # which says nothing of it
        ("frSF+BN+BM", 1.0, CONDITIONS[5]),
    ):
        for dataset in ("MNIST", FOLDER):
            where = (ours["series"] == series) & (ours["concordance"] == concordance)
            point = ours[where & (ours["dataset"] == dataset)].iloc[0]
            cell = cells.loc[(dataset, condition)]
            for name, column in (("error", "best_error"), ("low", "best_low"), ("high", "best_high")):
                assert point[name] == pytest.approx(cell[column], rel=1e-3)
    theirs = points[points["source"] != "measured"]
    assert set(theirs["dataset"]) == {"MNIST"}
    assert len(theirs) == 10
    fixed = theirs[theirs["series"] == "frSF+BN+BM"].set_index("concordance")["error"]
    assert fixed[0.25] == error_rates().loc["frSF+BN+BM concordance=0.25", "MNIST"]
    assert f"The paper has no curve for {FOLDER}." in parsed.texts["over-concordance"]


@pytest.mark.parametrize(
    ("conditions", "known"),
    [(["SGD", "uSF"], "none, neither brSF nor frSF"), (["SGD", "frSF", "brSF"], "a single one, 1.")],
)
def test_fewer_than_two_concordances_have_no_curve_and_a_sentence(
    tmp_path: Path, conditions: list[str], known: str
) -> None:
    for run in make(tmp_path, conditions, ["MNIST"], epochs=1, lr_factors=1):
        leave_run(run.config, [(90.0, 90.0), (5.0, 5.0)], 1)
    parsed = Parsed(page(tmp_path))
    assert f"it takes two, and the sweep has {known}" in parsed.texts["over-concordance"]
    assert "concordance" not in json.loads(parsed.texts["specifications"])


def test_the_curves_are_those_of_the_runs_and_best_is_the_tables_rate(folder: Path, parsed: Parsed) -> None:
    runs, points = csv(parsed, "runs"), csv(parsed, "curves")
    rate = sweep_table(folder).cells.set_index(["dataset", "condition"])["rate"]
    for run in runs.to_dict("records"):
        assert run["best"] == (rate[run["dataset"], run["condition"]] == run["rate"])
    assert points["r"].nunique() == 46
    one = points[points["r"] == runs.index[runs["run"] == "MNIST-SGD-rate0.1-seed0"][0]]
    stored = sweep_table(folder).cells
    assert one["epoch"].tolist() == [0, 1, 2]
    assert one["test_error"].tolist()[0] == 90.0
    assert one["test_error"].min() >= stored["best_low"].min()


def test_the_angles_are_those_of_the_runs(folder: Path, parsed: Parsed) -> None:
    angles, layers = csv(parsed, "angles"), csv(parsed, "layers")
    assert layers["layer"].tolist() == ["conv1", "fc2"]
    last = angles[(angles["epoch"] == 2) & (angles["l"] == 1)]
    assert set(last["error_angle"].dropna()) == {78.0}
    assert set(last["weight_angle"]) == {46.0}
    assert angles.loc[angles["l"] == 0, "error_angle"].isna().all()
    note = parsed.texts["layers"]
    assert "have no point: 32." in note  # one layer, two epochs, sixteen runs
    assert "Without error angles: MNIST-brSF+BN+BM-concordance=0.5-rate1-seed0" in note


def test_axes_are_labelled_with_their_units(parsed: Parsed) -> None:
    titles = {
        name: [_axis(chart, "x"), _axis(chart, "y")]
        for name, chart in json.loads(parsed.texts["specifications"]).items()
    }
    assert titles == {
        "concordance": ["concordance (probability of the same sign)", "best test error [%]"],
        "test_error": ["epoch", "test error [%]"],
        "train_error": ["epoch", "training error [%]"],
        "weight_angle": ["epoch", "weight angle [°]"],
        "error_angle": ["epoch", "error angle [°]"],
    }


def _axis(chart: dict[str, Any], axis: str) -> str:
    encodings = [layer["encoding"] for layer in chart.get("layer", [chart])]
    title: str = next(encoding[axis]["title"] for encoding in encodings if axis in encoding)
    return title


def test_conditions_have_their_rules_colours_and_no_two_look_alike() -> None:
    names = list(error_rates().index)
    rules = [Condition.parse(name).feedback or theme.BACKPROP for name in names]
    looks = dict(zip(names, charts._looks(rules), strict=True))
    assert len(set(looks.values())) == len(names)
    assert looks["SGD"][0] == theme.RULES[theme.BACKPROP].colour
    assert looks["brSF+BN+BM"][0] == theme.RULES["brSF"].colour


def test_long_curves_are_thinned_and_it_is_said(tmp_path: Path) -> None:
    runs = make(tmp_path, ["uSF"], ["MNIST"], epochs=300, lr_factors=1)
    leave_run(runs[0].config, [(90.0, 90.0), *((float(e), 5.0) for e in range(1, 301))], 300)
    parsed = Parsed(page(tmp_path))
    epochs = csv(parsed, "curves")["epoch"]
    assert len(epochs) == 100
    assert (epochs.min(), epochs.max()) == (0, 300)
    assert set(np.diff(epochs)) == {3, 4}
    assert "of up to 301, at most 100 are drawn" in parsed.texts["learning"]
    assert csv(parsed, "angles").groupby("l").size().tolist() == [30, 30]


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    runs = make(tmp_path, ["SGD", "BN", "BN+BM"], ["MNIST"], epochs=1, lr_factors=1)
    for run in runs:
        leave_run(run.config, [(90.0, 90.0), (5.0, 5.0)], 1)
    part = runs[0].folder.path / "metrics" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    (runs[1].folder.path / "status.json").write_text("{")
    parsed = Parsed(page(tmp_path))
    assert "3 runs are planned: 2 finished, 1 damaged. 2 of them" in " ".join(parsed.texts["summary"].split())
    assert "part-00000.parquet" in parsed.texts["left-out"]
    assert "status.json is damaged" in parsed.texts["left-out"]
    assert "status.json is damaged" in parsed.texts["runs"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_sweep_of_which_no_run_has_ended_says_so_by_name(tmp_path: Path, begun: bool) -> None:
    runs = make(
        tmp_path / "sweep", ["SGD", "frSF", "frSF concordance=0.5"], ["MNIST"], epochs=2, lr_factors=1
    )
    if begun:
        leave_run(runs[0].config, [(90.0, 90.0)], 2, "running")
    parsed = Parsed(page(tmp_path / "sweep"))
    assert "None of them has ended" in parsed.texts["summary"]
    assert "No learning curves" in parsed.texts["learning"]
    assert "No alignment angles" in parsed.texts["layers"]
    assert "no run of brSF or frSF has an error" in parsed.texts["over-concordance"]
    assert set(parsed.cells.values()) == {"- *"}
    for run in runs:
        why = "running after 0 epochs" if begun and run == runs[0] else "not begun"
        assert f"{run.name}: {why}" in parsed.texts["left-out"]


def test_the_command_writes_the_page(
    folder: Path, html: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "report.html"
    for option in ("-o", "--output"):
        assert main(["report", str(folder), option, str(path)]) == 0
        assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text(encoding="utf-8") == html
    assert main(["report", str(folder), "-o", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "nothing: ["], ids=repr)
def test_what_is_no_sweep_is_one_clear_error(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "sweep.yaml").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert ("holds no sweep" if content is None else "sweep.yaml is damaged") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_without_altair_the_extra_to_install_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("html", "charts"):
        monkeypatch.delitem(sys.modules, f"feedbackhook.report.{module}")
    monkeypatch.setitem(sys.modules, "altair", None)
    assert main(["report", str(folder)]) == 2
    assert "pip install 'feedbackhook[analysis]'" in capsys.readouterr().err


def test_500_runs_of_65_epochs_stay_below_5_megabytes(tmp_path: Path) -> None:
    conditions = ["SGD", "BN+BM", "uSF+BN+BM", *CONDITIONS[2:], "RndF", "RndF+BN+BM", "uSF"]
    runs = make(tmp_path / "sweep", conditions, ["MNIST"], epochs=65, lr_factors=5, seeds=10)
    first, *others = runs
    leave_run(first.config, [(90.1, 90.0), *((1234 / (e + 17), 5.0) for e in range(65))], 65)
    rng = np.random.default_rng(0)
    with Recorder(first.folder.path) as recorder:
        for epoch, depth in np.ndindex(65, 5):
            for metric in ("weight_angle", "error_angle"):
                recorder.add(epoch, epoch, metric, rng.uniform(10, 99), f"stages.{depth}.conv", depth)
    for run in others:
        shutil.copytree(first.folder.path, run.folder.path)
    path = write(tmp_path / "sweep", tmp_path / "report.html")
    assert len(runs) == 500
    assert csv(Parsed(path.read_text(encoding="utf-8")), "angles")["r"].nunique() == 500
    assert path.stat().st_size < 5e6


MARKS_OF = """
const found = [];
const walk = item => {
  if (item.items) for (const child of item.items) {
    if (item.marktype === "symbol" && child.datum && "epoch" in child.datum) found.push({...child.datum});
    walk(child);
  }
};
walk(window.views[arguments[0]].scenegraph().root);
return found;
"""
"""Of a chart the data of its points, as they are drawn."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: chromium and chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(paths[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(paths[1])) as browser:
        yield browser


@pytest.fixture(scope="module")
def url(html: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path.as_uri()


def drawn(browser: Chrome) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return window.drawn === true"))


@pytest.fixture
def opened(browser: Chrome, url: str) -> Chrome:
    """The page as it is when it has just been opened: 1280 pixels wide, light."""
    emulate(browser, 1280, "light")
    browser.get(url)
    drawn(browser)
    return browser


def emulate(browser: Chrome, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def choose(browser: Chrome, chart: str, name: str, label: str) -> None:
    """In a select of the controls that belong to a chart."""
    from selenium.webdriver.support.ui import Select

    controls = browser.execute_script(f"return document.getElementById('{chart}').dataset.controls")
    element = browser.find_element("css selector", f"#{controls} select[name={name}]")
    Select(element).select_by_visible_text(label)
    browser.execute_async_script(
        "const run = () => Promise.all(Object.values(window.views).map(view => view.runAsync()));"
        "run().then(run).then(() => arguments[0]())"  # a chart that follows has its turn after the first
    )


def test_a_browser_draws_every_chart_and_has_nothing_to_complain_about(opened: Chrome) -> None:
    assert [entry["message"] for entry in opened.get_log("browser")] == []
    assert set(opened.execute_script("return Object.keys(window.views)")) == {
        "concordance",
        *charts.ERRORS,
        *charts.ANGLES,
    }
    assert opened.execute_script("return window.injected") is None
    assert len(opened.find_elements("css selector", "script")) == 4
    inks = opened.execute_script(
        "return [...document.querySelectorAll('canvas')].map(canvas => new Set(canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data).size)"
    )
    assert len(inks) == 5
    assert min(inks) > 50  # shades: something is drawn


def test_a_browser_shows_the_tables_numbers(opened: Chrome, folder: Path) -> None:
    shown = opened.execute_script(
        "return [...document.querySelectorAll('td[data-condition]')].map(cell => [cell.dataset.condition, "
        "cell.dataset.dataset, cell.querySelector('b').innerText, getComputedStyle(cell).backgroundColor])"
    )
    cells = {(condition, dataset): (text, colour) for condition, dataset, text, colour in shown}
    for cell in sweep_table(folder).cells.to_dict("records"):
        text, colour = cells[cell["condition"], cell["dataset"]]
        assert float(text.split()[0]) == round(cell["best_error"], 2)
        r, g, b = bytes.fromhex(COLOURS[cell["class_of_best"]][1:])
        assert colour == f"rgb({r}, {g}, {b})"


def test_selects_filter_both_learning_curves(opened: Chrome, folder: Path) -> None:
    conditions = {datum["condition"] for datum in opened.execute_script(MARKS_OF, "test_error")}
    assert conditions == set(CONDITIONS)
    cell = sweep_table(folder).cells.set_index(["dataset", "condition"]).loc[("MNIST", "SGD")]
    choose(opened, "test_error", "condition", "SGD")
    for metric, epochs in (("test_error", [0, 1, 2]), ("train_error", [0, 1, 2])):
        points = pd.DataFrame(opened.execute_script(MARKS_OF, metric))
        assert set(points["dataset"]) == {"MNIST"}
        assert set(points["condition"]) == {"SGD"}
        assert set(points["rate"]) == {f"{cell['rate']:g}"}  # the best, of both seeds
        assert sorted(points["epoch"]) == sorted(2 * epochs)
    choose(opened, "test_error", "rate", "each of them")
    points = pd.DataFrame(opened.execute_script(MARKS_OF, "train_error"))
    assert set(points["rate"]) == {"1", "0.1"}
    assert len(points) == 12
    choose(opened, "test_error", "rate", "0.0005 × 0.1")
    choose(opened, "test_error", "dataset", FOLDER)
    points = pd.DataFrame(opened.execute_script(MARKS_OF, "train_error"))
    assert set(points["rate"]) == {"0.1"}
    assert set(points["dataset"]) == {FOLDER}


def test_a_select_shows_the_angles_of_one_run(opened: Chrome) -> None:
    choose(opened, "weight_angle", "run", "birds-frSF+BN+BM-concordance=1-rate0.1-seed1")
    points = pd.DataFrame(opened.execute_script(MARKS_OF, "error_angle"))
    assert points["r"].nunique() == 1
    assert points.loc[points["layer"] == "fc2", "error_angle"].tolist() == [79, 78]
    weight = pd.DataFrame(opened.execute_script(MARKS_OF, "weight_angle"))
    assert set(weight["layer"]) == {"conv1", "fc2"}


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(opened: Chrome, width: int) -> None:
    emulate(opened, width, "light")
    opened.refresh()
    drawn(opened)
    opened.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    page = "document.documentElement"
    assert opened.execute_script(f"return [window.innerWidth, {page}.scrollWidth - {page}.clientWidth]") == [
        width,
        0,
    ]
    wide = opened.execute_script(
        "return [...document.querySelectorAll('canvas')]"
        ".map(canvas => [canvas.clientWidth, canvas.parentElement.clientWidth])"
    )
    assert len(wide) == 5
    for canvas, container in wide:
        assert container - 4 <= canvas <= container
    cut = opened.execute_script(
        "return Object.entries(window.views).map(([name, view]) => view.scenegraph().root.bounds.y2"
        " + view.origin()[1] - document.getElementById(name).querySelector('canvas').clientHeight)"
    )
    assert max(cut) <= 1  # no legend is cut
    grid = "document.querySelector('.grid').parentElement"
    before, after = opened.execute_script(
        f"const [box, head] = [{grid}, document.querySelector('.grid th[scope=row]')];"
        "const before = head.getBoundingClientRect().left; box.scrollLeft = 60;"
        "return [before, head.getBoundingClientRect().left];"
    )
    assert after == before  # the first column stays


def test_charts_follow_the_colour_scheme_and_keep_what_was_chosen(opened: Chrome, url: str) -> None:
    choose(opened, "test_error", "condition", "BN+BM")
    fills = (
        "return Object.values(window.views).map(view => JSON.stringify(view.scenegraph().toJSON()))"
        ".map(scene => [scene.includes('#222222'), scene.includes('#e6e6e6')])"
    )
    assert opened.execute_script(fills) == [[True, False]] * 5
    emulate(opened, 1280, "dark")
    opened.execute_async_script("setTimeout(arguments[0], 50)")  # the change is told
    drawn(opened)
    assert opened.execute_script(fills) == [[False, True]] * 5
    assert {point["condition"] for point in opened.execute_script(MARKS_OF, "train_error")} == {"BN+BM"}
    assert opened.execute_script(
        "return document.querySelector('#curves-controls select[name=condition]').value"
    )
    assert len(opened.find_elements("css selector", ".vega-bind")) == 5  # none twice
    choose(opened, "test_error", "condition", "SGD")
    assert {point["condition"] for point in opened.execute_script(MARKS_OF, "train_error")} == {"SGD"}


def test_every_select_is_reached_by_tab_and_its_focus_is_seen(opened: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(30):
        opened.switch_to.active_element.send_keys(Keys.TAB)
        focused = opened.switch_to.active_element
        if focused.tag_name == "select":
            assert focused.value_of_css_property("outline-style") == "solid"
            reached.append(focused.get_attribute("name"))
    assert reached == ["dataset", "dataset", "condition", "rate", "run"]


def test_a_select_works_by_keyboard(opened: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.find_element("css selector", "#curves-controls select[name=condition]").send_keys(Keys.ARROW_DOWN)
    assert opened.execute_script("return window.views.test_error.signal('condition')") == "SGD"
