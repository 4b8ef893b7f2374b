"""`python -m benchmarks.report_page [--json FILE]`: how fast the report of a large trace opens.

The trace is that of `benchmarks.statistics`: 1 M tokens, 32 layers, 2 routes a token. Its page is
opened from the disk by headless Chromium; the target is 3 s until it is loaded. Permutations and
resamples are few: they change numbers on the page, not its size.
"""

import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.statistics import synthetic
from benchmarks.tables import device, parser, write
from moiety.analysis.report import VIEW_TOKENS, Reported
from moiety.analysis.reporting.compose import Evidence, of_trace
from moiety.analysis.reporting.pictures import find_browser
from moiety.analysis.statistics import summarise
from moiety.errors import InputError

SECONDS = 3.0
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
DRIVER = """<body><iframe id="pending"></iframe><iframe id="page" width="1280" height="900"></iframe>
<pre id="result"></pre><script>
const pending = document.getElementById("pending").contentDocument;
pending.open();
const page = document.getElementById("page");
const start = performance.now(), told = {};
const since = () => (performance.now() - start) / 1000;
page.addEventListener("load", () => { told.loaded = since(); });
function wait() {
  if (told.loaded && page.contentDocument.documentElement.dataset.drawn) {
    told.drawn = since();
    document.getElementById("result").textContent = JSON.stringify(told);
    pending.close();
  } else setTimeout(wait, 20);
}
page.src = "report.html";
wait();
</script></body>"""


def opened(page: Path) -> dict[str, float]:
    """Seconds until a page is loaded, and until its last figure is drawn."""
    browser = find_browser()
    if browser is None:
        raise InputError("expected Chromium on the PATH to open the page; install it")
    driver = page.with_name("driver.html")
    driver.write_text(DRIVER)
    profile = f"--user-data-dir={page.with_name('profile')}"
    command = [browser, *FLAGS, "--allow-file-access-from-files", profile, "--dump-dom"]
    done = subprocess.run([*command, driver.as_uri()], capture_output=True, text=True, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout)
    assert found is not None
    return json.loads(found[1])


def measure(tokens: int, layers: int, experts: int) -> dict[str, Any]:
    """Write and open the page of a synthetic trace."""
    trace = synthetic(tokens, layers, experts, active=2)
    summary = summarise(trace, permutations=19, resamples=19)
    evidence = Evidence(summary=summary, results={})
    start = time.perf_counter()
    page = Reported(of_trace(evidence), {}, trace, evidence).html(VIEW_TOKENS)
    written = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(page, encoding="utf-8")
        runs = [opened(path) for _ in range(3)]
    best = min(runs, key=lambda run: run["loaded"])
    return {
        "tokens": tokens,
        "layers": layers,
        "megabytes": len(page) / 1e6,
        "written": written,
    } | best


def main() -> None:
    """Measure and print."""
    arguments = parser("report_page", __doc__).parse_args()
    quick = arguments.quick
    row = measure(20_000 if quick else 1_000_000, 4 if quick else 32, experts=16)
    Console().print(
        f"{row['tokens']:,} tokens x {row['layers']} layers: page of {row['megabytes']:.1f} MB made in "
        f"{row['written']:.1f} s; loaded in {row['loaded']:.2f} s (target {SECONDS:.0f}), last figure "
        f"drawn after {row['drawn']:.2f} s. {device()}"
    )
    write([row], arguments.json)


if __name__ == "__main__":
    main()
