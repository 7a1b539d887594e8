"""Take screenshots of a sweep's page, without its runs: two widths, light and dark, into this folder.

    feedbackhook report analysis/runs/evidence/mnist -o report.html
    python docs/screenshots.py report.html

It needs selenium, chromium and chromedriver, but no display.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

WIDTHS = {"wide": 1280, "narrow": 360}  # pixels


def main(report: str) -> None:
    options = webdriver.ChromeOptions()
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if browser is None or driver is None:
        raise SystemExit("chromium and chromedriver are not on the PATH (Debian: chromium, chromium-driver)")
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as page:
        for size, width in WIDTHS.items():
            for scheme in ("light", "dark"):
                page.execute_cdp_cmd(
                    "Emulation.setDeviceMetricsOverride",
                    {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
                )
                page.execute_cdp_cmd(
                    "Emulation.setEmulatedMedia",
                    {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
                )
                page.get(Path(report).resolve().as_uri())
                WebDriverWait(page, 60).until(lambda p: p.execute_script("return window.drawn === true"))
                first, after = (
                    page.execute_script(f"return document.getElementById('{section}').offsetTop")
                    for section in ("answer", "summary")
                )
                page.execute_cdp_cmd(
                    "Emulation.setDeviceMetricsOverride",
                    {"width": width, "height": after - first, "deviceScaleFactor": 1, "mobile": False},
                )
                page.execute_script(f"scrollTo(0, {first})")
                page.execute_async_script("setTimeout(arguments[0], 500)")  # charts and their legends settle
                shot = page.get_screenshot_as_png()
                path = Path(__file__).parent / f"report_{size}_{scheme}.png"
                picture = Image.open(io.BytesIO(shot)).convert("RGB")
                picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
                print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
