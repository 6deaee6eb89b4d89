"""The report page in a real browser, headless, on a wide screen and on a narrow one."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from debian import why_missing
from example_results import example_result

from vmd_scale.config_file import load_config
from vmd_scale.report import write_report

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LONG = "w" * 200  # a word without an end, and still the name of a file
# The frame stands for the screen: a browser's own window cannot be narrower than 500 pixels.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><iframe id="page" style="width: {width}px; height: 800px; border: 0"
srcdoc="{page}"></iframe><pre id="found"></pre><script>
document.getElementById("page").addEventListener("load", event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(details => details.open = true);
  const inside = element => element.closest(".scroll") !== null;
  const wide = [...page.body.querySelectorAll("*")].filter(e => !inside(e)
    && e.getBoundingClientRect().right > root.clientWidth + 1);
  document.getElementById("found").textContent = JSON.stringify({{
    screen: root.clientWidth, page: root.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 200)),
    pictures: [...page.images].map(image => image.naturalWidth), sections: page.querySelectorAll("h2").length}});
}});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and (why := why_missing(["chromium"], ["chromium"])):
        pytest.skip(why)
    return found or "chromium"


def run_folder(folder: Path, latent: int, steps: list) -> Path:
    """What a run leaves behind, with bounds, samples and a log that have long words."""
    folder.mkdir(parents=True)
    settings = (f"latent.width={latent}", f"data.tokenizer={LONG}/tokenizer.json", "model.layers=3")
    (folder / "config.json").write_text(load_config(ROOT / "configs" / "quickstart.json", settings).to_json())
    keys = ("tokens", "loss", "reconstruction", "kl", "lr", "grad_norm", "tokens_per_second", "mfu")
    constant = {"kl_weight": 1.0, "data_wait_fraction": 0.1, "skipped_steps": 0}
    records = [{"step": n, **dict.fromkeys(keys, 1.5 + 1 / n), **constant} for n in range(1, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results = [example_result(steps=t, nats_per_token=2.0, bits_per_token=2 / math.log(2)).to_dict() for t in steps]
    (folder / "evaluation.json").write_text(json.dumps(results))
    drawn = [{"steps": "4", "latent": "fixed", "seed": 0, "texts": [LONG, "a sample of some words " * 20]}]
    (folder / "samples.json").write_text(json.dumps(drawn))
    (folder / "log.txt").write_text(f"INFO {LONG}\n" * 3)
    (folder / "events.jsonl").write_text(json.dumps({"event": "resumed", "step": 20, "time": 0.0, "why": LONG}) + "\n")
    return folder


def shown(browser: str, page: Path, width: int, folder: Path) -> dict:
    """What a browser makes of a page on a screen that is so wide, everything folded being open."""
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text())))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--window-size=1600,900"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, *options, profile, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_wider_than_the_screen_and_every_picture_is_drawn(browser, width, count, tmp_path, monkeypatch):
    monkeypatch.setattr("vmd_scale.report.figures.DPI", 30)
    runs = [run_folder(tmp_path / "vmd" / LONG, 8, [1, 4, "inf"]), run_folder(tmp_path / "mdm", 0, [1, 4, "inf"])]
    found = shown(browser, write_report(runs[:count], tmp_path / "page.html"), width, tmp_path)
    assert width - 20 <= found["screen"] <= width  # there may be a scroll bar
    assert found["page"] == found["screen"], found["wide"]
    assert not found["wide"]
    assert len(found["pictures"]) >= 5 * count
    assert all(found["pictures"])
    assert found["sections"] > 5 * count
