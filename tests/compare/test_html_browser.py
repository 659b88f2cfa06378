"""The HTML report as a browser has it: what it asks for, logs and shows, in windows of a phone and of a desk."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from nodeproxy.compare import html
from tests.compare.browser import Browser, Page, install, open_browser
from tests.compare.comparisons import HOSTILE, comparison

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What reaches over the edge of the window, and is not in a part that scrolls by itself.
_OVER = """[...document.querySelectorAll('body *')]
    .filter(one => one.getClientRects().length && !one.closest('.scroll'))
    .filter(one => one.getBoundingClientRect().right > innerWidth + 1)
    .map(one => one.outerHTML.slice(0, 80))"""
_TEXT_OUT_OF_PLOTS = """[...document.querySelectorAll('figure svg')].flatMap(plot => {
    const frame = plot.getBoundingClientRect();
    return [...plot.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 2 || box.right > frame.right + 2 || box.bottom > frame.bottom + 4;
    }).map(text => text.textContent);
})"""
_SHOWN = "[...document.querySelectorAll('#all-frontends tbody tr')].filter(row => row.getClientRects().length).length"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Browser]:
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", file=sys.stderr, flush=True)

    await asyncio.to_thread(install, say)
    async with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
async def test_all_is_there_and_nothing_else_is_asked_for(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    file = tmp_path / "report.html"
    html.write(comparison(), file)
    async with browser.page(file, width=width, dark=dark) as page:
        await _is_quiet_and_fits(page, file)
        assert await page.evaluate("document.querySelector('h1').textContent") == "3 disagreements in ipvs\xa0(nft)."
        assert await page.evaluate("document.title") == "nodeproxy compare: 3 disagreements in ipvs\xa0(nft)."
        found = await page.evaluate("document.querySelector('section:has(#disagreements)').innerText")
        for text in ("team-2/service-2:http", "10.96.0.2:80/TCP", "node 192.168.10.2", "6 x 10.244.9.2:8080", "12 x drop"):
            assert text in found
        plots = await page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(one => one.getAttribute('aria-label'))"
        )
        assert len(plots) == 13
        assert plots[0] == "First sync: iptables (legacy): 2.16\xa0s; iptables (nft): 2.79\xa0s; ipvs (nft): 0.9\xa0s"
        assert await page.evaluate(_TEXT_OUT_OF_PLOTS) == []
        assert await page.evaluate("[...document.querySelectorAll('th:not([scope])')].length") == 0
        assert await page.evaluate("document.querySelectorAll('h1').length") == 1
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = await page.evaluate("getComputedStyle(document.querySelector('figure text')).fill")
        assert (_light(background), _light(ink)) == ((False, True) if dark else (True, False))


@pytest.mark.parametrize("width", [390, 1280])
async def test_hostile_names_are_text(browser: Browser, tmp_path: Path, width: int) -> None:
    file = tmp_path / "report.html"
    html.write(comparison(8, 8, by_design=8, names=HOSTILE, error="</dd><script>window.hacked = 1</script>"), file)
    async with browser.page(file, width=width) as page:
        await _is_quiet_and_fits(page, file)
        assert await page.evaluate("window.hacked") is None
        assert await page.evaluate("document.querySelectorAll('script').length") == 1
        assert await page.evaluate("document.querySelectorAll('svg').length") == 13
        assert (
            await page.evaluate("document.querySelectorAll('img, iframe, object, embed, link, base, svg[onload]').length")
            == 0
        )
        addresses = await page.evaluate("[...document.querySelectorAll('a')].map(one => one.getAttribute('href'))")
        assert addresses and all(address.startswith("#") for address in addresses)
        found = await page.evaluate("document.querySelector('section:has(#disagreements)').innerText")
        for number, name in HOSTILE.items():
            shown = {
                2: HOSTILE[2].replace("\u202e", "\\u202e").replace("\u2066", "\\u2066").replace("\u200f", "\\u200f"),
                7: "a\\u0000b\\u001b[31m",
            }.get(number, name)
            assert f"{shown}:http" in found
        assert "could not be run to the end" in await page.evaluate("document.querySelector('h1').textContent")
        assert "<script>window.hacked = 1</script>" in await page.evaluate("document.querySelector('dl').innerText")


async def test_the_page_forbids_other_scripts_and_requests(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    html.write(comparison(8, by_design=0), file)
    (tmp_path / "other.js").write_text("window.hacked = 1")
    async with browser.page(file, width=800) as page:
        for attributes in ("{textContent: 'window.hacked = 1'}", "{src: 'other.js'}"):
            await page.evaluate(f"document.body.append(Object.assign(document.createElement('script'), {attributes}))")
        await page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=x onclick=\"window.hacked = 1\">')")
        await page.evaluate("document.getElementById('x').click()")
        assert await page.evaluate("fetch('other.js').then(() => 'fetched', () => 'refused')") == "refused"
        assert await page.evaluate("new Promise(done => setTimeout(() => done(window.hacked), 100))") is None


async def test_filter_of_frontends(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    html.write(comparison(60, 3, by_design=5), file)
    async with browser.page(file, width=1280) as page:
        assert await page.evaluate(_SHOWN) == 60
        await page.evaluate(_typed("text", "TEAM-2/ 10.96.0.9"))
        assert await page.evaluate(_SHOWN) == 1
        await page.evaluate(_typed("text", ""))
        await page.evaluate(_typed("state", "differs"))
        assert await page.evaluate(_SHOWN) == 3
        assert await page.evaluate("document.querySelector('.filter output').textContent") == "3 of 60"
        await page.evaluate(_typed("state", "design"))
        assert await page.evaluate(_SHOWN) == 2
        assert page.logged == []


async def test_without_scripts_all_is_to_be_read(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    html.write(comparison(), file)
    async with browser.page(file, width=390, script=False) as page:
        assert await page.evaluate("getComputedStyle(document.querySelector('.filter')).display") == "none"
        assert await page.evaluate(_SHOWN) == 60
        assert page.logged == []


async def test_large_state_is_cut_and_says_so(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    html.write(comparison(2100, 400, by_design=0), file)
    async with browser.page(file, width=390) as page:
        await _is_quiet_and_fits(page, file)
        text = await page.evaluate("document.body.textContent")
        assert "300 of 400 are shown here" in text
        assert "2000 of 2100 frontends are shown here" in text
        states = await page.evaluate("[...document.querySelectorAll('tr[data-state]')].map(row => row.dataset.state)")
        assert states == ["differs"] * 400 + ["agrees"] * 1600


async def test_print_unfolds_everything(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    html.write(comparison(60, 40, by_design=12), file)
    folded = "[...document.querySelectorAll('details:not([open]) tbody tr')].map(row => row.checkVisibility())"
    async with browser.page(file, width=800) as page:
        assert await page.evaluate(folded) == [False] * 26
    async with browser.page(file, width=800, dark=True, media="print") as page:
        assert await page.evaluate(folded) == [True] * 26
        assert await page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert _light(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert not _light(await page.evaluate("getComputedStyle(document.querySelector('figure text')).fill"))


async def _is_quiet_and_fits(page: Page, file: Path) -> None:
    assert page.requests == [file.as_uri()]
    assert page.logged == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert await page.evaluate(_OVER) == []


def _typed(field: str, value: str) -> str:
    return (
        f"{{const field = document.querySelector('.filter').elements.{field}; field.value = '{value}';"
        "field.dispatchEvent(new Event('input', {bubbles: true}))}"
    )


def _light(colour: str) -> bool:
    """Of `rgb(…)`."""
    values = [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    return sum(values) / 3 > 128
