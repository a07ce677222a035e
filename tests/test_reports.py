"Reports in a real browser, and what has no place on their page"
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import visit
from test_inference import explainer_of
from test_reports_browser import violations

from skin_gradcam.assessment import assess
from skin_gradcam.cards import data_card
from skin_gradcam.checks import FactStore, check_folder
from skin_gradcam.data import Manifest, draw_manifest
from skin_gradcam.data_cli import read_facts
from skin_gradcam.inference import Unreadable
from skin_gradcam.lesions import DISCLAIMER
from skin_gradcam.overview import channel_stats
from skin_gradcam.phantoms import draw_phantom, write_phantoms
from skin_gradcam.readers import read_folder
from skin_gradcam.reports import ReportWriter, html_report, isic_csv, model_card

EVIL = '<script>document.title="owned"</script><img src=x onerror=alert(1)>" onload="x.jpg'


@pytest.fixture(scope='module')
def explainer(tmp_path_factory):
    return explainer_of(tmp_path_factory.mktemp('bundle')/'tiny')


@pytest.fixture(scope='module')
def answers(explainer):
    drawn = [(f'phantom {i}.jpg', draw_phantom(dx, i).image) for i, dx in enumerate(('nv', 'bkl', 'mel'))]
    long = 'a_rather_long_file_name_without_any_space_that_has_to_be_broken_somewhere_' * 2 + '.jpg'
    return explainer.batch([*drawn, (EVIL, drawn[0][1]), (long, drawn[1][1]), (EVIL, b'no picture')])


@pytest.fixture(scope='module')
def assessed(explainer, tmp_path_factory):
    "Phantoms with a column and a name that try to break the page"
    folder = write_phantoms(tmp_path_factory.mktemp('a')/'a | <b>', per_class=12, width=96, height=72)
    df, _ = read_folder(folder)
    df = df.assign(dataset=['<script>alert(1)</script>' if i % 2 else 'a | b' for i in range(len(df))])
    m = draw_manifest(df, folder, per_class=12, shares=(3, 1, 1, 1), folds=2)
    return assess(explainer, m, masks=folder, stress=6, n_boot=100, progress=False)


@pytest.fixture(scope='module')
def study():
    v = dict(value=.75, low=.7, high=.8)
    row = dict(trial='a | b', arch='none', megabytes=1.5, seeds=3, per_class=None, balanced_accuracy=v, macro_auroc=v,
               ece=v)
    board = [row, row | dict(outside=True)]
    return dict(manifest='cd'*32, n=1320, chosen='a | b', why='a | b <i>it is</i>.', board=board)


@pytest.fixture(scope='module')
def page_file(answers, tmp_path_factory):
    facts = {'set': 'first <run>'}
    return html_report(answers, tmp_path_factory.mktemp('report')/'report.html', 'Phantoms', facts)


@pytest.mark.browser
@pytest.mark.parametrize('width', [1280, 768, 390, 320])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_its_window_and_asks_nobody(page, page_file, width, scheme):
    asked, said = visit(page, page_file, width, scheme)
    assert [u for u in asked if not u.startswith('data:')] == [page_file.as_uri()]
    assert said == []
    assert page.title() != 'owned' and page.locator('script').count() == 1
    assert page.locator('article').count() == 5 and page.locator('svg[role=img]:not([aria-label])').count() == 0
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
    assert text.count('<script') == 1 and '<img src=x' not in text and 'first &lt;run&gt;' in text
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


def test_the_isic_table_streams(tmp_path, answers):
    "Ten thousand rows from a generator; what cannot be read is counted; a failing stream leaves the table before"
    names = (f'deep/{i}.x.jpg' for i in range(10_000))
    stream = (replace(answers[0], name=n) if i % 10 else Unreadable(n, 'torn') for i, n in enumerate(names))
    assert isic_csv(stream, tmp_path/'t.csv') == (9000, 1000)
    df = pd.read_csv(tmp_path/'t.csv')
    assert list(df) == ['image', 'MEL', 'NV', 'BCC', 'AKIEC', 'BKL', 'DF', 'VASC'] and df.image[0] == '1.x'
    assert df[['MEL', 'NV', 'BKL']].sum(axis=1).sub(1).abs().max() < 3e-6
    assert not df[['BCC', 'AKIEC', 'DF', 'VASC']].any(axis=None)
    before = (tmp_path/'t.csv').read_bytes()
    with pytest.raises(ValueError, match='two pictures have the id'): isic_csv([answers[0]]*2, tmp_path/'t.csv')
    assert (tmp_path/'t.csv').read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ['t.csv']


def test_data_cards_keep_their_old_address():
    import skin_gradcam.reports
    assert skin_gradcam.reports.data_card is data_card
    with pytest.raises(AttributeError, match='no attribute'): skin_gradcam.reports.data_cards  # noqa: B018


def test_model_card_is_plain_markdown(explainer):
    md = model_card(explainer.bundle)
    assert md.startswith('# Model card: tiny') and DISCLAIMER in md and not re.search(r'\bnan\b', md)
    for block in re.findall(r'(?:^\|.*\n)+', md, re.M):
        assert len({row.count('|') for row in block.splitlines()}) == 1, block


def test_a_full_model_card_is_plain_markdown(explainer, assessed, study):
    md = model_card(explainer.bundle, assessed, study)
    assert '<script' not in md and not re.search(r'\bnan\b|None|undefined', md)
    for block in re.findall(r'(?:^\|.*\n)+', md, re.M):
        assert len({re.sub(r'\\\|', '', row).count('|') for row in block.splitlines()}) == 1, block
    heads = re.findall(r'^## (.*)', md, re.M)
    assert heads == ['What it is for', 'What it was trained on', 'How well it does', 'How it was chosen',
                     'How to get it again', 'Licence', 'Limits', 'Files']


def test_every_number_of_the_card_comes_from_its_sources(explainer, assessed, study):
    "Other figures in the JSON, other figures on the card; the words around them stay"
    other = json.loads(json.dumps(assessed), parse_float=lambda s: float(s)/2)
    other['bundle'] = assessed['bundle']
    one, two = (re.sub(r'-?\d+(\.\d+)?', '#', model_card(explainer.bundle, a, study)) for a in (assessed, other))
    drop = re.compile(r'weakest in .*|costs most.*')        # which one is worst may change
    assert [drop.sub('', s) for s in one.splitlines()] == [drop.sub('', s) for s in two.splitlines()]
    shown = set(re.findall(r'\d+\.\d{3}', model_card(explainer.bundle, other, study)))
    assert f"{other['evaluation']['brier']['value']:.3f}" in shown
    assert f"{assessed['evaluation']['brier']['value']:.3f}" not in shown


def test_the_tool_that_ships_can_still_cut_its_card(explainer):
    "tools/ship_model.py takes out the row with the hash and adds a limit before the files"
    md = model_card(explainer.bundle)
    row = f'| bundle | `{explainer.bundle.hash}` |\n'
    before, after = md.replace(row, '').split('\n## Files')
    assert row in md and before.rstrip().splitlines()[-1].startswith('- ') and after.count('## ') == 0


def test_import_is_light():
    code = "import sys, skin_gradcam.reports; print(sorted({'torch','fastai','timm','torchvision'} & set(sys.modules)))"
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert got.stdout.strip() == '[]', got.stderr


def test_maps_without_any_evidence_are_said_so(explainer, tmp_path):
    flat = explainer(np.full((40, 40, 3), 128, np.uint8))
    zero = type(flat)(**{**{k: getattr(flat, k) for k in flat.__dataclass_fields__}, 'maps': np.zeros_like(flat.maps)})
    text = html_report([zero], tmp_path/'r.html').read_text('utf-8')
    assert text.count('aria-label="No part of the picture speaks for') == 4 and 'class="vw-line"' not in text


# ---------------------------------------------------------------- the data card

STUDY, CARD = (Path(__file__).parents[1]/'results'/name for name in ('ham10000_roles.csv', 'ham10000_data_card.md'))


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    "Phantoms, three views of a lesion, with the columns that Kaggle does not have"
    folder = write_phantoms(tmp_path_factory.mktemp('card')/'phantoms', per_class=6, views=3, width=96, height=72)
    df, report = read_folder(folder)
    df = df.assign(dataset=['<script>alert(1)</script>' if i % 2 else 'a | b' for i in range(len(df))],
                   patient_id=df.lesion_id.str[-1])
    return draw_manifest(df, folder, per_class=6, shares=(3, 1, 1, 1), folds=2, one_per_lesion=False), report


@pytest.fixture(scope='module')
def card_file(manifest, tmp_path_factory):
    m, report = manifest
    card = data_card(m, report, dict(purpose=EVIL, gaps='- one\n- ' + EVIL))
    return card.save(tmp_path_factory.mktemp('c')/'card.html')


@pytest.mark.browser
@pytest.mark.parametrize('width', [1280, 390, 320])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_data_card_fits_its_window_and_asks_nobody(page, card_file, width, scheme):
    asked, said = visit(page, card_file, width, scheme)
    assert asked == [card_file.as_uri()] and said == []
    assert page.title().startswith('Data card') and page.locator('script').count() == 0
    assert page.locator('.plot svg').count() >= 2 and page.locator('[role=note]').bounding_box()['y'] < 800
    assert page.evaluate(CONTRAST) == []
    if (width, scheme) in ((1280, 'light'), (320, 'dark')): assert violations(page) == []


@pytest.mark.browser
def test_the_parts_of_a_data_card_can_be_reached(page, card_file):
    page.emulate_media(reduced_motion='reduce')
    page.goto(card_file.as_uri())
    page.locator('.parts a', has_text='Roles and folds').click()
    assert page.locator('h2', has_text='Roles and folds').bounding_box()['y'] < 900
    ids = page.evaluate('[...document.querySelectorAll("[id]")].map(e => e.id)')
    assert len(ids) == len(set(ids))


def test_a_data_card_escapes_what_it_is_given(manifest, card_file):
    m, report = manifest
    soup = BeautifulSoup(card_file.read_text('utf-8'), 'html.parser')
    assert not soup.find('script') and not soup.find('img')
    assert EVIL in {p.get_text() for p in soup.find_all('p')} and EVIL in {o.get_text() for o in soup.find_all('li')}
    md = data_card(m, report, dict(purpose=EVIL)).markdown()
    assert '<script' not in md and 'a \\| b' in md
    for block in re.findall(r'(?:^\|.*\n)+', md, re.M):
        assert len({re.sub(r'\\\|', '', row).count('|') for row in block.splitlines()}) == 1, block


def test_markdown_and_page_say_the_same(manifest):
    m, report = manifest
    card = data_card(m, report)
    text = ' '.join(BeautifulSoup(card.html(), 'html.parser').get_text(' ').split())
    for section in card.sections:
        for piece in (p for e in section['entries'] for p in e['pieces']):
            said = [piece[k] for k in ('text', 'caption') if k in piece] + list(piece.get('items', []))
            said += [v for row in piece.get('rows', []) for v in row]
            for words in said: assert ' '.join(words.split()) in text, words
    assert all(f'`{k}`' in card.markdown() for k in card.open)


def test_a_data_card_counts_patients_where_they_are_known(manifest):
    m, _ = manifest
    two = int((m.df.groupby('patient_id').role.nunique() > 1).sum())
    words = f'{m.df.patient_id.nunique()} patients, of whom {two} have pictures in more than one role'
    assert two > 0 and words in str(data_card(m))


def test_lesions_that_nobody_knows_are_said_so(tmp_path):
    for dx in ('nv', 'bkl', 'mel'):
        (tmp_path/dx).mkdir()
        for i in range(6): draw_phantom(dx, i, width=64, height=48).picture.save(tmp_path/dx/f'{i}.png')
    df, report = read_folder(tmp_path)
    md = str(data_card(draw_manifest(df, tmp_path, per_class=6, shares=(3, 1, 1, 1), folds=2), report))
    assert '18 pictures have no lesion id' in md and 'it has no column age' in md and 'can leak' in md


def test_identical_files_in_one_role_are_named():
    base = dict(path=['a.jpg', 'b.jpg', 'c.jpg'], dx=['nv', 'nv', 'mel'], role='train', fold=-1)
    df = pd.DataFrame(dict(image_id=list('abc'), lesion_id=list('112'), sha256=list('xxy'), **base))
    md = str(data_card(Manifest(df, 'nowhere')))
    assert '1 group of byte-identical files, all in one role: a = b.' in md and 'The manifest holds no recipe.' in md


def test_the_committed_card_is_of_the_committed_manifest():
    "What can be seen without the pictures: the tables, the hash, and that no question is open"
    m = Manifest.load(STUDY, 'ham10000')
    card = data_card(m)
    written = CARD.read_text('utf-8')
    assert m.hash in written and '*Not stated' not in written and card.open == []
    for block in re.findall(r'(?:^\|.*\n)+', card.markdown(), re.M): assert block in written


@pytest.mark.data
def test_the_committed_card_is_what_the_generator_gives(real_data, tmp_path):
    m = Manifest.load(STUDY, real_data/'ham10000')
    check = check_folder(m.root, store=FactStore(tmp_path/'facts.sqlite'))
    facts = read_facts(CARD.with_name('ham10000_facts.toml'))
    made = data_card(m, check, facts, channel_stats(m)).markdown()
    version = re.compile(r'Made by skin_gradcam \S+')      # a new version alone does not make the card wrong
    assert version.sub('', CARD.read_text('utf-8')) == version.sub('', made)
