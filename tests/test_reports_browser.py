"The viewer and the reports in a real browser: what moves, what stands without script, on paper, for a screen reader"
import io
import json
from dataclasses import replace

import numpy as np
import pypdfium2
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import visit
from PIL import Image
from test_inference import explainer_of

from skin_gradcam.inference import Unreadable, data_uri, template
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.reports import html_report, picture_report
from skin_gradcam.viewer import view, viewer_text

pytestmark = pytest.mark.browser
SHOWN = """[...document.querySelectorAll(".vw-panel")].filter(p => p.checkVisibility())
    .map(p => p.dataset.vwPanel ?? "picture")"""
LATE = SHOWN.replace('.vw-panel', '#late .vw-panel')
CLIPPED = """[...document.querySelectorAll("body *")]
    .filter(e => e.checkVisibility() && !e.closest("svg, .skip, .dot"))
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 90))"""
OPACITY = 'e => getComputedStyle(e).opacity'


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
    drawn = [(f'phantom {i}.jpg', draw_phantom(dx, i).image) for i, dx in enumerate(('nv', 'bkl', 'mel', 'nv'))]
    found = explainer_of(tmp_path_factory.mktemp('bundle')/'tiny').batch(drawn)
    found[1] = replace(found[1], notes=('blurred',), views=8, prior=(.7, .2, .1), name='z' * 120 + '.jpg')
    refused = dict(decision='not_dermoscopic', reason='strangeness 9 is above 5', strangeness=9., strange_above=5.)
    found[2] = replace(found[2], **refused)
    return [*found, Unreadable('notes.txt', 'not a picture')]


@pytest.fixture(scope='module')
def files(answers, tmp_path_factory):
    out = tmp_path_factory.mktemp('reports')
    return dict(picture=picture_report(answers[0], out/'picture.html', b'file'),
                remarks=picture_report(answers[1], out/'remarks.html'),
                strange=picture_report(answers[2], out/'strange.html'),
                folder=html_report(answers, out/'folder.html', 'Phantoms', {'folder': 'drawn'}))


@pytest.fixture
def dumb(browser):
    "A page in a browser that runs no script"
    context = browser.new_context(java_script_enabled=False, viewport={'width': 320, 'height': 800})
    yield context.new_page()
    context.close()


def violations(page):
    found = Axe().run(page).response['violations']
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found]


LOOKS = [('picture', 1280, 'light'), ('picture', 320, 'dark'), ('remarks', 390, 'light'), ('strange', 320, 'light'),
         ('folder', 1280, 'dark'), ('folder', 320, 'light')]


@pytest.mark.parametrize('name,width,scheme', LOOKS)
def test_axe_finds_nothing(page, files, name, width, scheme):
    asked, said = visit(page, files[name], width, scheme)
    assert [u for u in asked if not u.startswith('data:')] == [files[name].as_uri()] and said == []
    assert violations(page) == []


def test_controls_by_keyboard(page, files, answers):
    "Classes with the arrows, maps and outline with the space bar, opacity with the arrows"
    page.goto(files['picture'].as_uri())
    top = answers[0].top
    assert page.evaluate(SHOWN) == [top]
    page.locator(f'.vw [data-vw-set=show][value={top}]').focus()
    seen = [top]
    for _ in range(5):
        page.keyboard.press('ArrowRight')
        seen += page.evaluate(SHOWN)
    assert len(set(seen)) == 6 and {'nv', 'bkl', 'mel'} < set(seen)

    layer, line = (page.locator(f'.vw-on .vw-{o}') for o in ('layer', 'line'))
    page.locator(f'.vw [data-vw-set=show][value={top}]').check(force=True)
    page.locator('[data-vw-set=alpha]').focus()
    page.keyboard.press('End')
    assert layer.evaluate(OPACITY) == '1' and page.locator('output').text_content() == '100 %'
    page.keyboard.press('Home')
    assert layer.evaluate(OPACITY) == '0'
    page.locator('[data-vw-set=line]').focus()
    page.keyboard.press('Space')
    assert line.evaluate('e => getComputedStyle(e).visibility') == 'hidden'
    page.locator('[data-vw-set=map]').focus()
    page.keyboard.press('Space')
    assert layer.evaluate('e => getComputedStyle(e).visibility') == 'hidden'
    page.locator('[data-vw-set=alpha]').focus()
    page.keyboard.press('ArrowRight')                       # whoever moves the slider wants to see the map
    assert layer.evaluate('e => getComputedStyle(e).visibility') == 'visible'
    assert page.locator('[data-vw-set=map]').is_checked()


def test_the_browser_paints_what_display_paints(page, files, answers):
    page.goto(files['picture'].as_uri())
    page.locator('[data-vw-set=line]').uncheck()
    shot = np.asarray(Image.open(io.BytesIO(page.locator('.vw-on svg').screenshot())).convert('RGB'), dtype=float)
    h, w = shot.shape[:2]
    mine = answers[0].overlay(max_side=None, outline=None, note=False).resize((w, h), Image.Resampling.BILINEAR)
    plain = answers[0].picture.resize((w, h), Image.Resampling.BILINEAR)
    inner = (slice(10, -10), slice(10, -10))                # corners are round
    off = np.abs(shot - np.asarray(mine, dtype=float))[inner].mean()
    assert off < 3 and off < .3*np.abs(shot - np.asarray(plain, dtype=float))[inner].mean()


def test_viewers_of_one_page_are_apart(page, files):
    page.goto(files['folder'].as_uri())
    before = page.evaluate(SHOWN)
    page.locator('#p1 [data-vw-set=show]').last.check(force=True)
    page.locator('#p1 [data-vw-set=map]').uncheck()
    after = page.evaluate(SHOWN)
    assert before[1:] == after[1:] and before[0] != after[0]
    assert page.locator('.vw-plain').count() == 1


def test_without_script_all_maps_stand_side_by_side(dumb, files):
    for name, n in dict(picture=7, strange=0, folder=15).items():
        dumb.goto(files[name].as_uri())
        assert dumb.locator('.vw-panel:visible').count() == n
        assert dumb.locator('.vw-controls:visible, .sift:visible').count() == 0
        assert dumb.locator('table').first.is_visible() == (name != 'strange')   # its numbers are folded away


def test_the_summary_is_found_and_ordered(page, files, answers):
    page.goto(files['folder'].as_uri())
    names = 'table.pics tbody tr:visible td.name'
    assert page.locator('.sift output').text_content() == '5 of 5 shown'
    page.locator('.sift [name=name]').fill('PHANTOM')
    assert page.locator(names).all_inner_texts() == ['phantom 0.jpg', 'phantom 2.jpg', 'phantom 3.jpg']
    assert page.locator('article:visible').count() == 3
    page.locator('.sift [name=decision]').select_option('not dermoscopic')
    assert page.locator(names).all_inner_texts() == ['phantom 2.jpg']
    page.locator('.sift [name=decision]').select_option('')
    page.locator('.sift [name=name]').fill('')
    page.locator('.sift [name=order]').select_option('mel')
    usable = [a for a in answers if getattr(a, 'usable', False)]
    best = sorted(usable, key=lambda a: -a.p[2])
    assert page.locator(names).all_inner_texts()[:3] == [a.name for a in best]
    assert page.locator('th[aria-sort=descending]').inner_text() == 'mel'
    page.locator('.sift [name=order]').select_option('')
    assert page.locator(names).all_inner_texts() == [a.name for a in answers]


POLICY = "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'"


def test_the_viewer_keeps_a_strict_policy_and_may_come_late(page, answers):
    "As the web page has it: no inline style or script, and a second viewer put in after the page is loaded"
    module = template('viewer.html.j2').module
    early, late = (module.viewer(view(answers[0], data_uri(answers[0].picture), k)) for k in ('early', 'late'))
    html = ('<!doctype html><html lang="en"><title>t</title><link rel="stylesheet" href="/viewer.css">'
            f'<script src="/explain.js"></script><main><h1>t</h1>{early}<div id="late"></div></main>')

    def answer(route):
        name = route.request.url.rpartition('/')[2]
        kind = {'viewer.css': 'text/css', 'explain.js': 'text/javascript'}.get(name, 'text/html')
        body = viewer_text(name) if name in ('viewer.css', 'explain.js') else html
        route.fulfill(body=body, content_type=kind, headers={'Content-Security-Policy': POLICY})
    said = []
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.route('http://viewer.test/**', answer)
    page.goto('http://viewer.test/')
    page.evaluate(f'''document.getElementById("late").append(
        ...new DOMParser().parseFromString({json.dumps(str(late))}, "text/html").body.children)''')
    assert len(page.evaluate(SHOWN)) == 2
    page.locator('#late [data-vw-set=show]').last.check(force=True)
    assert page.evaluate(LATE) == [view(answers[0], 'data:,')['layers'][-1]['id']]
    page.locator('#late [data-vw-set=alpha]').fill('20')
    assert page.locator('#late .vw-on .vw-layer').evaluate(OPACITY) == '0.2'
    assert page.locator('.vw').first.locator('.vw-on .vw-layer').evaluate(OPACITY) == '0.6'
    assert said == []


@pytest.mark.parametrize('paper', ['A4', 'Letter'])
def test_reports_print_to_pdf(page, files, paper):
    "All maps, light, nothing cut off, no control, whatever was set on the screen"
    page.emulate_media(color_scheme='dark')
    for name, (pages, pictures) in dict(picture=(3, 7+6), strange=(3, 1), folder=(5, 4+3*4+3*4)).items():
        page.goto(files[name].as_uri())
        if name == 'picture':
            page.locator('[data-vw-set=map]').uncheck()
            page.locator('[data-vw-set=alpha]').fill('0')
        pdf = pypdfium2.PdfDocument(page.pdf(format=paper))
        assert 1 < len(pdf) <= pages
        text = ' '.join(' '.join(p.get_textpage().get_text_bounded() for p in pdf).split())
        assert 'This is not a medical device' in text and 'Opacity' not in text and 'Decision all' not in text
        first = np.asarray(pdf[0].render(scale=.5).to_pil().convert('RGB'))
        assert (first[[0, -1]] == 255).all() and (first[:, [0, -1]] == 255).all() and np.median(first) == 255
        drawn = sum(o.type == pypdfium2.raw.FPDF_PAGEOBJ_IMAGE for p in pdf for o in p.get_objects(max_depth=9))
        assert drawn >= pictures, (name, drawn)
    page.emulate_media(media='print', color_scheme='light')
    page.set_viewport_size(dict(width=688 if paper == 'A4' else 710, height=900))
    for f in files.values():
        page.goto(f.as_uri())
        assert page.evaluate(CLIPPED) == []
