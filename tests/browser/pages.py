"""Pages in a real browser: headless Chromium at three widths, light and dark, looked over for what a reader misses.

    python tests/browser/pages.py PAGE_OR_FOLDER ... [--screenshots=DIR] [--axe=axe.min.js]

It prints each finding and exits with 1 where there is one. Found is text that is cut off, sticks out of its box, leaves
the page or lies over other text (text_boxes.js). So are pictures that do not load, errors of scripts, refused requests,
and serious findings of axe-core, whose axe.min.js the option or the environment variable AXE_CORE names.

Only the standard library is needed beside Chromium, which is driven through its debugging pipe.
"""

import argparse
import base64
import contextlib
import dataclasses
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WIDTHS = (390, 1280, 1920)  # pixels: a phone, a laptop, a desktop
SCHEMES = ("light", "dark")
PATIENCE = 120.0  # seconds for one answer of the browser, on a machine that is busy with other things
TEXT_BOXES = Path(__file__).with_name("text_boxes.js")
NO_CHROMIUM = "no Chromium: install one (apt-get install chromium), or name it in the environment variable CHROMIUM"
NO_AXE = "no axe-core: name its axe.min.js in the environment variable AXE_CORE (npm pack axe-core)"
_HIGHEST = 16_000  # pixels of a screenshot: Chromium draws no higher texture


def find_chromium() -> str | None:
    """The browser's program: what CHROMIUM names, or the first known one on the path; None where there is none."""
    known = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, [os.environ.get("CHROMIUM", ""), *known])), None)


def find_axe() -> Path | None:
    """axe-core's axe.min.js, as the environment variable AXE_CORE names it."""
    named = os.environ.get("AXE_CORE")
    return Path(named) if named and Path(named).is_file() else None


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a reader of a page meets: `kind` of trouble, its `text`, `where` it is, and `detail`."""

    kind: str
    text: str
    where: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.kind, repr(self.text), self.where, self.detail) if part)


class Browser(contextlib.AbstractContextManager):
    """A headless Chromium of its own, with an empty profile. Raises RuntimeError where none is found or it ends."""

    def __init__(self, program: str | None = None):
        program = program or find_chromium()
        if program is None:
            raise RuntimeError(NO_CHROMIUM)
        self._profile = tempfile.TemporaryDirectory(prefix="pages-", ignore_cleanup_errors=True)
        self._log = Path(self._profile.name, "log")
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()
        flags = [
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}/profile",
            "--no-sandbox",  # root has no sandbox; only pages of our own are opened
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-extensions",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--font-render-hinting=none",
            "--force-color-profile=srgb",
        ]
        # Chromium reads from descriptor 3 and writes to descriptor 4.
        connect = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", connect, "bash", program, *flags, "about:blank"],
                pass_fds=(from_us, to_us),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(from_us)
        os.close(to_us)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **arguments: Any) -> dict[str, Any]:
        """The result of one command of the DevTools protocol. Raises RuntimeError with the browser's words."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments} | ({"sessionId": session} if session else {})
        self._send(message)
        while True:
            answer = self._receive()
            if answer.get("id") != number:
                self._events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error'].get('message')}")
            else:
                return answer["result"]

    def _send(self, message: dict[str, Any]) -> None:
        rest = memoryview(json.dumps(message).encode() + b"\0")
        while rest:
            rest = rest[os.write(self._to, rest) :]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._from, 1 << 20) if ready else b""
            if not chunk:
                said = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"Chromium {'ended' if ready else 'gave no answer in time'}:\n{said}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def wait_for(self, event: str, session: str) -> dict[str, Any]:
        """The next event of the session, those that came before included."""
        seen = 0
        while True:
            for message in self._events[seen:]:
                if message.get("method") == event and message.get("sessionId") == session:
                    self._events.remove(message)
                    return message["params"]
            seen = len(self._events)
            self._events.append(self._receive())

    def events(self, session: str) -> list[dict[str, Any]]:
        """All events of the session that nobody waited for."""
        return [message for message in self._events if message.get("sessionId") == session]

    @contextlib.contextmanager
    def page(
        self, place: str | os.PathLike, *, width: int = 1280, height: int = 900, scheme: str = "light"
    ) -> Iterator["Page"]:
        """Opens a file or an address in a tab of `width` x `height` pixels and waits until it is loaded and drawn."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            for domain in ("Page", "Runtime", "Log", "Network", "Performance"):
                self.call(f"{domain}.enable", session)
            phone = width < 500
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
            self.call("Emulation.setDeviceMetricsOverride", session, **size)
            features = [
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ]
            self.call("Emulation.setEmulatedMedia", session, features=features)
            address = place if "://" in str(place) else Path(place).resolve().as_uri()
            answer = self.call("Page.navigate", session, url=str(address))
            if answer.get("errorText"):
                raise RuntimeError(f"{address}: {answer['errorText']}")
            self.wait_for("Page.loadEventFired", session)
            page = Page(self, session, width)
            page.settle()
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)
            self._events = [message for message in self._events if message.get("sessionId") != session]

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for descriptor in (self._from, self._to):
            os.close(descriptor)
        self._profile.cleanup()

    def __exit__(self, *exception) -> None:
        self.close()


class Page:
    """One open page."""

    def __init__(self, browser: Browser, session: str, width: int):
        self._browser, self._session, self.width = browser, session, width

    def run(self, script: str) -> Any:
        """The value of an expression, or of its promise. Raises RuntimeError where it throws."""
        options = {"expression": script, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self._browser.call("Runtime.evaluate", self._session, **options)
        if "exceptionDetails" in answer:
            thrown = answer["exceptionDetails"]
            raise RuntimeError(thrown.get("exception", {}).get("description") or thrown.get("text"))
        return answer["result"].get("value")

    def settle(self) -> None:
        """Waits until fonts are there and two frames were drawn."""
        self.run("document.fonts.ready.then(() => 0)")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def press(self, key: str) -> None:
        """One key, named as in KeyboardEvent.key."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}
        one = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key.upper()) if len(key) == 1 else 0)}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self._browser.call("Input.dispatchKeyEvent", self._session, **one, **down)
        self._browser.call("Input.dispatchKeyEvent", self._session, **one, type="keyUp")
        self.settle()

    def open_details(self) -> None:
        """Opens all that is folded."""
        self.run("document.querySelectorAll('details').forEach(one => { one.open = true; }); 0")
        self.settle()

    def text_boxes(self) -> list[Finding]:
        """Text that cannot be read, as text_boxes.js finds it."""
        return [Finding(**one) for one in self.run(TEXT_BOXES.read_text())]

    def errors(self) -> list[Finding]:
        """What scripts threw, what was refused, and requests to another machine."""
        found = []
        for message in self._browser.events(self._session):
            method, said = message.get("method"), message.get("params", {})
            if method == "Runtime.exceptionThrown":
                thrown = said["exceptionDetails"]
                text = thrown.get("exception", {}).get("description") or thrown.get("text", "")
                found.append(Finding("script", text, f"line {thrown.get('lineNumber', 0) + 1}"))
            elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
                found.append(Finding("refused", said["entry"]["text"], said["entry"].get("url", "")))
            elif method == "Network.requestWillBeSent":
                address = said["request"]["url"]
                if not address.startswith(("file:", "data:", "blob:", "about:", "chrome")) and not _is_local(address):
                    found.append(Finding("request", address))
        return found

    def axe(self, script: Path) -> list[Finding]:
        """axe-core's findings that it calls serious or critical, by element."""
        self.run(f"{script.read_text()}\n;0")
        only = "{resultTypes: ['violations']}"
        violations = self.run(f"axe.run(document, {only}).then(found => found.violations)")
        return [
            Finding(f"axe {rule['impact']}", rule["help"], " ".join(map(str, node["target"])), rule["id"])
            for rule in violations
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]

    def loading(self) -> dict[str, float]:
        """Seconds from the request until the first words are drawn and until all is loaded; and "work", of processor
        time that the page's process has taken until now, whatever else the machine does.
        """
        times = self.run(
            "(() => { const [page] = performance.getEntriesByType('navigation');"
            "const first = performance.getEntriesByName('first-contentful-paint')[0];"
            "return {first: first ? first.startTime : null, loaded: page.loadEventEnd}; })()"
        )
        metrics = self._browser.call("Performance.getMetrics", self._session)["metrics"]
        work = next(one["value"] for one in metrics if one["name"] == "ProcessTime")
        return {"first": (times["first"] or 0) / 1000, "loaded": times["loaded"] / 1000, "work": work}

    def screenshot(self, path: str | os.PathLike, top: int = 0, height: int | None = None) -> None:
        """Writes a PNG of the page from pixel `top`, of `height` pixels or down to its end."""
        whole = self.run("Math.max(document.documentElement.scrollHeight, document.body.scrollHeight)")
        height = min(height or whole - top, whole - top, _HIGHEST)
        clip = {"x": 0, "y": top, "width": self.width, "height": height, "scale": 1}
        options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        data = self._browser.call("Page.captureScreenshot", self._session, **options)["data"]
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


def _is_local(address: str) -> bool:
    return address.startswith(("http://127.0.0.1", "http://localhost", "ws://127.0.0.1", "ws://localhost"))


def look_over(
    browser: Browser,
    place: str | os.PathLike,
    *,
    widths: Sequence[int] = WIDTHS,
    schemes: Sequence[str] = SCHEMES,
    axe: Path | None = None,
    screenshots: Path | None = None,
    is_opened: bool = True,
) -> dict[tuple[int, str], list[Finding]]:
    """{(width, scheme): findings} of a page, as it comes and with all that is folded open (`is_opened`)."""
    found = {}
    for width, scheme in itertools.product(widths, schemes):
        with browser.page(place, width=width, scheme=scheme) as page:
            findings = page.text_boxes()
            if screenshots:
                page.screenshot(screenshots / f"{Path(str(place)).stem}-{width}-{scheme}.png")
            if is_opened:
                page.open_details()
                findings += page.text_boxes()
            findings += page.axe(axe) if axe else []
            findings += page.errors()
        found[width, scheme] = list(dict.fromkeys(findings))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Looks over pages in headless Chromium; exits with 1 on a finding.")
    parser.add_argument("places", nargs="+", metavar="PAGE", help="an HTML file, a folder of them, or an address")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="pixels (default: %(default)s)")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="(default: %(default)s)")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="writes a PNG of each page there")
    parser.add_argument("--axe", type=Path, default=find_axe(), help="axe-core's axe.min.js (default: AXE_CORE)")
    arguments = parser.parse_args(argv)
    widths, schemes = [int(width) for width in arguments.widths.split(",")], arguments.schemes.split(",")
    places: list[str] = []
    for place in arguments.places:
        places += sorted(map(str, Path(place).rglob("*.html"))) if Path(place).is_dir() else [place]
    if find_chromium() is None:
        parser.error(NO_CHROMIUM)
    if arguments.axe is None:
        print(f"note: {NO_AXE}", file=sys.stderr)
    count = 0
    with Browser() as browser:
        for place in places:
            options = {"axe": arguments.axe, "screenshots": arguments.screenshots}
            for (width, scheme), findings in look_over(
                browser, place, widths=widths, schemes=schemes, **options
            ).items():
                print(f"{place} at {width} px, {scheme}: {len(findings) or 'no'} findings")
                print("".join(f"  {finding}\n" for finding in findings), end="")
                count += len(findings)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
