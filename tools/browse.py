"""Opens every page of the site in a headless Chromium: pictures, messages on the console, links, search."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

# Visits the pages one after the other in a frame of the same origin, then asks the search for a word.
VISIT = """<!doctype html><meta charset="utf-8"><title>busy</title>
<iframe width="1200" height="900"></iframe>
<script>
const pages = %s, frame = document.querySelector("iframe"), found = [];
const open = page => new Promise(done => { frame.onload = () => setTimeout(done, 300); frame.src = page; });
// The browser's clock leaps over waiting, but not over requests: workers get their time while one is made.
const pause = () => fetch(location.href, {cache: "no-store"});
const wait = async test => { for (let k = 0; k < 2000 && !test(); k++) await pause(); };
(async () => {
  const targets = new Set();
  for (const page of pages) {
    await open(page);
    const inside = frame.contentDocument;
    const pictures = Array.from(inside.images);
    await wait(() => pictures.every(image => image.complete));
    for (const image of pictures) if (!image.naturalWidth || !image.alt) found.push(page + ": picture " + image.src);
    if (!inside.querySelector("h1")) found.push(page + ": no heading");
    for (const link of inside.links)
      if (link.origin === location.origin) targets.add(link.href.split("#")[0]);
  }
  for (const target of targets) {
    const answer = await fetch(target, {method: "HEAD"});
    if (!answer.ok) found.push("link " + target + " " + answer.status);
  }
  await open("index.html");
  const inside = frame.contentDocument, asked = inside.querySelector("input.md-search__input");
  asked.focus(); asked.value = "saliencies"; asked.dispatchEvent(new Event("keyup", {bubbles: true}));
  asked.dispatchEvent(new Event("input", {bubbles: true}));
  await wait(() => inside.querySelector(".md-search-result__item"));
  if (!inside.querySelector(".md-search-result__item")) found.push("the search finds nothing");
  document.body.append(Object.assign(document.createElement("pre"), {id: "found",
    textContent: JSON.stringify({pages: pages.length, links: targets.size, found})}));
})();
</script>
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def browse(folder: Path) -> None:
    """Visit every page of a built site; ends the process with what is wrong.

    Args:
        folder: of the HTML.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("failed: there is no Chromium to look at the site with")
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html") if path.name != "404.html")
    visit = folder / "visit-every-page.html"
    visit.write_text(VISIT % json.dumps(pages), encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    try:
        place = f"http://127.0.0.1:{server.server_port}/{visit.name}"
        command = [browser, *options, "--virtual-time-budget=600000", place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    finally:
        server.shutdown()
        visit.unlink()
    answer = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    complaints = re.findall(r"CONSOLE.*", done.stderr)
    if answer is None or complaints:
        sys.exit(
            "failed: the browser says: " + "\n".join([*complaints[:20], done.stderr[-2000:] if not answer else ""])
        )
    seen = json.loads(html.unescape(answer[1]))
    if seen["found"]:
        sys.exit("failed: " + "\n".join(seen["found"]))
    print(f"looked at: {seen['pages']} pages, {seen['links']} places that they link to; the search answers")
