"Reports in a real browser, and what has no place on their page"
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from test_inference import numpy_backend, tiny_bundle

from skin_gradcam.evaluation import evaluate, softmax
from skin_gradcam.inference import Explainer, Unreadable
from skin_gradcam.lesions import DISCLAIMER
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.reports import ReportWriter, html_report, model_card, run_report

EVIL = '<script>document.title="owned"</script><img src=x onerror=alert(1)>" onload="x.jpg'


@pytest.fixture(scope='module')
def explainer(tmp_path_factory):
    bundle = tiny_bundle(tmp_path_factory.mktemp('bundle')/'tiny', thresholds=dict(indeterminate=.4))
    return Explainer(bundle, numpy_backend(bundle))


@pytest.fixture(scope='module')
def answers(explainer):
    drawn = [(f'phantom {i}.jpg', draw_phantom(dx, i).image) for i, dx in enumerate(('nv', 'bkl', 'mel'))]
    long = 'a_rather_long_file_name_without_any_space_that_has_to_be_broken_somewhere_' * 2 + '.jpg'
    return explainer.batch([*drawn, (EVIL, drawn[0][1]), (long, drawn[1][1]), (EVIL, b'no picture')])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "What a report needs of a run"
    y = np.repeat(np.arange(3), 55)
    p = softmax(np.random.default_rng(0).normal(size=(165, 3)) + 2.2*np.eye(3)[y])
    ev = evaluate(y, p, np.arange(165), n_boot=200).to_dict()
    history = pd.DataFrame(dict(epoch=range(4), train_loss=[1., .8, .6, .5], valid_loss=[.9, .8, .7, .72],
                                balanced_accuracy=[.6, .7, .75, .76]))
    return SimpleNamespace(folder=tmp_path_factory.mktemp('run')/'first <run>', history=history, metrics=dict(valid=ev),
                           recipe=dict(arch='none', lr=6e-4, augment=dict(flip=True)), status='finished',
                           manifest=SimpleNamespace(hash='ab'*32))


@pytest.fixture(scope='module')
def page_file(run, answers, tmp_path_factory):
    return run_report(run, answers, tmp_path_factory.mktemp('report')/'run.html')


@pytest.mark.browser
@pytest.mark.parametrize('width', [1280, 768, 390, 320])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_its_window_and_asks_nobody(page, page_file, width, scheme):
    asked, said = [], []
    page.on('request', lambda r: asked.append(r.url))
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=width, height=800))
    page.goto(page_file.as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert [u for u in asked if not u.startswith('data:')] == [page_file.as_uri()]
    assert said == []
    assert page.title() != 'owned' and page.locator('script').count() == 0
    assert page.locator('article').count() == 5
    assert page.evaluate('[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)')
    assert page.locator('[role=note]').bounding_box()['y'] < 800          # the disclaimer is on the first screen


CONTRAST = '''() => {
  const linear = v => { v /= 255; return v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4 };
  const lum = c => .2126*linear(c[0]) + .7152*linear(c[1]) + .0722*linear(c[2]);
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const fill = c => { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1) };
  const pixel = () => [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  const over = (c, under) => { fill(`rgb(${under})`); fill(c); return pixel() };
  const back = e => e ? over(getComputedStyle(e).backgroundColor, back(e.parentElement)) : [255, 255, 255];
  const bad = [];
  for (const e of document.querySelectorAll('p,h1,h2,h3,td,th,dt,dd,span,figcaption,b,a,caption,li,small')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join('');
    if (!text || !e.getClientRects().length) continue;
    const under = back(e), [lo, hi] = [lum(over(getComputedStyle(e).color, under)), lum(under)].sort((x, y) => x - y);
    if ((hi + .05)/(lo + .05) < 4.5) bad.push(`${e.tagName} ${e.className} ${text} ${(hi + .05)/(lo + .05)}`);
  }
  return bad }'''


@pytest.mark.browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_has_contrast(page, page_file, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(page_file.as_uri())
    assert page.evaluate(CONTRAST) == []


@pytest.mark.browser
def test_it_prints(page, page_file):
    page.goto(page_file.as_uri())
    page.emulate_media(media='print', color_scheme='dark')
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    assert page.pdf(format='A4').startswith(b'%PDF')


@pytest.mark.browser
def test_links_lead_to_cards(page, page_file):
    page.emulate_media(reduced_motion='reduce')
    page.goto(page_file.as_uri())
    page.locator('table.pics a').nth(2).click()
    assert page.evaluate('location.hash') == '#p3' and page.locator('#p3').bounding_box()['y'] < 900


def test_names_are_escaped_everywhere(page_file):
    text = page_file.read_text('utf-8')
    assert '<script' not in text and '<img src=x' not in text and 'first &lt;run&gt;' in text
    soup = BeautifulSoup(text, 'html.parser')
    assert not [a for tag in soup.find_all(True) for a in tag.attrs if a.startswith('on')]
    assert EVIL in {h.get_text() for h in soup.find_all('h3')}


def test_ten_thousand_answers_are_counted_and_the_table_is_cut(tmp_path, answers):
    with ReportWriter(tmp_path/'r.html', 'Many', max_rows=100) as w:
        for i in range(10_000):
            w.add(answers[i % 3] if i % 10 else Unreadable(f'bad {i}', 'torn'), name=f'{i}.jpg', show=i < 3)
    text = w.out.read_text('utf-8')
    assert '<b>10000</b>' in text and '<b>1000</b>unreadable' in text and '9900 more pictures' in text
    assert text.count('<article') == 2 and len(text) < 600_000


def test_an_empty_report_is_a_page(tmp_path):
    text = html_report([], tmp_path/'deep'/'empty.html', 'Nothing').read_text('utf-8')
    assert text.rstrip().endswith('</html>') and '<article' not in text


def test_a_failing_report_leaves_the_one_before(tmp_path, answers):
    f = html_report(answers[:1], tmp_path/'r.html')
    before = f.read_bytes()

    def breaks():
        yield answers[0]
        raise OSError('disk gone')
    with pytest.raises(OSError):
        html_report(breaks(), f)
    assert f.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['r.html']


def test_a_run_without_history_or_metrics_yet(tmp_path, run):
    young = SimpleNamespace(**{**vars(run), 'history': run.history[:0], 'metrics': None, 'status': 'running'})
    text = run_report(young, [], tmp_path/'r.html').read_text('utf-8')
    assert 'running' in text and '<svg' not in text


def test_model_card_is_plain_markdown(explainer):
    md = model_card(explainer.bundle)
    assert md.startswith('# Model card: tiny') and DISCLAIMER in md and not re.search(r'\bnan\b', md)
    for block in re.findall(r'(?:^\|.*\n)+', md, re.M):
        assert len({row.count('|') for row in block.splitlines()}) == 1, block


def test_import_is_light():
    code = "import sys, skin_gradcam.reports; print(sorted({'torch','fastai','timm','torchvision'} & set(sys.modules)))"
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert got.stdout.strip() == '[]', got.stderr


def test_maps_without_any_evidence_are_said_so(explainer, tmp_path):
    flat = explainer(np.full((40, 40, 3), 128, np.uint8))
    zero = type(flat)(**{**{k: getattr(flat, k) for k in flat.__dataclass_fields__}, 'maps': np.zeros_like(flat.maps)})
    text = html_report([zero], tmp_path/'r.html').read_text('utf-8')
    assert text.count('alt="No part of the picture speaks for') == 3
