"Abstention beside its peers, on odd input and through files"
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save

from skin_gradcam import abstention as A
from skin_gradcam.evaluation import balanced_accuracy, softmax


@pytest.fixture(scope='module')
def answers():
    "600 answers that are right more often when they are sure"
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1.5, (600, 3))
    y = (rng.random((600, 1)) > softmax(logits).cumsum(1)).sum(1)
    return softmax(logits), y


@pytest.fixture(scope='module')
def trained():
    "Features, logits and classes of 300 pictures in 40 dimensions"
    rng = np.random.default_rng(5)
    y = np.arange(300) % 3
    f = np.abs(rng.normal(0, 1, (300, 40)))
    f[np.arange(300), y] += 3
    return f, rng.normal(0, 1, (300, 3)) + 3*np.eye(3)[y], y


def test_import_without_heavy_parts():
    code = ("import sys, skin_gradcam.abstention\n"
            "bad = [m for m in ('torch', 'fastai', 'timm', 'sklearn', 'matplotlib', 'mapie') if m in sys.modules]\n"
            "assert not bad, bad")
    subprocess.run([sys.executable, '-c', code], check=True)


# ---------------------------------------------------------------- thresholds

@given(st.integers(0, 10_000), st.sampled_from([.2, .5, .8, .95, 1]), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_threshold_on_any_answers(seed, coverage, classes):
    "The share asked for is answered, melanomas are accounted for, and a bootstrap weight is a repeated picture"
    rng = np.random.default_rng(seed)
    n = int(rng.integers(classes, 60))
    p = softmax(rng.normal(0, 2, (n, classes)).round(1))  # with ties
    y = rng.integers(0, classes, n)
    t = A.choose_threshold(p, y, coverage, cls=classes-1, n=5)
    f = {k: v.value for k, v in t.figures.items()}
    assert t.answered(p).mean() == f['coverage'] >= coverage - 1e-12
    if (y == classes-1).any(): assert abs(f['found'] + f['away'] + f['missed'] - 1) < 1e-12
    w = rng.integers(0, 4, n)
    if w.sum():
        again = A.selective_figures(np.repeat(y, w), np.repeat(p, w, 0), None, t.indeterminate, classes-1)
        one = A.selective_figures(y, p, w[None].astype(float), t.indeterminate, classes-1)
        np.testing.assert_allclose(one, again, atol=1e-12)
        np.testing.assert_allclose(A.aurc(y, p, w[None].astype(float))[0], A.aurc(np.repeat(y, w), np.repeat(p, w, 0)))


def test_a_useless_network_gains_nothing():
    "Where the top probability says nothing about being right, neither does the threshold"
    rng = np.random.default_rng(0)
    p, y = softmax(rng.normal(0, 2, (6000, 3))), rng.integers(0, 3, 6000)
    gain = A.choose_threshold(p, y, .8, n=200).figures['gain']
    assert gain.low < 0 < gain.high
    assert abs(A.aurc(y, p) - 2/3) < .02


def test_the_risk_of_a_threshold_is_on_the_curve(answers):
    p, y = answers
    for c in (.3, .5, .8, 1):
        t = A.choose_threshold(p, y, c, n=5)
        k = t.answered(p)
        assert A.risk_at(y, p, coverages=[c])[0] == pytest.approx((p[k].argmax(1) != y[k]).mean())
        assert t.figures['balanced_accuracy'].value == pytest.approx(balanced_accuracy(y[k], p[k]))


def test_sending_melanomas_away_is_seen():
    "A network that is unsure of every melanoma: accuracy gains, and the figures say at whose cost"
    y = np.repeat([0, 1, 2], 100)
    p = np.full((300, 3), .1)
    p[np.arange(300), y] = .8
    p[y == 2] = [.32, .32, .36]
    p[200:250] = [.36, .32, .32]
    f = {k: v.value for k, v in A.choose_threshold(p, y, .6, n=20).figures.items()}
    assert f['away'] == 1 and f['found'] == f['missed'] == 0
    assert np.isnan(f['balanced_accuracy']) and np.isnan(f['found_answered'])  # no melanoma is left to be right about


@pytest.mark.peer
@pytest.mark.parametrize('alpha', [.05, .1, .3])
def test_conformal_sets_are_those_of_mapie(answers, alpha):
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        "Its input is the probabilities"
        def fit(self, X, y):
            self.classes_, self.n_features_in_ = np.arange(3), 3
            return self
        def predict_proba(self, X): return np.asarray(X)
        def predict(self, X): return np.asarray(X).argmax(1)
        def __sklearn_is_fitted__(self): return True

    p, y = answers
    fit, new = slice(0, 337), slice(337, 600)
    peer = SplitConformalClassifier(Given().fit(p, y), confidence_level=1-alpha, conformity_score='lac', prefit=True)
    want = peer.conformalize(p[fit], y[fit]).predict_set(p[new])[1][..., 0]
    ours = A.prediction_sets(p[new], A.conformal_levels(p[fit], y[fit], alpha, by_class=False))
    np.testing.assert_array_equal(ours, want)


# ---------------------------------------------------------------- the gate

@pytest.mark.parametrize('kind', A.SCORES)
def test_through_safetensors_and_back(trained, kind):
    "The same decisions after a file, and a file of the size of the bundle's budget for a real network"
    f, z, y = trained
    g = A.calibrate_gate(A.fit_gate(kind, f[:200], z[:200], y[:200], rank=8), f[200:], z[200:], .05)
    again = A.Gate.from_arrays(load(save(g.to_arrays())))
    np.testing.assert_array_equal(again.score(f, z), g.score(f, z))
    assert again.threshold == g.threshold and again.kind == kind and again.k == g.k
    assert g.refuses(f[200:], z[200:]).mean() <= .05
    out = io.BytesIO()
    np.savez(out, **g.to_arrays())
    out.seek(0)
    with np.load(out, allow_pickle=False) as n: assert set(n) == set(g.to_arrays())


@pytest.mark.parametrize('kind', A.SCORES)
def test_fits_the_bundle(kind):
    "990 pictures of 1280 features, as the shipped network has"
    rng = np.random.default_rng(0)
    f, z, y = rng.random((990, 1280), np.float32), rng.normal(size=(990, 3)), np.arange(990) % 3
    assert A.fit_gate(kind, f, z, y).nbytes <= A.GATE_BYTES


@pytest.mark.parametrize('kind', A.SCORES)
def test_odd_pictures(trained, kind):
    "Features of zeros, huge or tiny ones: a finite score, and none the decision of a neighbour in the batch"
    f, z, y = trained
    g = A.fit_gate(kind, f, z, y, rank=8)
    odd = np.stack([np.zeros(40), np.full(40, 1e8), np.full(40, 1e-30), f[0]])
    s = g.score(odd, z[:4])
    assert np.isfinite(s).all()
    np.testing.assert_allclose(s, np.concatenate([g.score(odd[i:i+1], z[i:i+1]) for i in range(4)]), rtol=1e-9)
    assert g.score(odd[:0], z[:0]).shape == (0,)


def broken(arrays: dict) -> dict[str, dict]:
    "Ways in which saved arrays can be wrong"
    nan = lambda a: np.full_like(a, np.nan)
    return {'kind': arrays | dict(kind=np.frombuffer(b'cats', np.uint8)),
            'missing': {k: v for k, v in arrays.items() if k != 'numbers'},
            'needs the space': {k: v for k, v in arrays.items() if k != 'basis'},
            'bank': {k: v for k, v in arrays.items() if k != 'bank'},
            'do not fit': arrays | dict(basis=arrays['basis'].T.copy()),
            'NaN or infinity': arrays | dict(means=nan(arrays['means'])),
            'bank holds NaN': arrays | dict(bank=nan(arrays['bank'])),
            'not above 0': arrays | dict(variance=-arrays['variance']),
            'threshold is NaN': arrays | dict(numbers=np.array([np.nan, 0, 10])),
            'numbers are': arrays | dict(numbers=np.zeros(2)),
            'k is 9999': arrays | dict(numbers=np.array([1., 0, 9999]))}


@pytest.mark.parametrize('why', ['kind', 'missing', 'needs the space', 'bank', 'do not fit', 'NaN or infinity',
                                 'bank holds NaN', 'not above 0', 'threshold is NaN', 'numbers are', 'k is 9999'])
def test_damaged_arrays_are_refused(trained, why):
    f, z, y = trained
    arrays = A.fit_gate('knn', f, z, y, rank=8).to_arrays()
    A.Gate.from_arrays(arrays)
    with pytest.raises(ValueError, match=why): A.Gate.from_arrays(broken(arrays)[why])


def test_the_shelf_of_neighbours_is_nearly_exact():
    "kNN from 64 of 1280 directions ranks pictures as the whole features do"
    from sklearn.neighbors import NearestNeighbors
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(40, 1280))
    draw = lambda n, spread: np.maximum(rng.normal(0, spread, (n, 40)) @ mix + 1, 0)
    train, new = draw(500, 1.), np.r_[draw(100, 1.), draw(100, .3), rng.random((50, 1280))]
    g = A.fit_gate('knn', train, np.zeros((500, 3)), np.arange(500) % 3)
    near = NearestNeighbors(n_neighbors=10).fit(A.unit_length(train))
    exact = near.kneighbors(A.unit_length(new))[0][:, -1]
    rank = lambda v: v.argsort().argsort()
    assert np.corrcoef(rank(exact), rank(g.score(new, np.zeros((250, 3)))))[0, 1] > .95


# ---------------------------------------------------------------- notes

@pytest.mark.parametrize('size', [(1, 1), (3, 200), (60, 45), (600, 450)])
@pytest.mark.parametrize('content', ['black', 'white', 'noise', 'half'])
def test_notes_on_any_picture(size, content):
    rng = np.random.default_rng(0)
    a = {'black': np.zeros, 'white': lambda s: np.full(s, 255), 'noise': lambda s: rng.integers(0, 256, s),
         'half': lambda s: np.arange(np.prod(s)).reshape(s) * 255 // max(1, np.prod(s))}[content]((*size[::-1], 3))
    told = A.picture_notes(Image.fromarray(a.astype(np.uint8)))
    assert isinstance(told, tuple) and all(isinstance(t, str) for t in told)
    assert 0 <= A.frame_share(Image.fromarray(a.astype(np.uint8))) <= 1


def test_a_vignette_is_no_lesion():
    "Dark corners darken all colours alike: the mole in the middle stays the lesion"
    y, x = np.mgrid[-1:1:224j, -1:1:224j]
    light = np.clip(1.4 - .8*(x**2 + y**2), .25, 1)[..., None]
    mole = (np.hypot(x, y) < .4)[..., None]
    im = Image.fromarray((np.where(mole, (120, 75, 45), (225, 180, 160))*light).astype(np.uint8))
    assert A.frame_share(im) == 0
    assert abs(A.pigmented(im).mean() - np.pi*.4**2/4) < .02


def test_figures_can_be_written(answers):
    p, y = answers
    t = A.choose_threshold(p, y, .8, n=10)
    assert A.Thresholds.from_dict(json.loads(json.dumps(t.to_dict()))) == t
