"""Takes screenshots of TensorBoard's pages in headless Chromium.

trainer tensorboard --port 6006 &
python scripts/screenshot_tensorboard.py http://localhost:6006 pictures --browser /usr/bin/chromium

The picture of the README is pictures/overview.png after two trainings of three epochs.
"""

import time
from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import sync_playwright

# The charts are drawn by a web worker: an immediate screenshot shows axes without lines.
_DRAWING_SECONDS = 6.0
_PAGES = ("timeseries", "scalars", "custom_scalars", "images", "graphs", "text", "hparams")
_SHOWN = "regexInput=(train|validation)$&tagFilter=^(epoch/acc|epoch/loss|step/acc|step/loss)"
# The name of each picture, and the part of the address after "#".
_PICTURES = dict(zip(_PAGES, _PAGES, strict=True)) | {
    "overview": f"scalars&_smoothingWeight=0&{_SHOWN}",
}


def main(
    address: str,
    folder: Path,
    *,
    browser: Annotated[str, typer.Option(help="Path of Chromium")] = "/usr/bin/chromium",
) -> None:
    """Writes <folder>/<page>.png for each page, and overview.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=browser, args=flags)
        for name, fragment in _PICTURES.items():
            height = 750 if name == "overview" else 1300
            page = chromium.new_page(viewport={"width": 1300, "height": height})
            page.goto(f"{address}/#{fragment}")
            page.reload()
            time.sleep(_DRAWING_SECONDS)
            page.screenshot(path=folder / f"{name}.png")
        chromium.close()


if __name__ == "__main__":
    typer.run(main)
