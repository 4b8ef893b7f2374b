"""The report in headless Chromium: the token view works, nothing hostile runs, no errors."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.analysis.report import report

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=8000",
    "--allow-file-access-from-files",
)
ATTACK = "</script><img src=x onerror=\"document.title='owned'\">"
DRIVER = """<body><iframe id="page" src="report.html" width="1200" height="900"></iframe>
<pre id="result"></pre><script>
document.getElementById("page").addEventListener("load", (event) => {
  const page = event.target.contentDocument;
  const find = (id) => page.getElementById(id);
  const press = (key) => page.activeElement.dispatchEvent(
    new page.defaultView.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const lines = [];
  const say = () => lines.push([
    find("document").value, find("layer").value, page.activeElement.dataset.token,
    page.activeElement.getAttribute("aria-label")].join("|"));
  find("text").querySelector(".token").focus();
  say();
  press("ArrowRight"); say();
  press("]"); say();
  press("ArrowDown"); say();
  press("End"); say();
  find("domain").value = "1"; find("domain").dispatchEvent(new Event("change"));
  lines.push("documents " + find("document").options.length);
  find("legend").querySelector("button").click();
  lines.push("dimmed " + (find("text").querySelectorAll(".dim").length > 0));
  lines.push("title " + page.title);
  document.getElementById("result").textContent = lines.join("\\n");
});
</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")


@pytest.fixture
def page(plant: Callable[..., Path], tmp_path: Path) -> Path:
    trace = plant(purity=0.9, texts=[ATTACK, " held", "", "\n"])
    return report(trace, tmp_path / "report.html", {"bytes": {"composite": 1e6}})


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """The page's document after its scripts ran, and what the console said."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


def test_page_renders_without_errors_or_hostile_execution(page: Path, tmp_path: Path) -> None:
    dom, console = browse(page, tmp_path / "profile")
    assert console == ""
    assert "<title>Routing of tiny: Experts specialise" in dom
    assert dom.count('role="option"') == 20
    assert re.search(r'aria-label="[^"]*: arithmetic \d+%', dom)
    assert "owned" not in dom[: dom.index("</title>")]
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", dom, flags=re.S)
    assert "<img" not in body.replace('aria-label="', "").replace(ATTACK, "")
    assert dom.count('class="main-svg"') >= 3


def test_keys_and_controls(page: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.html"
    driver.write_text(DRIVER)
    dom, console = browse(driver, tmp_path / "profile")
    assert console == ""
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)
    assert found is not None
    lines = found[1].splitlines()
    assert [line.rsplit("|", 1)[0] for line in lines[:5]] == [
        "0|-1|0",
        "0|-1|1",
        "0|0|1",
        "1|0|0",
        "1|0|19",
    ]
    assert lines[5:7] == ["documents 6", "dimmed true"]
    assert lines[7].startswith("title Routing of tiny")
