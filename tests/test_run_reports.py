"Reports of runs and assessments in a real browser, top losses on a Learner of the library, and the real pictures"
import json
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pypdfium2
import pytest
from bs4 import BeautifulSoup
from conftest import visit
from PIL import Image
from test_inference import explainer_of
from test_reports import CONTRAST, EVIL
from test_reports_browser import CLIPPED, violations

from skin_gradcam.assessment import Assessment, assess
from skin_gradcam.data import draw_manifest
from skin_gradcam.evaluation import evaluate, softmax
from skin_gradcam.inference import Explainer
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.readers import read_folder
from skin_gradcam.run_reports import (
    Loss,
    assessment_report,
    explain_losses,
    learner_losses,
    loss_section,
    run_report,
    worst_of_cells,
)


@pytest.fixture(scope='module')
def explainer(tmp_path_factory):
    return explainer_of(tmp_path_factory.mktemp('bundle')/'tiny')


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    folder = write_phantoms(tmp_path_factory.mktemp('p')/'a <b> folder', per_class=12, width=96, height=72)
    df, _ = read_folder(folder)
    df = df.assign(dataset=[EVIL if i % 2 else 'a | b' for i in range(len(df))])
    return draw_manifest(df, folder, per_class=12, shares=(3, 1, 1, 1), folds=2)


@pytest.fixture(scope='module')
def assessed(explainer, manifest):
    return assess(explainer, manifest, masks=manifest.root, stress=6, n_boot=100, progress=False)


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
def losses(assessed, explainer, manifest): return explain_losses(assessed, explainer, manifest.root, 1)


@pytest.fixture(scope='module')
def page_file(run, assessed, losses, tmp_path_factory):
    return run_report(run, [], tmp_path_factory.mktemp('report')/'run.html', assessment=assessed, losses=losses)


@pytest.mark.browser
@pytest.mark.parametrize('width', [1280, 390, 320])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_its_window_and_asks_nobody(page, page_file, width, scheme):
    asked, said = visit(page, page_file, width, scheme)
    assert [u for u in asked if not u.startswith('data:')] == [page_file.as_uri()] and said == []
    assert page.title() != 'owned' and page.locator('script').count() == 1
    assert page.locator('.plot svg').count() == 6
    assert page.evaluate('[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)')
    assert page.locator('[role=note]').bounding_box()['y'] < 800
    assert page.evaluate(CONTRAST) == []
    if (width, scheme) in ((1280, 'light'), (320, 'dark')): assert violations(page) == []


@pytest.mark.browser
def test_it_prints(page, page_file):
    page.emulate_media(media='print', color_scheme='dark')
    page.set_viewport_size(dict(width=688, height=900))     # the width that A4 leaves between its margins
    page.goto(page_file.as_uri())
    assert page.evaluate(CLIPPED) == []
    pdf = pypdfium2.PdfDocument(page.pdf(format='A4'))
    text = ' '.join(' '.join(p.get_textpage().get_text_bounded() for p in pdf).split())
    assert 2 < len(pdf) < 20 and 'Where it was most wrong' in text and 'This is not a medical device' in text
    first = np.asarray(pdf[0].render(scale=.5).to_pil().convert('RGB'))
    assert (first[[0, -1]] == 255).all() and (first[:, [0, -1]] == 255).all() and np.median(first) == 255


def test_names_are_escaped_everywhere(page_file, assessed, losses, tmp_path):
    bad = [Loss(EVIL, l.picture, l.p, l.maps, l.truth) for l in losses[:1]]
    for f in (page_file, assessment_report(assessed, tmp_path/'a.html', bad, EVIL)):
        soup = BeautifulSoup(f.read_text('utf-8'), 'html.parser')
        assert len(soup.find_all('script')) == 1
        assert not [a for tag in soup.find_all(True) for a in tag.attrs if a.startswith('on')]
        ids = [t['id'] for t in soup.find_all(id=True)]
        assert len(ids) == len(set(ids))


def test_page_and_json_say_the_same(page_file, assessed):
    text = ' '.join(BeautifulSoup(page_file.read_text('utf-8'), 'html.parser').get_text(' ').split())
    for k in ('balanced_accuracy', 'macro_auroc', 'ece', 'mel_spec_at_sens90'):
        v = assessed['evaluation'][k]
        assert f"{v['value']:.3f} {v['low']:.3f} to {v['high']:.3f}" in text, k
    assert f"{assessed['decisions']['coverage']['value']:.3f}" in text


def test_the_worst_picture_of_each_cell_is_shown(assessed):
    rows = worst_of_cells(assessed, 1)
    y, p = assessed.y, assessed.p
    cells = {(CLASSES.index(r['dx']), int(np.argmax(r['p']))): r for r in rows}
    assert len(cells) == len(rows) == int((np.array(assessed['evaluation']['confusion']) > 0).sum())
    for (t, s), r in cells.items():
        inside = (y == t) & (p.argmax(1) == s)
        assert r['p'][t] == p[inside, t].min()


def test_losses_without_pictures_are_left_out():
    bare = Loss('x', None, np.array([.1, .2, .7]), np.zeros((3, 2, 2)), 0)
    assert loss_section([bare]) == '' and bare.value == pytest.approx(-np.log(.1))


def test_a_loss_of_zero_probability_is_finite():
    assert np.isfinite(Loss('x', None, np.array([0., 0., 1.]), np.zeros((3, 2, 2)), 0).value)


def test_maps_without_evidence_can_be_shown():
    l = Loss('flat', Image.new('RGB', (40, 30)), np.full(3, 1/3), np.zeros((3, 2, 2), np.float32), 1)
    assert 'No part of the picture speaks for' in loss_section([l])


def test_a_run_without_history_or_metrics_yet(tmp_path, run):
    young = SimpleNamespace(**{**vars(run), 'history': run.history[:0], 'metrics': None, 'status': 'running'})
    text = run_report(young, [], tmp_path/'r.html').read_text('utf-8')
    assert 'running' in text and '<svg' not in text


def test_a_learner_of_the_library_shows_its_own_pictures(manifest):
    "Its loaders hold normalised tensors that fastai cannot undo; the pictures are given, in the order of the role"
    import torch
    from fastai.learner import Learner

    from skin_gradcam.gradcam import gradcam
    from skin_gradcam.loaders import fastai_loaders
    torch.manual_seed(0)
    dls = fastai_loaders(manifest, 32, [.5]*3, [.5]*3, bs=4, augment=None, device='cpu')
    nn = torch.nn
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = Learner(dls, net.train(), loss_func=nn.CrossEntropyLoss())
        rows = manifest.role('valid')
        with pytest.raises(ValueError, match='give the pictures'): learner_losses(learn, 3, classes=CLASSES)
        found = learner_losses(learn, 3, pictures=manifest.paths(rows), classes=CLASSES)
    batches = [[o.as_subclass(torch.Tensor) for o in b] for b in dls.valid]
    x, y = (torch.cat(o) for o in zip(*batches))
    with torch.no_grad(): p = net.eval()(x).softmax(1).numpy()
    values = -np.log(p[np.arange(len(y)), y])
    assert [l.value for l in found] == pytest.approx(np.sort(values)[::-1][:3], abs=1e-5)
    for l in found:
        i = int(l.name)
        assert rows.dx[i] == CLASSES[l.truth] and l.picture.size == (96, 72)
        np.testing.assert_allclose(l.maps, gradcam(net, x[i:i+1], 'all', 'hirescam')[0].numpy(), atol=1e-5)


def test_import_is_light():
    for module in ('run_reports', 'assessment'):
        heavy = {'torch', 'fastai', 'timm', 'torchvision', 'matplotlib.pyplot', 'sklearn'}
        code = f'import sys, skin_gradcam.{module}; print(sorted({heavy} & set(sys.modules)))'
        got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
        assert got.stdout.strip() == '[]', got.stderr


@pytest.mark.data
@pytest.mark.browser
def test_the_shipped_model_on_real_pictures(page, real_data, tmp_path):
    "Six test lesions, from the committed roles to a page with their maps"
    from skin_gradcam.data import Manifest
    m = Manifest.load('results/ham10000_roles.csv', real_data/'ham10000')
    rows = m.role('test').groupby('dx').head(2)
    ex = Explainer.load()
    a = assess(ex, m, rows, masks=m.root, stress=False, n_boot=100, progress=False)
    assert a['evaluation']['n'] == 6 and sum(a['data']['dropped'].values()) == 0
    assert a['floors']['people']['how'] == f'fitted on {len(m) - 6} pictures of other lesions'
    page.goto(assessment_report(a, tmp_path/'a.html', explain_losses(a, ex, m.root, 2)).as_uri())
    assert page.locator('.loss').count() == 6
    assert re.search('hardly any|speak', page.locator('.loss img').nth(1).get_attribute('alt'))
    assert Assessment.load(a.save(tmp_path/'a.json')) == json.loads(json.dumps(a))
