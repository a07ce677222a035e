"Assessment against calls of its parts, on damaged folders, and on pictures of the real set"
import hashlib

import numpy as np
import pytest
from PIL import Image
from test_inference import explainer_of

from skin_gradcam import assessment as A
from skin_gradcam.calibration import strata
from skin_gradcam.data import draw_manifest
from skin_gradcam.evaluation import evaluate, macro_auroc
from skin_gradcam.inference import Explainer
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.pictures import open_picture
from skin_gradcam.readers import DataError, read_folder
from skin_gradcam.stress import robustness


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp('p')/'phantoms', per_class=14, views=2, width=96, height=72)


@pytest.fixture(scope='module')
def manifest(folder):
    df, _ = read_folder(folder)
    return draw_manifest(df, folder, per_class=14, one_per_lesion=False)


@pytest.fixture(scope='module')
def explainer(tmp_path_factory): return explainer_of(tmp_path_factory.mktemp('bundle')/'tiny')


@pytest.fixture(scope='module')
def assessed(explainer, manifest):
    return A.assess(explainer, manifest, masks=manifest.root, stress=12, n_boot=150, seed=3, progress=False)


def test_its_figures_are_those_of_its_parts(assessed, explainer, manifest):
    df = manifest.df
    p = np.stack([e.p for e in explainer.explain_many(manifest.paths(), keep_side=0)])
    y, ids = np.array([CLASSES.index(c) for c in df.dx]), df.lesion_id.tolist()
    assert assessed['evaluation'] == evaluate(y, p, ids, n_boot=150, seed=3).to_dict()
    assert assessed['strata'] == A.plain_rows(strata(y, p, ids, df, n_boot=150, seed=3))
    assert [r['image_id'] for r in assessed['predictions']] == df.image_id.tolist()
    assert assessed['evaluation']['n_lesions'] == len(set(ids)) == len(df)//2


def test_stress_is_that_of_the_product(assessed, explainer, manifest):
    use = A.some_of_each(manifest.df.dx, 12, 3)
    rows = manifest.df[use]
    pictures = [np.asarray(open_picture(f)) for f in manifest.paths(rows)]
    y = [CLASSES.index(c) for c in rows.dx]
    one = robustness(A.product(explainer), pictures, y, rows.lesion_id.tolist(), ['jpeg'], (3,), n_boot=150, seed=3)
    got = next(r for r in assessed['robustness']['rows'] if r['corruption'] == 'jpeg' and r['severity'] == '3')
    assert got['drop'] == pytest.approx(one['drop'].iloc[1]) and assessed['robustness']['n'] == 12


def test_temperature_and_threshold_of_the_bundle_count(tmp_path, manifest):
    cool, hot = (explainer_of(tmp_path/str(t), temperature=t) for t in (1., 9.))
    a, b = (A.assess(e, manifest, stress=False, n_boot=100, progress=False) for e in (cool, hot))
    assert a['evaluation']['recall_nv'] == b['evaluation']['recall_nv']
    assert b['decisions']['coverage']['value'] < a['decisions']['coverage']['value']
    assert b['bundle']['temperature'] == 9.


def test_seen_lesions_are_dropped_with_all_their_pictures(tmp_path, manifest):
    seen = manifest.df.lesion_id.unique()[:4].tolist()
    ex = explainer_of(tmp_path/'b', seen_lesions=dict(train=seen[:3], valid=seen[3:], calibration=[]))
    a = A.assess(ex, manifest, stress=False, n_boot=100, progress=False)
    assert a['data']['dropped'] == dict(train=6, valid=2, calibration=0)
    assert not {r['lesion_id'] for r in a['predictions']} & set(seen)


def test_the_floor_of_people_never_learns_from_the_lesions_it_is_judged_on(manifest):
    "A table whose sex column is the class of the judged lesions only tells nothing when other lesions are learned from"
    pics = A.labelled(manifest, 'test')
    assert not set(pics.rest.lesion_id) & set(pics.df.lesion_id)
    y = np.array([CLASSES.index(c) for c in pics.df.dx])
    p, w = np.full((len(y), 3), 1/3), np.ones((10, len(y)))
    df = pics.df.assign(sex=pics.df.dx, age=50, localization='back')
    j = A.Judged(df, y, p, np.array(['nv']*len(y)), w, 10, 0)
    rest = pics.rest.assign(sex='female', age=50, localization='back')
    q, how = A.people_only(j, rest)
    assert macro_auroc(y, q) == pytest.approx(.5) and how.startswith('fitted on')
    leaky = A.people_only(j, pics.rest.assign(sex=pics.rest.dx, age=50, localization='back'))
    assert macro_auroc(y, leaky[0]) == pytest.approx(1)     # the test can fail: here the column does tell


def test_unreadable_pictures_are_counted_and_named(tmp_path, explainer):
    root = write_phantoms(tmp_path/'p', per_class=4, width=96, height=72)
    df, _ = read_folder(root)
    m = draw_manifest(df, root, per_class=4, shares=(1, 1, 1, 1), folds=1)
    m.paths()[0].write_bytes(b'no picture')
    a = A.assess(explainer, m, stress=True, masks=root, n_boot=100, progress=False)
    assert list(a['data']['unreadable']) == [m.paths()[0].name] and a['evaluation']['n'] == 11
    covered = a['floors']['masks']['rows'][0]
    assert a['robustness']['n'] == covered['n'] + covered['left_out'] == 11


def test_pictures_that_do_not_fit_are_refused(monkeypatch, explainer, manifest):
    monkeypatch.setattr(A, 'MEMORY', 30_000)
    with pytest.raises(DataError, match='give stress a number of pictures'):
        A.assess(explainer, manifest, stress=True, n_boot=100, progress=False)
    assert A.assess(explainer, manifest, stress=False, n_boot=100, progress=False)['robustness'] is None


def test_it_is_the_same_twice(explainer, manifest, assessed, tmp_path):
    again = A.assess(explainer, manifest, masks=manifest.root, stress=12, n_boot=150, seed=3, progress=False)
    files = [a.save(tmp_path/f'{i}.json') for i, a in enumerate((assessed, again))]
    assert len({hashlib.sha256(f.read_bytes()).hexdigest() for f in files}) == 1


@pytest.mark.parametrize('text', ['', '[1, 2]', '{"assessment": 2}', 'nothing'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(DataError, match='a.json'): A.Assessment.load(tmp_path/'a.json')


def test_large_photographs_and_their_small_masks(tmp_path, explainer):
    "Pictures of several sizes; masks are brought to the size of their picture"
    root = write_phantoms(tmp_path/'p', per_class=3, width=96, height=72)
    m = draw_manifest(read_folder(root)[0], root, per_class=3, shares=(1, 1, 1, 0), folds=1)
    for i, f in enumerate(m.paths()):
        if i % 2: Image.open(f).resize((240, 180)).save(f)
    a = A.assess(explainer, m, stress=3, masks=root, n_boot=100, progress=False)
    assert a['floors']['masks']['rows'][0]['n'] >= 6


@pytest.mark.data
def test_the_shipped_model_has_the_committed_figures(real_data):
    "Thirty lesions of the test role: the same probabilities as `explain_many`, and nothing dropped"
    from skin_gradcam.data import Manifest
    m = Manifest.load('results/ham10000_roles.csv', real_data/'ham10000')
    rows, ex = m.role('test').groupby('dx').head(10), Explainer.load()
    a = A.assess(ex, m, rows, stress=False, n_boot=100, progress=False)
    p = np.stack([e.p for e in ex.explain_many(m.paths(rows), keep_side=0)])
    np.testing.assert_allclose(a.p, p, atol=1e-6)
    assert a['strata'][1]['stratum'] == 'histo' and a['floors']['people']['balanced_accuracy']['value'] > 1/3
