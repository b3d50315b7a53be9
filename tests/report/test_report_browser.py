"""The pages in a real browser: nothing is asked for, nothing complains, nothing is wider than the window."""

import json
from io import BytesIO

import numpy as np
import pytest
from browser import Browser
from PIL import Image
from run_folders import SETTINGS, synthetic_run

from r3.report import write_comparison, write_report

pytestmark = pytest.mark.browser

RUNS = ("full", "one step", "empty", "long", "broken", "comparison")
# What leaves the window at the side, less what stands in a box that scrolls by itself.
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll *') && !e.closest('svg *') &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5 &&
    e.getBoundingClientRect().width).map(e => e.outerHTML.slice(0, 80))"""
# Texts of a chart that its drawing cuts off.
CUT = """[...document.querySelectorAll('svg text')].filter(e => {
    const t = e.getBoundingClientRect(), s = e.closest('svg').getBoundingClientRect();
    return t.width && (t.left < s.left - 2 || t.right > s.right + 2 || t.top < s.top - 2 || t.bottom > s.bottom + 2);
}).map(e => e.textContent)"""
# Contrast of texts with the page, as WCAG 2.2 has it, least first.
CONTRAST = """(() => {
    const light = c => { const v = c.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
    const parts = c => c.match(/[\\d.]+/g).map(Number);
    const behind = e => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
    return [...document.querySelectorAll('h1,h2,h3,p,li,b,span,a,td,th,figcaption,code,svg text')]
        .filter(e => e.textContent.trim()).map(e => {
            const style = getComputedStyle(e), drawn = e.closest('svg');
            const a = light(parts(drawn ? style.fill : style.color));
            const b = light(behind(drawn ? drawn.parentElement : e));
            return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.slice(0, 40)]; })
        .sort((x, y) => x[0] - y[0]).slice(0, 3);
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Page of each kind of run, by name."""
    base = tmp_path_factory.mktemp("runs")
    full = synthetic_run(base / "full", 40)
    folders = {
        "full": full,
        "one step": synthetic_run(base / "one", 1),
        "empty": synthetic_run(base / "empty", 0),
        "long": synthetic_run(base / "long", 1000, layers=48, experts=128, details_every=500),
        "broken": synthetic_run(base / ("broken-" + "x" * 200), 12),
    }
    metrics = folders["broken"] / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-2000] + "x" * 5000 + "\n")
    (folders["broken"] / "settings.json").write_text(json.dumps({"a." * 200: "v" * 3000, "n": ["</details>"] * 40}))
    found = {name: write_report(folder) for name, folder in folders.items()}
    other = synthetic_run(base / "other", 25, seed=5, worse=3, replay=False, settings=SETTINGS | {"more": "y" * 900})
    return found | {"comparison": write_comparison(full, other, base / "comparison.html")}


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("name", RUNS)
def test_page_fits_asks_for_nothing_and_is_silent(browser, pages, name, width):
    browser.open(pages[name], width=width)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.title").startswith("r3: ")
    assert [url for url in browser.requests if not url.startswith("data:image/png;base64,")] == [pages[name].as_uri()]
    assert browser.complaints == []
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(TOO_WIDE) == []
    assert browser.value(CUT) == []


@pytest.mark.parametrize("name", ["full", "comparison"])
def test_charts_are_drawn(browser, pages, name):
    browser.open(pages[name])
    drawings = browser.value("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
    assert len(drawings) > 15
    assert min(drawings) > 150
    # Images of the heat maps are decoded, whatever the policy of the page.
    picture = np.asarray(Image.open(BytesIO(browser.screenshot())).convert("RGB")).astype(int)
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 180) & (picture[..., 2] < 110)
    assert yellow.sum() > 500


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["full", "broken", "comparison"])
def test_texts_can_be_read_light_and_dark(browser, pages, name, dark):
    browser.open(pages[name], dark=dark)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    least = browser.value(CONTRAST)
    assert least[0][0] >= 4.5, least


def test_light_and_dark_differ(browser, pages):
    corner = {}
    for dark in (False, True):
        picture = browser.open(pages["full"], dark=dark).screenshot(whole=False)
        corner[dark] = int(np.asarray(Image.open(BytesIO(picture)).convert("L"))[2, 2])
    assert corner[False] > 240
    assert corner[True] < 40


def test_lines_differ_from_the_page_and_from_each_other(browser, pages):
    """Colours of the first chart's curves, as they are painted."""
    for dark in (False, True):
        browser.open(pages["full"], dark=dark)
        found = browser.value(
            "[...document.querySelectorAll('svg')[0].querySelectorAll('path')].map(p => getComputedStyle(p).stroke)"
        )
        ours = {"rgb(230, 159, 0)", "rgb(86, 180, 233)"} if dark else {"rgb(213, 94, 0)", "rgb(0, 114, 178)"}
        assert ours <= set(found)


def test_what_a_model_wrote_never_runs(browser, pages):
    browser.open(pages["full"])
    assert browser.value("document.title") == "r3: full"
    assert browser.value("document.querySelectorAll('script, img, [onerror]').length") == 0
    marked = browser.value("document.querySelector('td.text mark').textContent")
    assert marked.startswith("</script><img src=x onerror=")


def test_even_unescaped_it_would_not_run(browser, pages, tmp_path):
    """The page's policy alone stops scripts, handlers and requests."""
    source = pages["full"].read_text()
    attack = "<script>document.title='ran'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='ran'\">"
    broken = tmp_path / "attacked.html"
    broken.write_text(source.replace("</h1>", f"</h1>{attack}", 1))
    browser.open(broken)
    assert browser.value("document.title") == "r3: full"
    assert browser.complaints, "the browser did not even try: this test shows nothing"


def test_a_long_page_is_quick(browser, pages):
    """Not a measurement: a page that is laid out in seconds does not freeze the window."""
    browser.open(pages["long"])
    timing = browser.value("(e => e.domContentLoadedEventEnd)(performance.getEntriesByType('navigation')[0])")
    assert timing < 20_000
    assert browser.value("document.querySelectorAll('*').length") < 40_000


def test_the_browser_sees_what_is_wrong(browser, tmp_path):
    """The checks above fail on a page that is bad in all of these ways."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><title>r3: bad</title><body><div style='width:3000px'>wide</div><script>console.error('x')"
        "</script><img src='no.png'><p style='color:#e8e8f0'>pale</p>"
        "<svg width=50 height=50><text x=40 y=20>cut off</text></svg>"
    )
    browser.open(bad, width=420)
    assert browser.value(TOO_WIDE)
    assert browser.value(CUT) == ["cut off"]
    assert browser.value(CONTRAST)[0][0] < 4.5
    assert "x" in browser.complaints
    assert len(browser.requests) == 2
