"""What a sweep's page does in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from support.browser import chromium
from support.pages import CONDITIONS, FOLDER

from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.html import vega
from feedbackhook.report.html.cells import shade

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


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


POSITIONS = """
const found = [];
const walk = item => {
  if (item.items) for (const child of item.items) {
    const datum = item.marktype === "symbol" && child.datum;
    if (datum && "epoch" in datum) found.push([datum.test_error, child.y]);
    walk(child);
  }
};
walk(window.views[arguments[0]].scenegraph().root);
return found;
"""
"""Of a chart the test errors of its points, and how far down they are drawn in pixels."""

SAVED = [("cells", "svg", b"<svg"), ("test_error", "svg", b"<svg"), ("weight_angle", "png", b"\x89PNG")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as browser:
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
        *vega.ERRORS,
        *vega.ANGLES,
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
    cells = {(condition, dataset): (text, color) for condition, dataset, text, color in shown}
    errors = sweep_table(folder).cells.set_index(["condition", "dataset"])["best_error"]
    for cell in sweep_table(folder).cells.to_dict("records"):
        text, color = cells[cell["condition"], cell["dataset"]]
        assert float(text.split()[0]) == round(cell["best_error"], 2)
        points = cell["best_error"] - errors["SGD", cell["dataset"]]
        r, g, b = bytes.fromhex(shade(points)[1:])
        assert color == f"rgb({r}, {g}, {b})"


def test_selects_filter_both_learning_curves(opened: Chrome, folder: Path) -> None:
    conditions = {datum["condition"] for datum in opened.execute_script(MARKS_OF, "test_error")}
    assert conditions == set(CONDITIONS)
    cell = sweep_table(folder).cells.set_index(["dataset", "condition"]).loc[("MNIST", "SGD")]
    choose(opened, "test_error", "condition", "SGD")
    for metric, epochs in (("test_error", [0, 1, 2]), ("train_error", [0, 1, 2])):
        points = pd.DataFrame(opened.execute_script(MARKS_OF, metric))
        assert set(points["dataset"]) == {"MNIST"}
        assert set(points["condition"]) == {"SGD"}
        assert set(points["lr_factor"]) == {f"{cell['lr_factor']:g}"}  # the best, of both seeds
        assert sorted(points["epoch"]) == sorted(2 * epochs)
    choose(opened, "test_error", "lr_factor", "all")
    points = pd.DataFrame(opened.execute_script(MARKS_OF, "train_error"))
    assert set(points["lr_factor"]) == {"1", "0.1"}
    assert len(points) == 12
    choose(opened, "test_error", "lr_factor", "0.0005 × 0.1")
    choose(opened, "test_error", "dataset", FOLDER)
    points = pd.DataFrame(opened.execute_script(MARKS_OF, "train_error"))
    assert set(points["lr_factor"]) == {"0.1"}
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


def test_charts_follow_the_color_scheme_and_keep_what_was_chosen(opened: Chrome, url: str) -> None:
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
    for _ in range(80):
        opened.switch_to.active_element.send_keys(Keys.TAB)
        focused = opened.switch_to.active_element
        if focused.tag_name == "select":
            assert focused.value_of_css_property("outline-style") == "solid"
            reached.append(focused.get_attribute("name"))
    assert reached == ["dataset", "scale", "dataset", "condition", "lr_factor", "scale", "run"]


def test_a_select_works_by_keyboard(opened: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.find_element("css selector", "#curves-controls select[name=condition]").send_keys(Keys.ARROW_DOWN)
    assert opened.execute_script("return window.views.test_error.signal('condition')") == "SGD"


def test_a_logarithmic_axis_is_a_choice_that_keeps_the_others(opened: Chrome) -> None:
    choose(opened, "test_error", "condition", "SGD")
    before = opened.execute_script(POSITIONS, "test_error")
    opened.execute_script(
        "const scale = document.querySelector('select[data-scale=curves]');"
        "scale.value = 'log'; scale.dispatchEvent(new Event('change'))"
    )
    drawn(opened)
    after = opened.execute_script(POSITIONS, "test_error")
    assert opened.execute_script("return window.views.test_error.scale('y').type") == "log"
    assert opened.execute_script("return window.views.concordance.scale('y').type") == "linear"
    assert {error for error, _ in after} == {error for error, _ in before}  # SGD alone, still
    steps = np.polyfit(*np.transpose([(np.log(error), y) for error, y in after]), 1, full=True)
    assert steps[1][0] < 1  # pixels squared: a straight line in the logarithm


@pytest.mark.parametrize(("name", "format", "begins"), SAVED)
def test_a_figure_is_saved_from_the_page(
    opened: Chrome, name: str, format: str, begins: bytes, tmp_path: Path
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    allow = {"behavior": "allow", "downloadPath": str(tmp_path)}
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", allow)
    button = f"button[data-chart={name}][data-save={format}]"
    opened.execute_script(f"document.querySelector('{button}').click()")
    path = tmp_path / f"sweep-{name}.{format}"
    WebDriverWait(opened, 60).until(lambda _: path.exists() and path.stat().st_size)
    content = path.read_bytes()
    assert content.startswith(begins)
    if format == "svg":
        assert b"frSF+BN+BM" in content


def test_a_cell_leads_to_its_runs_and_their_configuration_and_back(opened: Chrome) -> None:
    cell = "td[data-condition='BN+BM'][data-dataset=MNIST]"
    opened.execute_script(f'document.querySelector("{cell} a").click()')
    group = opened.find_element("css selector", f"[id='{opened.current_url.partition('#')[2]}']")
    assert group.get_attribute("open")
    runs = [each.text for each in group.find_elements("css selector", "details details > summary")]
    assert [run.split()[0] for run in runs] == [
        f"MNIST-BN+BM-rate{r}-seed{s}" for r in (1, 0.1) for s in (0, 1)
    ]
    run = group.find_element("css selector", "details")
    opened.execute_script(f"location.hash = '{run.get_attribute('id')}'")
    assert "condition: BN+BM" in run.find_element("css selector", "pre:last-of-type").text
    opened.execute_script("arguments[0].click()", group.find_element("css selector", "a"))
    back = opened.current_url.partition("#")[2]
    assert opened.find_element("css selector", cell).get_attribute("id") == back
