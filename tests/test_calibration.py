"Recalibration against scikit-learn and Bayes' rule, net benefit against a plain loop, strata on the real table"
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from sklearn.linear_model import LogisticRegression

from skin_gradcam import calibration as C
from skin_gradcam import evaluation as E
from skin_gradcam.evaluation import lesion_bootstrap, lesion_draws, softmax
from skin_gradcam.stress import metadata_floor


def random_case(seed, n=150, lesions=90, scale=1.2):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, lesions, n)
    y = np.r_[[0, 1, 2], rng.integers(0, 3, n - 3)]
    return y, softmax(scale * np.eye(3)[y] + rng.normal(0, 1, (n, 3))), ids


@pytest.fixture(scope='module')
def roles():
    "The 1,320 pictures of the study that are in a fold, and their classes"
    t = pd.read_csv(ROOT / 'results/ham10000_roles.csv', comment='#', keep_default_na=False)
    t = t[t.fold >= 0].reset_index(drop=True)
    return t, t.dx.map({'nv': 0, 'bkl': 1, 'mel': 2}).to_numpy()


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('scale', [.2, 1., 3.])
def test_fit_equals_sklearn(seed, scale):
    rng = np.random.default_rng(seed)
    x = scale * rng.normal(0, 1, 80) + rng.normal(0, 2)
    y = rng.random(80) < 1 / (1 + np.exp(-(.7 * x - .3)))
    w = np.r_[np.ones((1, 80)), rng.integers(0, 4, (4, 80))]
    found = C.logistic_fit(y, x, w)
    for row, d in zip(found, w):
        peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], y, sample_weight=d)
        np.testing.assert_allclose(row, [peer.intercept_[0], peer.coef_[0, 0]], rtol=2e-3, atol=2e-3)
    for a, d in zip(C.logistic_fit(y, x, w, slope=False)[:, 0], w):
        assert abs((d * (y - 1 / (1 + np.exp(-(a + x))))).sum()) < 1e-6


def test_extreme_probabilities_settle_or_are_undefined():
    "Sure answers, some of them wrong: Newton's steps must not run away, and no warning may come out"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for seed in range(30):
            rng = np.random.default_rng(seed)
            y = np.r_[[0, 1, 2], rng.integers(0, 3, 97)]
            p = softmax(rng.normal(0, 1, (100, 3)) * 10**rng.uniform(0, 2) + np.eye(3)[y] * 10**rng.uniform(0, 2))
            w = lesion_draws(range(100), 50, seed)
            slope, intercept = C.calibration_slope(y, p, w), C.calibration_intercept(y, p, w)
            for c in range(3):
                x, k = C.log_odds(p[:, c]), y == c
                for (a, b), d in zip(C.logistic_fit(k, x, w), w):
                    if np.isfinite(b):
                        rest = d * (k - 1 / (1 + np.exp(-(a + b * x))))
                        assert abs(rest.sum()) < 1e-3 and abs((rest * x).sum()) < 1e-2
                    else: assert d[k].sum() == 0 or separated(x[k & (d > 0)], x[~k & (d > 0)])
            assert np.isfinite(intercept).mean() > .9 and slope.shape == (50, 3)


def separated(a, b): return a.min() >= b.max() or a.max() <= b.min()


def test_separated_draws_are_undefined_and_counted():
    y, p = np.array([0, 0, 0, 1, 1, 1]), np.array([.1, .2, .6, .5, .7, .8])
    p = np.c_[1 - p, p]
    i = lesion_bootstrap(C.calibration_slope, y, p, range(6), n=300)[1]
    assert np.isfinite(i.value) and 50 < i.undefined < 300
    perfect = lesion_bootstrap(C.calibration_slope, y, np.eye(2)[y], range(6), n=20)[1]
    assert np.isnan(perfect.value) and str(perfect) == 'undefined'


@pytest.mark.parametrize('seed', range(4))
def test_draws_equal_the_repeated_pictures(seed):
    y, p, ids = random_case(seed)
    for d in lesion_draws(ids, 5, seed):
        r = np.repeat(np.arange(len(y)), d.astype(int))
        for f in (C.calibration_slope, C.calibration_intercept, C.threshold_rates):
            np.testing.assert_allclose(f(y, p, d[None]).reshape(-1), f(y[r], p[r]), rtol=1e-6, err_msg=f.__name__)


def test_slope_intervals_hold_the_truth():
    "Calibrated probabilities: about 95 of 100 intervals hold slope 1 and intercept 0"
    rng, held = np.random.default_rng(0), np.zeros(2)
    for k in range(80):
        z = rng.normal(0, 1.5, (250, 2))
        p = softmax(z)
        y = (rng.random(250) < p[:, 1]).astype(int)
        for j, (f, truth) in enumerate(((C.calibration_slope, 1), (C.calibration_intercept, 0))):
            i = lesion_bootstrap(f, y, p, range(250), n=200, seed=k)[1]
            held[j] += i.low <= truth <= i.high
    assert (held / 80 >= .86).all()


def test_cross_fit_never_sees_its_own_fold():
    rng = np.random.default_rng(2)
    y, z, folds = rng.integers(0, 3, 200), rng.normal(0, 2, (200, 3)), rng.permutation(np.arange(200) % 4) * 3
    p, T = C.cross_fit_temperature(z, y, folds)
    assert list(T) == [0, 3, 6, 9]
    for f, t in T.items():
        assert t == E.fit_temperature(z[folds != f], y[folds != f])
        np.testing.assert_array_equal(p[folds == f], softmax(z[folds == f], t))
    order = rng.permutation(200)
    shuffled, again = C.cross_fit_temperature(z[order], y[order], folds[order])
    np.testing.assert_allclose(shuffled, p[order])
    assert np.allclose(list(again.values()), list(T.values()))
    with pytest.raises(ValueError, match='needs whole numbers'): C.cross_fit_temperature(z, y, folds / 2)


def test_reweighted_posterior_is_bayes_rule():
    "Two normal curves whose posterior is known at any prior"
    x, rng = np.linspace(-4, 4, 50), np.random.default_rng(0)
    like = np.stack([np.exp(-(x - m)**2 / 2) for m in (-1, 0, 1.5)], -1)
    def posterior(prior): return like * prior / (like * prior).sum(-1, keepdims=True)
    for a, b in rng.dirichlet([1, 1, 1], (20, 2)):
        np.testing.assert_allclose(C.reweight(posterior(a), a, b), posterior(b), rtol=1e-8)
    sure = C.reweight([[1., 0., 0.], [0., 0., 1.]], [1 / 3] * 3, [.9, .09, .01])
    assert np.allclose(sure, [[1, 0, 0], [0, 0, 1]])


def test_at_prevalence_equals_counting_on_a_set_of_that_prevalence():
    y, p, ids = random_case(1, n=300)
    found = C.at_prevalence(y, p, ids, .4, prevalences=[.07], n=200).iloc[0]
    k, called = y == 2, p[:, 2] >= .4
    w = np.where(k, .07 / k.sum(), .93 / (~k).sum())  # the same pictures, weighted to 7 %
    assert np.isclose(found.ppv, w[k & called].sum() / w[called].sum())
    assert np.isclose(found.npv, w[~k & ~called].sum() / w[~called].sum())
    assert np.isclose(found.called, w[called].sum()) and np.isclose(found.missed, w[k & ~called].sum())
    assert found.ppv_low < found.ppv < found.ppv_high and found.npv_low < found.npv < found.npv_high
    own = C.at_prevalence(y, p, ids, .4, prevalences=[k.mean()], n=20).iloc[0]
    assert np.isclose(own.ppv, k[called].mean())
    nobody = C.at_prevalence(y, p, ids, 2., prevalences=[.1], n=20).iloc[0]
    assert np.isnan(nobody.ppv) and np.isclose(nobody.npv, .9)


def test_net_benefit_equals_a_plain_loop():
    y, p, ids = random_case(3, n=200)
    curve = C.decision_curve(y, p, ids, n=150, seed=5)
    assert np.allclose(curve.threshold, np.arange(2, 31) / 100)
    def net(y, p, t): return ((y == 2) & (p >= t)).mean() - ((y != 2) & (p >= t)).mean() * t / (1 - t)
    for row in curve.iloc[::9].itertuples():
        assert np.isclose(row.net_benefit, net(y, p[:, 2], row.threshold))
        assert np.isclose(row.treat_all, net(y, np.ones(200), row.threshold)) and row.treat_none == 0
        draws = [net(np.repeat(y, d.astype(int)), np.repeat(p[:, 2], d.astype(int)), row.threshold)
                 for d in lesion_draws(ids, 150, 5)]
        np.testing.assert_allclose([row.low, row.high], np.percentile(draws, [2.5, 97.5]), atol=1e-12)
    for prevalence in (.02, .1):  # acting on all is worth nothing exactly where the threshold is the prevalence
        at = C.decision_curve(y, p, ids, thresholds=[prevalence], prevalence=prevalence, n=10)
        assert abs(at.treat_all[0]) < 1e-12 and at.net_benefit[0] >= 0
    same = C.decision_curve(y, p, ids, prevalence=(y == 2).mean(), n=10)
    np.testing.assert_allclose(same.net_benefit, curve.net_benefit, atol=1e-12)


def test_metadata_floor_and_strata_of_the_study(roles):
    "Age, sex and site alone on the committed roles: the floor, in histology lower than overall"
    t, y = roles
    assert len(t) == 1320 and (np.bincount(y) == 440).all()
    for kind in ('logistic', 'boosting'):
        p = metadata_floor(t, y, t.fold.to_numpy(), kind)
        np.testing.assert_allclose(p.sum(1), 1)
        assert .55 < E.balanced_accuracy(y, p) < .60, kind
        assert .64 < E.class_auroc(y, p)[2] < .69, kind
    s = C.strata(y, p, t.lesion_id, t, n_boot=60)
    assert list(s.stratum[:2]) == ['all', 'histo']
    histo = s[s.stratum == 'histo'].iloc[0]
    assert histo.n == (t.dx_type == 'histo').sum() == 841 and histo.n_mel == 440
    assert histo.balanced_accuracy < s.balanced_accuracy[0] - .02
    for b in ('dx_type', 'age_band', 'sex', 'localization_group'):
        part = s[s.by == b]
        assert part.n.sum() == 1320 and part[['n_nv', 'n_bkl', 'n_mel']].sum().tolist() == [440] * 3, b
    assert s.note.iloc[-1] == 'the table has no column dataset' and s.by.iloc[-1] == 'source'
    assert s[s.stratum == 'follow_up'].note.item() == 'no bkl or mel'
    assert set(s[s.by == 'localization_group'].stratum) <= {*C.SITES, 'unknown'}
    C.plot_strata(s).canvas.draw()


def test_strata_of_strange_tables():
    y, p, ids = random_case(0, n=60)
    columns = dict(dx_type=[None] * 60, age=['x'] * 30 + [200] * 30, centre=['a', 'b'] * 30)
    table = pd.DataFrame(columns, index=range(5, 65))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = C.strata(y, p, ids, table, by=('dx_type', 'age_band', 'centre', 'nothing'), n_boot=20)
    assert list(s.stratum) == ['all', 'unknown', 'impossible', 'unknown', 'a', 'b', '-']
    assert s.note.iloc[-1] == 'the table has no column nothing'
    assert np.isclose(s[s.stratum == 'a'].balanced_accuracy.item(), E.balanced_accuracy(y[::2], p[::2]))


def test_plots_leave_pyplot_alone():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    y, p, ids = random_case(0)
    C.plot_decision_curve(C.decision_curve(y, p, ids, n=20)).canvas.draw()
    assert plt.get_fignums() == before
