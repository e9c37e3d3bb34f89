"""Makes the pictures of README and docs anew, from the demo's store and from kept results: `make pictures`.

Needs Chromium. If there is no demo.zarr, the demo makes it, which takes three minutes.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT, DOCS = TESTS.parent, TESTS.parent / "docs"
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "benchmarks")]

import precision  # noqa: E402
from chromium import CHROMIUM, launched  # noqa: E402

STORE = ROOT / "demo.zarr"
SPEECH = "demo-prose/document/0?layer=3&token=40"
"""What the explorer's picture shows: the first speech of the demo, and the path of its 40th token."""


WITHOUT_FOLDER = """folder => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(folder, "");
}"""
"""Takes the path of this clone out of a page."""


def main() -> None:
    """Make all pictures."""
    if CHROMIUM is None:
        sys.exit("there is no chromium on the path: install it, for example with apt-get install chromium")
    if not STORE.exists():
        subprocess.run([sys.executable, "jobs/demo.py"], cwd=ROOT, check=True)
    result = TESTS / "benchmarks" / "results" / "precision.json"
    precision.draw(json.loads(result.read_text(encoding="utf-8")), DOCS / "precision.svg")
    with launched() as browser:
        with exploring() as address:
            take(browser, address + SPEECH, "body[data-drawn]", DOCS / "explorer.png", width=1280, height=860)
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "report.html"
            subprocess.run([sys.executable, "jobs/report.py", STORE.name, "-o", page], cwd=ROOT, check=True)
            take(browser, page.as_uri(), "#summary", DOCS / "report.png", width=1400, height=926)


@contextmanager
def exploring() -> Iterator[str]:
    """Where the explorer of the demo's store answers while the block runs."""
    command = [sys.executable, "jobs/explore.py", STORE.name, "--port", "0", "--processes", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as explorer:
        assert explorer.stdout
        address = explorer.stdout.readline().strip()
        try:
            yield address
        finally:
            explorer.terminate()


def take(browser: Any, address: str, drawn: str, picture: Path, *, width: int, height: int) -> None:
    """The top of a page, once it has what a selector names, and no pointer or animation on it."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light", reduced_motion="reduce")
    page.goto(address)
    page.wait_for_selector(drawn)
    page.wait_for_load_state("networkidle")
    while "ndexing" in (text := page.inner_text("body")) or "being indexed" in text:
        page.wait_for_timeout(1000)
        page.reload()
        page.wait_for_selector(drawn)
    page.evaluate(WITHOUT_FOLDER, f"{ROOT}/")
    page.screenshot(path=picture, animations="disabled")
    page.close()
    print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
