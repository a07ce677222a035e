"The docs site in a real browser, at desk and phone width"
from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from check_links import CDN

pytestmark = pytest.mark.browser
WIDTHS = {'desk': (1280, 900), 'phone': (390, 844)}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None: pass


@pytest.fixture(scope='module')
def address(site: Path) -> Iterator[str]:
    "The site behind a server on this machine, in a folder as it would be hosted"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(page, address: str):
    "Open a page of the site; what its console and its network complained of goes into `visit.problems`"
    problems = []

    def route(r) -> None:
        if r.request.url.startswith((address, 'data:', 'blob:')): return r.continue_()
        if not r.request.url.startswith(CDN): problems.append(f'asks the network for {r.request.url}')
        r.abort()

    def console(m) -> None:
        if m.type == 'error' and not m.location.get('url', '').startswith(CDN): problems.append(f'console: {m.text}')

    page.route('**/*', route)
    page.on('console', console)
    page.on('pageerror', lambda e: problems.append(f'script error: {e}'))
    page.on('response', lambda r: problems.append(f'{r.status} {r.url}') if r.status >= 400 else None)

    def go(name: str, width: str = 'desk'):
        page.set_viewport_size(dict(zip(('width', 'height'), WIDTHS[width], strict=True)))
        page.goto(f'{address}/{name}', wait_until='load')
        return page

    go.problems = problems
    return go


BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80))"
TOO_WIDE = """() => {
  const room = document.documentElement.clientWidth, wide = document.documentElement.scrollWidth;
  const free = e => e.tagName == 'MAIN' || (getComputedStyle(e).overflowX == 'visible' && free(e.parentElement));
  const out = e => e.getBoundingClientRect().right > room + 1 && free(e);
  const cut = [...document.querySelectorAll('main *')].filter(out).slice(0, 3);
  return [...(wide > room ? [`${wide} > ${room} px`] : []), ...cut.map(e => e.outerHTML.slice(0, 120))];
}"""


@pytest.mark.parametrize('width', WIDTHS)
def test_pages(visit, site: Path, width: str) -> None:
    "No page is wider than its window, has a broken picture or a console error, or asks the network for anything"
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if 'site_libs' not in p.parts)
    found = []
    assert 'index.html' in names and len(names) > 3
    for name in names:
        page = visit(name, width)
        page.evaluate("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
        page.wait_for_function('[...document.images].every(i => i.complete)')
        found += [f'{name}: broken picture {src}' for src in page.evaluate(BROKEN)]
        if wide := page.evaluate(TOO_WIDE): found.append(f'{name}: wider than the {width}: {wide}')
        if not page.title(): found.append(f'{name}: no title')
        found += [f'{name}: {p}' for p in visit.problems]
        visit.problems.clear()
    assert not found, '\n'.join(found)


def test_phone_menu(visit) -> None:
    "On a phone the pages are reached through the menu, which is shut at first"
    page = visit('index.html', 'phone')
    link = page.locator('a[href="lesions.html"]:visible')
    before = link.count()
    page.locator('.quarto-secondary-nav button:visible, .quarto-btn-toggle:visible').first.click()
    page.wait_for_function("[...document.querySelectorAll('a[href=\"lesions.html\"]')].some(a => a.offsetParent)")
    assert link.count() >= max(1, before)


def test_search(visit) -> None:
    "A name typed into the search box leads to its page"
    page = visit('index.html')
    box = page.locator('input[type=search]:visible, input[type=text]:visible').first
    if not box.count():
        page.locator('[aria-label*=earch]:visible').first.click()
        box = page.locator('input[type=search]:visible, input[type=text]:visible').first
    box.press_sequentially('class_index')
    page.wait_for_selector('a[href*="lesions.html"]:visible')
