"""The browser that looks over pages finds what was put wrong on a page, and nothing on one without fault."""

import pytest
from browser.pages import NO_AXE, NO_CHROMIUM, Browser, find_axe, find_chromium, look_over, main

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=NO_CHROMIUM)

SOUND = """<!DOCTYPE html><html lang="en"><head><title>sound</title><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.4 sans-serif; color: #222; background: #fff; }}
.wide {{ overflow-x: auto; }} table {{ width: 2500px; }}
.unseen {{ position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }}
.drawer {{ position: fixed; left: -300px; width: 280px; top: 0; }}
</style></head><body><main><h1>A page</h1><p>Text with a <b>bold</b> word and a <small>small</small> one.</p>
<div class="wide" tabindex="0"><table><tr><td>one</td><td>two</td></tr></table></div>
<span class="unseen">for screen readers</span><div class="drawer">waits beside the page</div>
<svg width="200" height="40" role="img" aria-label="two words"><text x="5" y="20">left</text>
<text x="100" y="20">right</text></svg>
<details><summary>More</summary><p>folded</p></details>{extra}</main></body></html>"""

WRONG = {
    "over other text": '<div style="position: relative; height: 3em"><p style="position: absolute">first words</p>'
    '<p style="position: absolute; left: 20px">second words</p></div>',
    "cut off": '<p style="width: 60px; overflow: hidden; white-space: nowrap">far too long for sixty pixels</p>',
    "sticks out": '<p style="width: 60px; white-space: nowrap">far too long for sixty pixels</p>',
    "outside the page": '<p style="width: 2600px; white-space: nowrap; text-align: right">to the right</p>',
    "picture does not load": '<img src="data:image/png;base64,AAAA" alt="broken">',
    "script": "<script>thisIsNotDefined();</script>",
}


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


def test_a_page_without_fault_has_no_finding(browser, tmp_path):
    page = tmp_path / "sound.html"
    page.write_text(SOUND.format(extra=""))
    found = look_over(browser, page)
    assert list(found) == [(width, scheme) for width in (390, 1280, 1920) for scheme in ("light", "dark")]
    assert [str(one) for findings in found.values() for one in findings] == []


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found(browser, tmp_path, kind):
    page = tmp_path / "wrong.html"
    page.write_text(SOUND.format(extra=WRONG[kind]))
    (findings,) = look_over(browser, page, widths=[1280], schemes=["light"]).values()
    assert {one.kind for one in findings} == {kind}


def test_folded_text_is_measured_when_it_is_opened(browser, tmp_path):
    page = tmp_path / "folded.html"
    page.write_text(SOUND.format(extra=f"<details><summary>Fold</summary>{WRONG['sticks out']}</details>"))
    for is_opened in (False, True):
        options = {"widths": [390], "schemes": ["dark"], "is_opened": is_opened}
        (findings,) = look_over(browser, page, **options).values()
        assert [one.kind for one in findings] == ["sticks out"] * is_opened


def test_a_request_to_another_machine_is_found(browser, tmp_path):
    page = tmp_path / "request.html"
    page.write_text(SOUND.format(extra='<script>fetch("http://192.0.2.1/x").catch(() => 0);</script>'))
    with browser.page(page) as opened:
        assert ("request", "http://192.0.2.1/x") in [(one.kind, one.text) for one in opened.errors()]


def test_keys_reach_the_page_and_its_scheme_is_seen(browser, tmp_path):
    page = tmp_path / "keys.html"
    page.write_text(SOUND.format(extra="<script>keys = []; onkeydown = e => keys.push(e.key);</script>"))
    with browser.page(page, scheme="dark") as opened:
        for key in ("j", "Escape", "ArrowRight"):
            opened.press(key)
        assert opened.run("keys") == ["j", "Escape", "ArrowRight"]
        assert opened.run("matchMedia('(prefers-color-scheme: dark)').matches") is True
        times = opened.loading()
        assert 0 < times["first"] < 60
        assert 0 < times["loaded"] < 60


@pytest.mark.skipif(find_axe() is None, reason=NO_AXE)
def test_serious_findings_of_axe_are_found(browser, tmp_path):
    page = tmp_path / "faint.html"
    page.write_text(SOUND.format(extra='<p style="color: #ccc">faint words</p>'))
    with browser.page(page) as opened:
        assert [one.detail for one in opened.axe(find_axe())] == ["color-contrast"]


def test_the_command_exits_with_one_on_a_finding(tmp_path, capsys):
    for name, extra in (("good", ""), ("bad", WRONG["sticks out"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.html").write_text(SOUND.format(extra=extra))
    options = ["--widths=390", "--schemes=light", f"--screenshots={tmp_path / 'shots'}"]
    assert main([str(tmp_path / "good"), *options]) == 0
    assert main([str(tmp_path / "bad"), *options]) == 1
    said = capsys.readouterr().out
    assert "good/page.html at 390 px, light: no findings" in said
    assert "sticks out: 'far too long for sixty pixels'" in said
    assert (tmp_path / "shots" / "page-390-light.png").read_bytes().startswith(b"\x89PNG")
