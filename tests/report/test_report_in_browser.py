"""The page in a real browser: no text clipped or intersecting at any width, nothing serious for axe, keys, colours."""

import json

import pytest
from browser.pages import NO_AXE, NO_CHROMIUM, SCHEMES, WIDTHS, Browser, find_axe, find_chromium, look_over
from made_runs import HOSTILE, captions_of, make_run

from balcap_jax.report.page import write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=NO_CHROMIUM)
SHOWN = "[...document.querySelectorAll('.example')].filter(card => card.checkVisibility()).length"


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


def broken(path):
    """A run with hostile texts of any length, half of its files torn, and no summary."""
    run = make_run(path, images=4, sft=4, rl=8, hostile=HOSTILE, kept=(6,))
    (run / "summary.json").write_text('{"evaluations": {"sft": ')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "sta')
    file = captions_of(run, "greedy", "rl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["captions"][0]["caption"] = "x" * 3000
    lines[1]["captions"] = []
    lines[2]["captions"][0] |= {"caption": " ", "b_capscore": None, "failures": {"recall": "y" * 500}}
    lines[3] |= {"id": "z" * 300, "prompt": "w" * 2000}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples" / "images" / "scene-2.png").unlink()
    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict:
    """Pages by name: of one run, of several, and of a broken one."""
    tmp_path = tmp_path_factory.mktemp("pages")
    one = make_run(tmp_path / "one", images=10, sft=8, rl=16, flawed=True, kept=(10, 20))
    several = [make_run(tmp_path / f"run-{k}", k, images=4, sft=8, rl=16, gain=1 - k / 4) for k in range(3)]
    return {
        "one": write_report([one]),
        "several": write_report(several, tmp_path / "several.html"),
        "broken": write_report([broken(tmp_path / "broken")]),
    }


def test_nothing_is_clipped_or_intersects(browser, pages):
    for name, page in pages.items():
        for width, scheme in zip(WIDTHS, ("light", "dark", "light"), strict=True):
            (found,) = look_over(browser, page, widths=[width], schemes=[scheme]).values()
            assert [str(finding) for finding in found] == [], (name, width, scheme)


@pytest.mark.skipif(find_axe() is None, reason=NO_AXE)
def test_axe_finds_nothing_serious(browser, pages):
    for (name, page), scheme in zip(pages.items(), ("light", "dark", "light"), strict=True):
        with browser.page(page, scheme=scheme) as opened:
            opened.open_details()
            assert [str(finding) for finding in opened.axe(find_axe())] == [], (name, scheme)


ROWS = """[...document.querySelectorAll('.charts')].map(group => {
    const tops = [...group.children].map(chart => Math.round(chart.getBoundingClientRect().top));
    return [...new Set(tops)].map(top => tops.filter(other => other === top).length);
})"""


def test_no_chart_is_alone_on_its_row(browser, pages):
    for name, width in (("one", 1280), ("several", 1280), ("one", 1920), ("one", 900)):
        with browser.page(pages[name], width=width) as page:
            rows = page.run(ROWS)
            assert len(rows) > 4
            assert all(min(row) > 1 for row in rows), (name, width, rows)
            assert max(max(row) for row in rows) == (3 if width == 900 else 4)


def test_keys_walk_through_the_page_and_choose_what_is_shown(browser, tmp_path):
    run = make_run(tmp_path / "run", images=30, sft=4, rl=8)
    with browser.page(write_report([run])) as page:
        assert page.run(SHOWN) == 8
        page.press("Tab")
        assert page.run("document.activeElement.textContent") == "Skip to the content"
        assert page.run("document.activeElement.getBoundingClientRect().top") >= 0  # It comes into view.
        background = "getComputedStyle(document.querySelector('.page')).backgroundColor"
        light = page.run(background)
        page.press("Tab")
        for name, expected in (("light", True), ("dark", False)):
            page.press("ArrowRight")
            assert page.run("document.activeElement.id") == f"scheme-{name}"
            assert (page.run(background) == light) is expected
        while page.run("document.activeElement.name") != "filter":
            page.press("Tab")
        titles = page.run("[...document.querySelectorAll('.filters label')].map(label => label.textContent)")
        assert titles[:2] == ["spread over the ranking (8)", "all (30)"]
        for title in titles[1:]:
            page.press("ArrowRight")
            assert page.run(SHOWN) == int(title.rpartition("(")[2].rstrip(")")), title
        page.press("Tab")
        assert page.run("document.activeElement.closest('.example') !== null")
        assert page.errors() == []


@pytest.mark.slow
def test_a_large_page_opens_in_a_second_and_has_no_finding(browser, tmp_path):
    """2,000 steps, 200 images with five captions each before and after, and 40 steps whose captions are kept."""
    run = make_run(tmp_path / "run", sft=500, rl=1500, images=200, samples=4, flawed=True, kept=range(520, 2001, 37))
    page = write_report([run])
    times = []
    for _ in range(5):
        with browser.page(page) as opened:
            times.append(opened.loading())
    best = min(times, key=lambda each: each["work"])
    print(f"{page.stat().st_size / 1e6:.1f} MB: {best}")
    found = look_over(browser, page, schemes=SCHEMES, axe=find_axe())
    assert [str(finding) for findings in found.values() for finding in findings] == []
    assert best["work"] < 1  # Processor time: what else the machine does is not the page's.
