"""The built documentation in a real browser: every page at three widths, light and dark; and it can be searched."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.pages import NO_CHROMIUM, Browser, Finding, find_axe, find_chromium, look_over

ROOT = Path(__file__).parents[2]
MKDOCS = os.environ.get("MKDOCS") or shutil.which("mkdocs")
NO_MKDOCS = "no MkDocs: pip install -e '.[docs]', or name the program of another environment in the variable MKDOCS"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(MKDOCS is None, reason=NO_MKDOCS)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, as a browser's scripts need one."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [MKDOCS, "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_there_and_found_by_the_search(site):
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {entry["location"].partition("#")[0] for entry in index}
    for page in (ROOT / "docs").glob("*.md"):
        name = page.with_suffix(".html").name
        assert (site / name).is_file()
        assert name in found
    text = " ".join(entry["text"] for entry in index)
    for word in ("rollout.token_buckets", "advantage/zero_std_frac", "another process is training in"):
        assert word in text


def test_formulas_are_drawn_by_the_browser_itself(site):
    page = (site / "method.html").read_text()
    assert page.count("<math") > 40
    assert "arithmatex" not in page
    for one in site.glob("*.html"):
        assert 'src="https:' not in one.read_text()


@pytest.mark.skipif(find_chromium() is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_text_that_cannot_be_read(site, scheme):
    """A browser of its own for each scheme: the pages remember the one that they were first shown in."""
    with served(site) as address, Browser() as browser:
        for page in sorted((ROOT / "docs").glob("*.md")):
            place = f"{address}/{page.with_suffix('.html').name}"
            found = look_over(browser, place, schemes=[scheme], axe=find_axe())
            wrong = {
                width: [str(one) for one in all_of if not _is_formula(one)] for (width, _), all_of in found.items()
            }
            assert not any(wrong.values()), f"{page.name}: {wrong}"


def _is_formula(finding: Finding) -> bool:
    """In a formula an accent lies in its letter's box, and what is above a fraction reaches into what is below."""
    return finding.kind == "over other text" and " > m" in finding.where and " > m" in finding.detail
