"The docs site in a real browser, at desk and phone width"
from __future__ import annotations

import ast
import functools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import build_docs
import pytest
import yaml
from check_links import CDN
from conftest import ROOT
from test_reports_browser import violations

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

    go.problems, go.page = problems, page
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
    link = page.locator('#quarto-sidebar a[href="tutorials/ham10000.html"]')
    link.wait_for(state='hidden')
    page.locator('.quarto-secondary-nav button:visible, .quarto-btn-toggle:visible').first.click()
    link.wait_for()


def test_search(visit) -> None:
    "A name typed into the search box leads to its page"
    page = visit('index.html')
    box = page.locator('input[type=search]:visible, input[type=text]:visible').first
    if not box.count():
        page.locator('[aria-label*=earch]:visible').first.click()
        box = page.locator('input[type=search]:visible, input[type=text]:visible').first
    box.press_sequentially('class_index')
    page.wait_for_selector('a[href*="lesions.html"]:visible')


LOOKED_AT = ('index', 'gradcam', 'inference', 'tutorials/ham10000', 'demos/draw_the_evidence',
             'files/skin_gradcam/gradcam.py')


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_everybody_can_read_it(visit, width: str, scheme: str) -> None:
    "axe finds nothing on a page of each kind, light and dark; it fits, asks for nothing, complains of nothing"
    found = []
    for name in LOOKED_AT:
        visit.page.emulate_media(color_scheme=scheme)
        page = visit(f'{name}.html', width)
        found += [f'{name}: {v}' for v in violations(page)]
        if wide := page.evaluate(TOO_WIDE): found.append(f'{name}: wider than the {width}: {wide}')
        light = page.evaluate('getComputedStyle(document.body).backgroundColor').count('255') == 3
        if light != (scheme == 'light'): found.append(f'{name}: not {scheme}')
    assert found + visit.problems == []


def test_dark_by_the_switch(visit) -> None:
    "The switch turns the scheme, and the next page remembers it"
    page = visit('index.html')
    dark = "document.documentElement.classList.contains('quarto-dark')"
    assert not page.evaluate(dark)
    page.locator('.quarto-color-scheme-toggle:visible').first.click()
    page.wait_for_function(dark)                                        # the style sheet may have to come first
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(34, 34, 34)'
    visit('gradcam.html').wait_for_function(dark)


def test_every_page_opens_as_notebook(visit, site: Path) -> None:
    "Each page links to its notebook, which is the one in the repository; one is downloaded by a click"
    for notebook, new in build_docs.page_names(ROOT / 'nbs').items():
        page = (site / new).with_suffix('.html').read_text(encoding='utf-8')
        href = re.search(r'<p class="page-links"><a href="([^"]+)" download>', page)
        assert href, f'{new}: no link to its notebook'
        kept = ((site / new).parent / href[1]).resolve()
        assert kept == (site / 'notebooks' / notebook).resolve() and json.loads(kept.read_text())['cells']
    page = visit('tutorials/ham10000.html', 'phone')
    with page.expect_download() as download: page.locator('.page-links a[download]').click()
    got = json.loads(Path(download.value.path()).read_text())
    assert ''.join(got['cells'][0]['source']).startswith('# ') and visit.problems == []


def test_every_page_is_in_the_sidebar() -> None:
    contents = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']['sidebar']['contents']
    there = list(build_docs.listed(contents))
    assert sorted(there) == sorted(build_docs.page_names(ROOT / 'nbs')), 'see website.sidebar in _quarto.yml'


def test_sidebar_fits_the_pages(tmp_path: Path, capsys) -> None:
    "A page that is not there is dropped with its empty section, and said; the file that a link leads to is left alone"
    text = 'website: {sidebar: {contents: [{href: index.ipynb}, {section: A, contents: [a.ipynb]}, 10_b.ipynb]}}'
    (tmp_path / 'own.yml').write_text(text)
    (tmp_path / '_quarto.yml').symlink_to('own.yml')
    names = {'index.ipynb': 'index.ipynb', '10_b.ipynb': 'b.ipynb', 'c.ipynb': 'c.ipynb'}
    build_docs.stage_sidebar(tmp_path / '_quarto.yml', names)
    made = yaml.safe_load((tmp_path / '_quarto.yml').read_text())
    assert made == {'website': {'sidebar': {'contents': [{'href': 'index.ipynb'}, 'b.ipynb']}}}
    assert (tmp_path / 'own.yml').read_text() == text
    said = capsys.readouterr().err
    assert 'a.ipynb: no such page, but in' in said and 'c.ipynb: not in the sidebar' in said


def test_every_public_name_has_its_entry(site: Path) -> None:
    "What a module's `__all__` names has an anchor on the module's page, and what it is stands there"
    missing = []
    for notebook, new in build_docs.page_names(ROOT / 'nbs').items():
        module = build_docs.module_of((ROOT / 'nbs' / notebook).read_text(encoding='utf-8'))
        if not module: continue
        page = (site / new).with_suffix('.html').read_text(encoding='utf-8')
        ids = set(re.findall(r'\bid="([^"]+)"', page))
        tree = ast.parse((ROOT / f'skin_gradcam/{module}.py').read_text(encoding='utf-8'))
        missing += [f'{module}.{n}' for n in build_docs.public_names(tree) if not {n, n.lower()} & ids]
    assert missing == []
    lesions = (site / 'lesions.html').read_text(encoding='utf-8')
    entry = re.search(r'id="CLASSES" class="anchored">CLASSES</h3><pre tabindex="0"><code>([^<]*)</code>', lesions)
    assert entry and entry[1].startswith('CLASSES = (')


def test_headings_step_down() -> None:
    page = build_docs.stepped('<h1>a</h1><h3 class="x">b</h3><h4>c</h4><h2>d</h2><header>')
    assert page == '<h1>a</h1><h3 aria-level="2" class="x">b</h3><h4 aria-level="3">c</h4><h2>d</h2><header>'


@pytest.mark.skipif(not shutil.which('npm'), reason='no npm found: apt-get install npm')
def test_diagrams_are_drawn_without_a_network(visit, site: Path, tmp_path: Path) -> None:
    "A diagram's script comes from npm at build time, then from the site"
    source = f'{CDN[0]}11.4.1/dist/mermaid.esm.min.mjs'
    page = build_docs.local_diagrams(f"""<!doctype html><html lang="en"><title>t</title>
        <pre class="mermaid">flowchart LR; data --> training --> maps</pre>
        <script type="module">import mermaid from '{source}'; mermaid.initialize({{startOnLoad: true}});</script>
        """, 'drawn', site)
    assert 'https:' not in page
    (site / 'drawn').mkdir(exist_ok=True)
    (site / 'drawn/diagram.html').write_text(page)
    try:
        shown = visit('drawn/diagram.html')
        shown.locator('pre.mermaid svg', has_text='training').wait_for()
        assert visit.problems == []
    finally:
        shutil.rmtree(site / 'drawn')
        shutil.rmtree(site / 'site_libs/mermaid')
