"""The report in headless Chromium: it works, asks for nothing, and nothing hostile runs."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.analysis.report import report
from moiety.analysis.results import write_result
from tests.analysis.results import counterfactuals, retention

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
    "--allow-file-access-from-files",
)
ATTACK = "</script><img src=x onerror=\"document.title='owned'\">"
OVERRIDE = "\N{RIGHT-TO-LEFT OVERRIDE}txt.exe"
DOMAINS = ("arithmetic", "<b onmouseover=alert(1)>code</b>", "law & order", "prose")
FIGURES = 15
HEAD = """<body><iframe id="narrow" src="report.html" width="380" height="900"></iframe>
<iframe id="wide" src="report.html" width="1280" height="900"></iframe>
<iframe id="pending"></iframe><pre id="result"></pre><script>
/* A document that is open and not closed keeps the browser from taking this page as loaded. */
const pending = document.getElementById("pending").contentDocument;
pending.open();
const lines = [], pages = [...document.querySelectorAll("iframe[src]")];
const drawn = (frame) => frame.contentDocument?.documentElement?.dataset.drawn;
function whenDrawn(then) {
  if (pages.every(drawn)) then();
  else setTimeout(whenDrawn, 50, then);
}
whenDrawn(() => {
  for (const frame of pages) look(frame.contentDocument, frame);
  document.getElementById("result").textContent = lines.join("\\n");
  pending.close();
});
function look(page, frame) {
  const find = (id) => page.getElementById(id);
  const press = (key) => page.activeElement.dispatchEvent(
    new page.defaultView.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
"""
TAIL = "}</script></body>"
KEYS = """
  const root = page.documentElement;
  lines.push(`fits ${root.scrollWidth <= root.clientWidth}`);
  lines.push(`requests ${frame.contentWindow.performance.getEntriesByType("resource").length}`);
  const say = () => lines.push([
    find("document").value, find("layer").value, page.activeElement.dataset.token].join("|"));
  find("text").querySelector(".token").focus();
  say();
  const phase = () => lines.push(find("detail").textContent.match(/· (prefill|decode) ·/)[1]);
  press("ArrowRight"); say(); phase();
  press("]"); say();
  press("ArrowDown"); say();
  press("End"); say(); phase();
  press("Home");
  find("legend").querySelectorAll("button")[1].click();
  lines.push("dimmed " + (find("text").querySelectorAll(".dim").length > 0));
  press("n");
  lines.push("jumped " + page.activeElement.getAttribute("aria-label").includes("onmouseover"));
  find("domain").value = "1"; find("domain").dispatchEvent(new Event("change"));
  lines.push("documents " + find("document").options.length);
  find("share-choice").value = "1"; find("share-choice").dispatchEvent(new Event("change"));
  lines.push("layer " + (find("share").data[0].z[0][0] > 0.5));
  const shown = page.body.innerText;
  lines.push("shown " + [shown.includes("<img src=x"), shown.includes("⟨U+202E⟩txt.exe"), shown.includes("a␀b")]);
  lines.push("elements " + page.querySelectorAll("img, b, iframe, [onmouseover], [onerror]").length);
  lines.push("heard " + [...page.querySelectorAll(".chart")].every((node) =>
    find(node.getAttribute("aria-labelledby")) && find(node.getAttribute("aria-describedby"))));
  lines.push("title " + page.title);
"""
LONG = """
  const text = find("text");
  const once = (act) => { const start = performance.now(); act(); return performance.now() - start; };
  const timed = (act) => Math.min(once(act), once(act), once(act));
  const held = () => text.querySelectorAll(".token").length;
  text.querySelector(".token").focus();
  const times = [
    timed(() => { press("End"); press("Home"); }), timed(() => { press("]"); press("["); }),
    timed(() => find("legend").querySelector("button").click()),
  ];
  lines.push(`held ${held()}`);
  lines.push(`slowest ${Math.round(Math.max(...times))}`);
  press("End");
  lines.push(`at ${page.activeElement.dataset.token} of ${page.activeElement.getAttribute("aria-setsize")}`);
  lines.push(`held ${held()}`);
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")


def page_of(trace: Path, folder: Path, view_tokens: int = 20_000) -> Path:
    write_result(trace / "counterfactuals.json", counterfactuals(DOMAINS))
    write_result(trace / "retention.json", retention(DOMAINS))
    results = {"bytes": {"composite": 1e6}}
    return report(trace, folder / "report.html", results, max_view_tokens=view_tokens)


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """The page's document after its scripts ran, and what the console said."""
    assert CHROMIUM is not None
    place = f"--user-data-dir={profile}"
    command = [CHROMIUM, *FLAGS, *flags, place, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


def looked_at(script: str, page: Path) -> list[str]:
    """What a script says of the page in a narrow and in a wide frame."""
    driver = page.with_name("driver.html")
    driver.write_text(HEAD + script + TAIL, encoding="utf-8")
    dom, console = browse(driver, page.with_name("profile"))
    assert console == ""
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)
    assert found is not None
    return found[1].splitlines()


def test_page_renders_without_errors(plant: Callable[..., Path], tmp_path: Path) -> None:
    trace = plant(purity=0.9, texts=[ATTACK, " held", "", "\n"], domains=DOMAINS)
    page = page_of(trace, tmp_path)
    dom, console = browse(page, tmp_path / "profile", "--virtual-time-budget=20000")
    assert console == ""
    assert "<title>Routing of tiny: Experts specialise" in dom
    assert dom.count('role="option"') == 20
    assert re.search(r'aria-label="[^"]*: arithmetic \d+%', dom)
    assert dom.count('class="main-svg"') >= FIGURES
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", dom, flags=re.S)
    assert "<img" not in body.replace('aria-label="', "").replace(ATTACK, "")


def test_keys_filters_and_hostile_text(plant: Callable[..., Path], tmp_path: Path) -> None:
    texts = [ATTACK, OVERRIDE, "a\0b", "", " held\n"]
    trace = plant(purity=0.6, texts=texts, domains=DOMAINS)
    lines = looked_at(KEYS, page_of(trace, tmp_path))
    half = len(lines) // 2
    assert lines[:half] == lines[half:]
    assert lines[:half] == [
        "fits true",
        "requests 0",
        "0|-1|0",
        "0|-1|1",
        "prefill",
        "0|0|1",
        "1|0|0",
        "1|0|19",
        "decode",
        "dimmed true",
        "jumped true",
        "documents 6",
        "layer true",
        "shown true,true,true",
        "elements 0",
        "heard true",
        lines[half - 1],
    ]
    assert lines[half - 1].startswith("title Routing of tiny")


def test_a_document_of_100_000_tokens_stays_fluid(
    plant: Callable[..., Path], tmp_path: Path
) -> None:
    trace = plant(domains=("law",), documents=1, length=100_000, active=1)
    page = report(trace, tmp_path / "report.html", max_view_tokens=100_000)
    lines = looked_at(LONG, page)
    for line in lines:
        name, value = line.split(" ", 1)
        if name == "held":
            assert 0 < int(value) < 6000
        if name == "slowest":
            assert int(value) < 1000
    assert lines.count("at 99999 of 100000") == 2
