"""The report in a real browser: at the widths of a phone and a desk, light and dark."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import matplotlib.image
import pytest

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = (390, 844), (1280, 900)
DARK, LIGHT = 0, 1
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
# The report runs no scripts, so a page around it looks in and writes down what it sees.
FRAME = """<!doctype html><html><head><meta charset="utf-8"><meta name="color-scheme" content="light dark"></head>
<body style="margin:0"><iframe id="frame" src="report.html" style="border:0;width:WIDTHpx;height:HEIGHTpx"></iframe>
<pre id="seen"></pre><script>
document.getElementById("frame").addEventListener("load", () => {
  const page = document.getElementById("frame").contentDocument, root = page.documentElement;
  const style = (element) => page.defaultView.getComputedStyle(element);
  const pictures = [...page.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 0);
  const text = pictures[0].querySelector("text");
  document.getElementById("seen").textContent = JSON.stringify({
    inner_width: page.defaultView.innerWidth,
    scroll_width: root.scrollWidth,
    background: style(page.body).backgroundColor,
    ink: style(page.body).color,
    plot_text: style(text).fill,
    picture_widths: pictures.map((svg) => svg.getBoundingClientRect().width),
    text_heights: pictures.map((svg) => svg.querySelector("text").getBoundingClientRect().height),
    scrolling_boxes: [...page.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth).length,
    details_closed: [...page.querySelectorAll("details")].every((one) => !one.open),
  });
});
</script></body></html>"""


@pytest.fixture(scope="module")
def browser():
    """The path of a Chromium; without one the test is skipped, but under CI it fails."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def browse(browser, tmp_path):
    """Run the browser on a file and return what it wrote on stdout and stderr."""

    def run(path, *switches, size, scheme):
        command = [
            browser,
            *SWITCHES,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            f"--blink-settings=preferredColorScheme={scheme}",
            *switches,
            path.as_uri(),
        ]
        shutil.rmtree(tmp_path / "profile", ignore_errors=True)
        environment = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=True)
        return done.stdout, done.stderr

    return run


@pytest.fixture
def look(browse, finished_run_dir, tmp_path):
    """Measure the report in a frame of a given size."""

    def measure(size, scheme):
        shutil.copyfile(finished_run_dir / "report.html", tmp_path / "report.html")
        frame = FRAME.replace("WIDTH", str(size[0])).replace("HEIGHT", str(size[1]))
        (tmp_path / "frame.html").write_text(frame)
        switches = ("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
        dom, _ = browse(tmp_path / "frame.html", *switches, size=DESK, scheme=scheme)
        return json.loads(unescape(re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.S)[0]))

    return measure


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_page_is_never_wider_than_the_screen(look, size):
    seen = look(size, LIGHT)
    assert seen["inner_width"] == size[0]
    assert seen["scroll_width"] <= size[0]
    assert max(seen["picture_widths"]) <= size[0]
    assert seen["details_closed"]


def test_on_a_phone_tables_scroll_in_their_boxes_and_plots_stay_legible(look):
    seen = look(PHONE, LIGHT)
    assert seen["scrolling_boxes"] > 3
    assert min(seen["picture_widths"]) > 300
    assert min(seen["text_heights"]) > 9


def test_light_and_dark_follow_the_reader(look):
    light, dark = look(DESK, LIGHT), look(DESK, DARK)
    assert brightness(light["background"]) > 200 > 60 > brightness(dark["background"])
    for text in ("ink", "plot_text"):
        assert brightness(light[text]) < brightness(light["background"]) - 100
        assert brightness(dark[text]) > brightness(dark["background"]) + 100


@pytest.mark.parametrize("scheme", [DARK, LIGHT])
@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_browser_draws_it_without_a_complaint(browse, finished_run_dir, tmp_path, size, scheme):
    picture = tmp_path / "page.png"
    path = finished_run_dir / "report.html"
    _, log = browse(path, f"--screenshot={picture}", size=size, scheme=scheme)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == size[0]
    corner = pixels[2, 2, :3].mean()
    assert corner > 0.9 if scheme == LIGHT else corner < 0.2


def test_the_log_would_show_a_complaint(browse, tmp_path):
    """What the test above relies on: an error reaches the log."""
    path = tmp_path / "broken.html"
    path.write_text("<script>missing()</script>")
    _, log = browse(path, f"--screenshot={tmp_path / 'page.png'}", size=DESK, scheme=LIGHT)
    assert "CONSOLE" in log
