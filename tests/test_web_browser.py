"The web page in Chromium: every way in, the viewer, errors, keyboard, phone, no script, accessibility, weight"
import base64
import io
import re
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect
from test_inference import explainer_of
from test_webapp import picture
from waitress import wasyncore
from waitress.server import create_server

from skin_gradcam.lesions import DISCLAIMER
from skin_gradcam.webapp import Settings, create_app

pytestmark = pytest.mark.browser
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF')


@pytest.fixture(scope='module')
def explainer(tmp_path_factory):
    return explainer_of(tmp_path_factory.mktemp('bundle')/'tiny')


@pytest.fixture(scope='module')
def start(explainer):
    "Starts servers on free ports, gives their addresses"
    running = []

    def run(settings):
        app = create_app(explainer, settings)
        server = create_server(app, host='127.0.0.1', port=0, threads=8, clear_untrusted_proxy_headers=True)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread, app))
        return f'http://127.0.0.1:{server.effective_port}'
    yield run
    for server, thread, app in running:
        # in the thread of its loop
        server.trigger.pull_trigger(lambda s=server: wasyncore.close_all(s._map, ignore_all=True))
        thread.join(5)
        server.task_dispatcher.shutdown()
        app.extensions['skin_gradcam'].batcher.close()


@pytest.fixture(scope='module')
def address(start): return start(Settings(rate_limit='', max_bytes=2**20))


@pytest.fixture
def home(page, address):
    "The start page; a console message or an error of the script fails the test"
    said = []
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.asked, page.expected = [], []
    page.on('request', lambda r: page.asked.append(r.url))
    page.goto(address)
    yield page
    allowed = re.compile('|'.join([r'status of 4\d\d', *page.expected]))  # Chromium's own note on a refused upload
    assert [s for s in said if not allowed.search(s)] == []
    assert [u for u in page.asked if not u.startswith((address, 'data:'))] == []


def answer(page, text='Looks most like'):
    "The heading of the answer, once it is there"
    heading = page.locator('#answer-title')
    expect(heading).to_contain_text(text, timeout=10_000)
    return heading


def file(fmt='JPEG', seed=1):
    return dict(name='photo.dat', mimeType='application/octet-stream', buffer=picture(seed, fmt))


@pytest.mark.parametrize('fmt', FORMATS)
def test_every_format_by_the_file_picker(home, fmt):
    home.set_input_files('#picture', file(fmt))
    heading = answer(home)
    assert heading.evaluate('e => e === document.activeElement')
    assert home.locator('#status').inner_text().startswith('Looks most like')
    assert home.locator('.vw-on').count() == 1
    assert home.locator('.probs dd b').count() == 3
    assert home.locator('.answer').get_by_text(DISCLAIMER).count() == 1
    assert home.locator('#preview').is_visible() == (fmt != 'TIFF')  # Chromium shows no TIFF; the answer does


def put(page, how, data, target='document'):
    "Paste or drop a file, as the browser would tell the page"
    page.evaluate(
        '''([how, b64, target]) => {
        const bytes = Uint8Array.from(atob(b64), c => c.charCodeAt(0)), d = new DataTransfer()
        d.items.add(new File([bytes], 'x.jpg', {type: 'image/jpeg'}))
        const more = {bubbles: true, cancelable: true}
        const e = how === 'paste' ? new ClipboardEvent('paste', {clipboardData: d, ...more})
          : new DragEvent(how, {dataTransfer: d, ...more})
        document.querySelector(target).dispatchEvent(e)
    }''',
        [how, base64.b64encode(data).decode(), target],
    )


def test_paste(home):
    put(home, 'paste', picture(), 'body')
    answer(home)


def test_drop(home):
    put(home, 'dragover', picture(), '#form')
    assert 'over' in home.locator('#form').get_attribute('class')
    put(home, 'drop', picture(), '#form')
    answer(home)
    assert 'over' not in home.locator('#form').get_attribute('class')


def test_every_demo(home):
    for code in ('nv', 'bkl', 'mel', 'chart'):
        with home.expect_response('**/answer') as got: home.locator(f'[name=demo][value={code}]').click()
        assert got.value.status == 200
        expect(home.locator('#work')).to_be_hidden()
        answer(home, '')
    assert len({u for u in home.asked if u.endswith('/answer')}) == 1


def opacity(page): return float(page.locator('.vw-on .vw-layer').evaluate('e => getComputedStyle(e).opacity'))


def test_the_map_can_be_faded_switched_and_taken_off(home):
    home.set_input_files('#picture', file())
    answer(home)
    assert opacity(home) == pytest.approx(.6)
    slider = home.locator('[data-vw-set=alpha]')
    slider.focus()
    for _ in range(4): home.keyboard.press('ArrowRight')
    assert opacity(home) == pytest.approx(.8)
    for code in ('nv', 'bkl', 'mel'):
        home.locator(f'.vw-pick:has(input[value={code}])').click()
        assert home.locator('.vw-on').get_attribute('data-vw-panel') == code
    contrast = home.locator('input[data-vw-set=show][value*="-"]').first
    contrast.locator('..').click()
    assert home.locator('.vw-on').get_attribute('data-vw-panel') == contrast.get_attribute('value')
    assert 'rather than' in home.locator('.vw-on figcaption').inner_text()
    home.locator('[data-vw-set=map]').uncheck()
    assert home.locator('.vw-on .vw-layer').evaluate('e => getComputedStyle(e).visibility') == 'hidden'


def box(page): return [float(v) for v in page.locator('.vw-on svg').get_attribute('viewBox').split()]


def test_zoom_by_button_keys_drag_and_click(home):
    home.set_input_files('#picture', file())
    answer(home)
    whole = box(home)
    home.locator('[data-zoom="1"]').click()
    near = box(home)
    assert near[2] == pytest.approx(whole[2]/1.5, rel=.01) and home.locator('.zoom output').inner_text() == '150 %'
    home.locator('.vw-stage').focus()
    home.keyboard.press('ArrowRight')
    assert box(home)[0] > near[0] and box(home)[1] == near[1]
    r = home.locator('.vw-on svg').bounding_box()
    before = box(home)
    home.mouse.move(r['x'] + r['width']/2, r['y'] + r['height']/2)
    home.mouse.down()
    home.mouse.move(r['x'] + r['width']/2 + 60, r['y'] + r['height']/2 + 40, steps=4)
    home.mouse.up()
    assert box(home)[0] < before[0] and box(home)[1] < before[1]
    home.mouse.click(r['x'] + 5, r['y'] + 5)  # without moving: the place comes to the middle, as far as the frame goes
    assert box(home)[:2] == pytest.approx([0, 0], abs=.2)
    home.locator('.vw-pick:has(input[value=bkl])').click()
    assert box(home)[2] == pytest.approx(near[2])  # another map, the same part
    for _ in range(3): home.locator('[data-zoom="-1"]').click()
    assert box(home) == pytest.approx(whole)


def test_errors_say_what_to_do_and_the_next_picture_works(home):
    cases = [
        (b'<!doctype html><script>', 'Not a picture', 'save it as JPEG or PNG'),
        (picture()[:3000], 'cannot be used', 'save it again'),
        (b'', 'cannot be used', 'copy it again'),
        (picture() + b'0' * 2**20, 'Too many bytes', 'Make the picture smaller'),
    ]
    for data, title, todo in cases:
        home.set_input_files('#picture', dict(name='a.jpg', mimeType='image/jpeg', buffer=data))
        expect(home.locator('#answer .lead')).to_contain_text(todo)
        expect(home.locator('#answer-title')).to_contain_text(title)
        expect(home.locator('#status')).to_contain_text(title)
    assert sum(u.endswith('/answer') for u in home.asked) == 3  # the large one was not even sent
    home.set_input_files('#picture', file())
    answer(home)


def test_a_service_that_is_away_or_answers_something_else(home, address):
    home.expected.extend(['ERR_FAILED', 'status of 502'])
    home.route('**/answer', lambda r: r.abort())
    home.set_input_files('#picture', file())
    answer(home, 'cannot be reached')
    home.unroute('**/answer')
    home.route('**/answer', lambda r: r.fulfill(status=502, body='<h1>Bad gateway</h1>', content_type='text/plain'))
    home.set_input_files('#picture', file())
    expect(home.locator('#answer-title')).to_have_text('No answer')
    assert '502' in home.locator('#answer .lead').inner_text()


def test_busy_and_too_often_are_told(page, start):
    page.goto(start(Settings(rate_limit='1 per minute')))
    page.locator('[name=demo][value=nv]').click()
    answer(page)
    page.locator('[name=demo][value=mel]').click()
    expect(page.locator('#answer-title')).to_contain_text('Too many requests')
    assert 'wait' in page.locator('#answer .lead').inner_text()


def test_cancel(home):
    home.route('**/answer', lambda r: None)  # never answered
    home.set_input_files('#picture', file())
    home.locator('#cancel').click()
    expect(home.locator('#status')).to_have_text('Cancelled.')
    assert home.locator('#work').is_hidden() and home.locator('#answer').inner_text() == ''


def test_keyboard_alone(home):
    "Tab to the skip link, the picker, a demo; the answer takes the focus, its controls follow, none is under the bar"
    home.keyboard.press('Tab')
    assert home.evaluate('document.activeElement.className') == 'skip'
    home.keyboard.press('Enter')
    seen = []
    for _ in range(12):
        home.keyboard.press('Tab')
        seen.append(home.evaluate('document.activeElement.id || document.activeElement.value'))
        if seen[-1] == 'mel': break
    assert {'picture', 'nv', 'bkl', 'mel'} <= set(seen)
    home.keyboard.press('Enter')
    answer(home)
    places = []
    for _ in range(14):
        home.keyboard.press('Tab')
        places.append(
            home.evaluate('''() => { const e = document.activeElement, r = e.getBoundingClientRect()
            const bar = document.querySelector('.always').getBoundingClientRect()
            const out = e.closest('.always') || e === document.body
            return [e.dataset.vwSet || e.dataset.zoom || e.className, out ? -1 : r.bottom - bar.top] }''')
        )
    assert {'show', 'alpha', 'map', 'line', '1', '-1', 'vw-stage'} <= {p for p, _ in places}
    assert [p for p in places if p[1] > 1] == []


@pytest.mark.parametrize('width', [320, 390])
def test_phone(browser, address, width):
    context = browser.new_context(
        viewport=dict(width=width, height=640), has_touch=True, is_mobile=True, device_scale_factor=2
    )
    page = context.new_page()
    for part in ('/', '/grad-cam', '/about', '/api'):
        page.goto(address + part)
        assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.goto(address)
    assert page.locator('#camera').get_attribute('capture') == 'environment'
    assert page.locator('.camera').is_visible()
    page.set_input_files('#camera', file())
    answer(page)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    small = page.evaluate('''[...document.querySelectorAll('button, .button, .row button, .vw-pick')]
        .filter(e => e.offsetParent).map(e => [e.innerText, e.getBoundingClientRect()])
        .filter(([, r]) => r.width < 24 || r.height < 24).map(([t]) => t)''')
    assert small == []  # WCAG 2.2, 2.5.8
    context.close()


def test_without_script(browser, address):
    context = browser.new_context(java_script_enabled=False, viewport=dict(width=1000, height=800))
    page = context.new_page()
    page.goto(address)
    page.set_input_files('#picture', file())
    page.get_by_role('button', name='Explain it').click()
    answer(page)
    assert page.url.endswith('/answer#answer')
    shown = page.locator('.vw-panel').evaluate_all('a => a.filter(e => e.offsetParent).length')
    assert shown >= 4  # all maps, side by side
    assert not page.locator('.vw-controls').is_visible() and not page.locator('[data-print]').is_visible()
    page.locator('[name=demo][value=mel]').click()
    answer(page)
    page.get_by_role('button', name='Explain it').click()  # nothing chosen
    assert 'choose a file' in page.locator('#answer .lead').inner_text()
    context.close()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe(page, address, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion='reduce')

    def check():
        found = Axe().run(page, options=dict(resultTypes=['violations'])).response['violations']
        assert [(v['id'], n['html'][:200], n['failureSummary'][:300]) for v in found for n in v['nodes']] == []
    for part in ('/', '/grad-cam', '/about', '/api', '/nowhere'):
        page.goto(address + part)
        check()
    page.goto(address)
    page.locator('[name=demo][value=mel]').click()
    answer(page)
    check()
    page.set_input_files('#picture', dict(name='a.jpg', mimeType='image/jpeg', buffer=b'no picture'))
    page.locator('.refused').wait_for()
    check()


def test_weight(page, address):
    "What the start page loads, all of it, before compression"
    sizes = []
    page.on('response', lambda r: sizes.append((r.url, len(r.body()))))
    page.goto(address, wait_until='networkidle')
    assert len(sizes) >= 7 and sum(n for _, n in sizes) < 100_000, sizes


def test_print(home):
    home.set_input_files('#picture', file())
    answer(home)
    home.locator('[data-zoom="1"]').click()
    home.evaluate('dispatchEvent(new Event("beforeprint"))')
    assert home.locator('.zoom output').inner_text() == '100 %'
    home.emulate_media(media='print')
    shown = home.locator('.vw-panel').evaluate_all('a => a.filter(e => e.offsetParent).length')
    assert shown >= 4 and not home.locator('.vw-controls').is_visible() and not home.locator('#form').is_visible()
    assert home.locator('.answer').get_by_text(DISCLAIMER).is_visible() and home.locator('.answer table').is_visible()
    pages = home.pdf(format='A4').count(b'/Type /Page\n')
    assert 1 <= pages <= 3


def test_the_policy_holds_against_what_gets_in(home):
    "Were markup to get into an answer, it would not run"
    evil = ('<article class="answer card" data-said="x"><h2 id="answer-title">in</h2>'
            '<img src=x onerror="window.owned=1"><style>body{display:none}</style></article>')
    home.route('**/answer', lambda r: r.fulfill(status=200, body=evil, content_type='text/html'))
    home.expected.append('Content Security Policy')
    home.expected.append('status of 404')
    home.evaluate('addEventListener("securitypolicyviolation", e => (window.blocked ||= []).push(e.violatedDirective))')
    home.set_input_files('#picture', file())
    answer(home, 'in')
    home.wait_for_timeout(300)
    blocked = home.evaluate('window.blocked')
    assert home.evaluate('window.owned') is None and home.locator('body').is_visible()
    assert any('script' in b for b in blocked) and any('style' in b for b in blocked)


def test_a_picture_turned_by_its_metadata_is_shown_upright(home):
    im = Image.open(io.BytesIO(picture()))
    exif = Image.Exif()
    exif[0x0112] = 6
    buf = io.BytesIO()
    im.save(buf, 'JPEG', exif=exif)
    home.set_input_files('#picture', dict(name='a.jpg', mimeType='image/jpeg', buffer=buf.getvalue()))
    answer(home)
    _, _, w, h = box(home)
    assert h > w
    preview = home.locator('#preview').evaluate('c => [c.width, c.height]')
    assert preview[1] > preview[0]
