"""Take the picture of a page for the README, in a headless Chromium.

    python medgemma_trainer.py --trajectory_only --output_dir runs \\
        --data_path medgemma_clinical/sample/physionet2012_bicarbonate.csv
    python .images/picture.py --page runs/trajectory/report.html --height 1090 \\
        --out .images/report.png

    zcat tests/data/physionet2012_chemistry.csv.gz | head -400 > runs/few.csv
    cp tests/data/physionet2012_chemistry.json runs/few.json
    python medgemma_trainer.py --trajectory_only --trajectory_epochs 4 --output_dir runs/nine \\
        --data_path tests/data/physionet2012_chemistry.csv.gz
    python medgemma_trainer.py --predict --explain --patients 133377 --data_path runs/few.csv \\
        --checkpoint runs/nine/trajectory --predictions runs/few_out.csv
    python .images/picture.py --page runs/few_out.patients.html --height 1730 \\
        --out .images/patients.png

Needs ``pip install playwright`` and a Chromium on the path (``apt install chromium``).
"""

import argparse
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def take_picture(page: Path, out: Path, width: int, height: int) -> None:
    """Write the upper ``height`` pixels of a page on a light screen of ``width`` pixels."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        path = next(filter(None, map(shutil.which, NAMES)), started.chromium.executable_path)
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        view = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="light", offline=True
        )
        view.goto(page.resolve().as_uri())
        view.screenshot(path=out)
        browser.close()


def main() -> None:
    """Read the flags and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--page", type=Path, required=True, help="the HTML file")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1120, help="pixels (1120)")
    parser.add_argument("--height", type=int, default=960, help="pixels (960)")
    arguments = parser.parse_args()
    take_picture(arguments.page, arguments.out, arguments.width, arguments.height)


if __name__ == "__main__":
    main()
