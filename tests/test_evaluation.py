"Figures against scikit-learn, the bootstrap against a plain loop, and whether its intervals hold what they promise"
import json
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as skm

from skin_gradcam import evaluation as E
from skin_gradcam.evaluation import evaluate, lesion_bootstrap, lesion_draws, paired_difference, softmax


def random_case(seed, n=120, classes=3, lesions=70, decimals=None):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, lesions, n)
    y = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    p = softmax(1.2 * np.eye(classes)[y] + rng.normal(0, 1, (n, classes)))
    if decimals is not None:
        p = p.round(decimals) + 1e-3
        p /= p.sum(1, keepdims=True)
    return y, p, ids


@pytest.mark.parametrize('module', ['evaluation', 'calibration'])
def test_import_is_light(module):
    code = (f"import sys, skin_gradcam.{module}\n"
            "bad = [m for m in ('torch', 'fastai', 'sklearn', 'scipy', 'matplotlib') if m in sys.modules]\n"
            "assert not bad, bad")
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('decimals', [None, 1])
def test_equal_to_sklearn(seed, decimals):
    y, p, _ = random_case(seed, classes=3 + seed % 3, decimals=decimals)
    c, a = p.shape[1], p.argmax(1)
    labels = list(range(c))
    one = np.ones((1, len(y)))
    pairs = [(E.confusion, skm.confusion_matrix(y, a, labels=labels)), (E.accuracy, skm.accuracy_score(y, a)),
             (E.balanced_accuracy, skm.balanced_accuracy_score(y, a)), (E.log_loss, skm.log_loss(y, p, labels=labels)),
             (E.class_recall, skm.recall_score(y, a, labels=labels, average=None)),
             (E.class_precision, skm.precision_score(y, a, labels=labels, average=None, zero_division=np.nan)),
             (E.macro_auroc, skm.roc_auc_score(y, p, multi_class='ovr', average='macro')),
             (E.class_auroc, [skm.roc_auc_score(y == k, p[:, k]) for k in labels])]
    for f, expected in pairs:
        np.testing.assert_allclose(f(y, p), expected, rtol=1e-12, err_msg=f.__name__)
        np.testing.assert_allclose(f(y, p, one)[0], expected, rtol=1e-12, err_msg=f.__name__)
    for s in (.5, .8, .9, 1.):
        fpr, tpr, _ = skm.roc_curve(y == 2, p[:, 2], drop_intermediate=False)
        np.testing.assert_allclose(E.sensitivity_at(y, p, one, specificity=s), tpr[1 - fpr >= s - 1e-9].max())
        point = E.operating_point(y, p, specificity=s)
        called = p[:, 2] >= point.threshold
        assert point.sensitivity == called[y == 2].mean() and np.isclose(point.specificity, (~called[y != 2]).mean())
        np.testing.assert_allclose(E.specificity_at(y, p, one, sensitivity=s), 1 - fpr[tpr >= s - 1e-9].min())
        for f in (E.sensitivity_at, E.specificity_at, E.auc_above_sensitivity): assert f(y, p) == f(y, p, one)[0]


def isic_auc_sens_80(positive, score, weights=None, sensitivity=.8):
    "As isic-challenge-scoring defines it: the part of the curve from the interpolated point on, by the trapezium rule"
    fpr, tpr, _ = skm.roc_curve(positive, score, sample_weight=weights, drop_intermediate=False)
    k = tpr.searchsorted(sensitivity)
    start = np.interp(sensitivity, tpr[k - 1:k + 1], fpr[k - 1:k + 1])
    return skm.auc(np.r_[start, fpr[k:]], np.r_[sensitivity, tpr[k:]])


@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('decimals', [None, 1])
def test_partial_area_is_the_isic_challenges(seed, decimals):
    y, p, ids = random_case(seed, decimals=decimals)
    w = lesion_draws(ids, 6, seed)
    for s in (.5, .8, .95):
        np.testing.assert_allclose(E.auc_above_sensitivity(y, p, sensitivity=s),
                                   isic_auc_sens_80(y == 2, p[:, 2], sensitivity=s), rtol=1e-10)
        found = E.auc_above_sensitivity(y, p, w, sensitivity=s)
        np.testing.assert_allclose(found, [isic_auc_sens_80(y == 2, p[:, 2], d, s) for d in w], rtol=1e-10)
    # the challenge of 2024 counts what lies above the line of 0.8; sklearn rescales that part with the roles swapped
    fpr80 = 1 - E.specificity_at(y, p, sensitivity=.8) if decimals is None else None
    if fpr80 is None: return
    swapped = skm.roc_auc_score(y != 2, -p[:, 2], max_fpr=.2)
    above = .5 * .2**2 + (.2 - .5 * .2**2) * (swapped - .5) / .5
    assert abs(E.auc_above_sensitivity(y, p) - (above + .8 * (1 - fpr80))) < .02


@pytest.mark.parametrize('seed', range(5))
def test_draws_equal_sklearn_on_the_repeated_pictures(seed):
    "A draw as weights is the same as the data with pictures repeated"
    y, p, ids = random_case(seed, decimals=2)
    w = lesion_draws(ids, 8, seed)
    for d in w:
        r = np.repeat(np.arange(len(y)), d.astype(int))
        for f in (E.confusion, E.balanced_accuracy, E.macro_auroc, E.class_precision, E.ece, E.brier, E.log_loss,
                  E.sensitivity_at, E.specificity_at, E.auc_above_sensitivity):
            np.testing.assert_allclose(f(y, p, d[None])[0], f(y[r], p[r]), rtol=1e-10, err_msg=f.__name__)


def test_ece_equals_a_plain_loop():
    for seed in range(5):
        y, p, _ = random_case(seed, n=400)
        for bins in (5, 10, 15):
            total, top, right = 0., p.max(1), p.argmax(1) == y
            for b in range(bins):
                inside = (top > b / bins) & (top <= (b + 1) / bins)
                if inside.any(): total += inside.mean() * abs(top[inside].mean() - right[inside].mean())
            assert np.isclose(E.ece(y, p, bins=bins), total)


def test_pictures_of_a_lesion_stay_together():
    w = lesion_draws(['b', 'a', 'b', 'c', 'a'], 500)
    assert (w[:, 0] == w[:, 2]).all() and (w[:, 1] == w[:, 4]).all()
    assert (w[:, [0, 1, 3]].sum(1) == 3).all()
    assert np.allclose(w.mean(0), 1, atol=.1)


def test_own_metric_and_weighted_metric_agree():
    y, p, ids = random_case(3)
    plain = lesion_bootstrap(lambda y, p: skm.balanced_accuracy_score(y, p.argmax(1)), y, p, ids, n=200)
    fast = lesion_bootstrap(E.balanced_accuracy, y, p, ids, n=200)
    assert np.allclose([plain.value, plain.low, plain.high], [fast.value, fast.low, fast.high])
    per_class = lesion_bootstrap(E.class_recall, y, p, ids, n=200)
    assert [i.value for i in per_class] == list(E.class_recall(y, p))


def test_blocks_do_not_change_the_result(monkeypatch):
    y, p, ids = random_case(1)
    whole = lesion_bootstrap(E.class_auroc, y, p, ids, n=300)
    real = E._over_draws
    def in_sevens(m, y, p, w): return np.concatenate([real(m, y, p, w[i:i + 7]) for i in range(0, len(w), 7)])
    monkeypatch.setattr(E, '_over_draws', in_sevens)
    assert lesion_bootstrap(E.class_auroc, y, p, ids, n=300) == whole


def test_intervals_hold_the_truth_as_often_as_they_say():
    "60 lesions of 1 to 5 equal pictures, accuracy 0.7: about 95 of 100 intervals hold it; picture-wise ones do not"
    rng, held, naive = np.random.default_rng(0), 0, 0
    for k in range(300):
        right = rng.random(60) < .7
        ids = np.repeat(np.arange(60), rng.integers(1, 6, 60))
        y, p = 1 - right[ids].astype(int), np.tile([[.9, .1]], (len(ids), 1))
        i, j = (lesion_bootstrap(E.accuracy, y, p, g, n=400, seed=k) for g in (ids, range(len(ids))))
        held, naive = held + (i.low <= .7 <= i.high), naive + (j.low <= .7 <= j.high)
    assert .90 <= held / 300 <= .985
    assert naive / 300 < .85


def test_order_of_rows_and_type_of_ids_do_not_matter():
    y, p, ids = random_case(2)
    a = evaluate(y, p, ids, n_boot=100)
    order = np.random.default_rng(0).permutation(len(y))
    b = evaluate(y[order], p[order], ids[order], n_boot=100)
    for k in a: assert np.allclose([a[k].value, a[k].low, a[k].high], [b[k].value, b[k].low, b[k].high]), k
    names = [f'{i:05d}' for i in ids]
    assert evaluate(y, p, pd.Series(names), n_boot=100)['ece'] == evaluate(y, p, names, n_boot=100)['ece']


def test_paired_difference_equals_a_plain_loop():
    y, pa, ids = random_case(4)
    pb, pc = (softmax(np.eye(3)[y] + np.random.default_rng(s).normal(0, 1.3, pa.shape)) for s in (7, 8))
    draws = []
    for d in lesion_draws(ids, 150, 3):
        r = np.repeat(np.arange(len(y)), d.astype(int))
        a, b, c = (skm.balanced_accuracy_score(y[r], q[r].argmax(1)) for q in (pa, pb, pc))
        draws.append(a - (b + c) / 2)
    found = paired_difference(E.balanced_accuracy, y, pa, [pb, pc], ids, n=150, seed=3)
    np.testing.assert_allclose([found.low, found.high], np.percentile(draws, [2.5, 97.5]))
    back = paired_difference(E.balanced_accuracy, y, [pb, pc], pa, ids, n=150, seed=3)
    np.testing.assert_allclose([back.value, back.low, back.high], [-found.value, -found.high, -found.low], atol=1e-12)
    assert paired_difference(E.ece, y, pa, pa, ids, n=20).value == 0
    recalls = paired_difference(E.class_recall, y, pa, pb, ids, n=20)
    np.testing.assert_allclose([i.value for i in recalls], E.class_recall(y, pa) - E.class_recall(y, pb))


def test_paired_intervals_hold_the_truth_and_are_shorter_than_unpaired():
    rng, held, shorter = np.random.default_rng(1), 0, 0
    for k in range(200):
        hard = rng.random(120)
        right = [hard < .8, np.where(rng.random(120) < .08, ~(hard < .8), hard < .8)]  # B flips one answer in twelve
        truth = .8 - (.92 * .8 + .08 * .2)
        y = np.zeros(120, int)
        pa, pb = (np.where(r[:, None], [.9, .1], [.1, .9]) for r in right)
        i = paired_difference(E.accuracy, y, pa, pb, range(120), n=300, seed=k)
        a, b = (lesion_bootstrap(E.accuracy, y, q, range(120), n=300, seed=k) for q in (pa, pb))
        held += i.low - 1e-9 <= truth <= i.high + 1e-9
        shorter += i.high - i.low < np.hypot(a.high - a.low, b.high - b.low)
    assert .89 <= held / 200 <= .99 and shorter / 200 > .95


def test_class_missing_in_draws_is_counted_and_said():
    rng = np.random.default_rng(0)
    y = np.array([2] + [0] * 20 + [1] * 20)
    p = softmax(rng.normal(0, 1, (41, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ev = evaluate(y, p, range(41), n_boot=500)
    missing = ev['recall_mel'].undefined
    assert abs(missing / 500 - (40 / 41)**41) < .08
    at = ('mel_sens_at_spec80', 'mel_spec_at_sens90', 'mel_auc_sens80')
    for k in ('balanced_accuracy', 'macro_auroc', 'auroc_mel', *at):
        assert ev[k].undefined == missing
    assert ev['accuracy'].undefined == 0 and f'{missing} draws' in repr(ev) and f'{missing} draws' in ev._repr_html_()


@pytest.mark.parametrize('n', [1, 2, 3])
def test_tiny_sets(n):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ev = evaluate(np.arange(n), np.full((n, 3), 1 / 3), range(n), n_boot=20)
    json.dumps(ev.to_dict(), allow_nan=False)
    assert E.Evaluation.from_dict(ev.to_dict()).to_dict() == ev.to_dict()


def test_extreme_probabilities():
    p = np.array([[1., 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    y = np.array([0, 1, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ev = evaluate(y, p, range(4), n_boot=50)
    assert np.isfinite(ev['log_loss'].value) and ev['ece'].value == .25 and ev['brier'].value == .5
    assert E.coverage_threshold(p) == 1


def test_fitted_temperature_is_the_minimum():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 3, 200)
        z = 4 * np.eye(3)[y] + rng.normal(0, 4, (200, 3))
        t = E.fit_temperature(z.astype(np.float32), y)
        best = E.log_loss(y, softmax(z, t))
        assert all(best <= E.log_loss(y, softmax(z, t * f)) + 1e-9 for f in (.5, .9, .99, 1.01, 1.1, 2))


def test_coverage_threshold_answers_the_share():
    rng = np.random.default_rng(0)
    for n in (1, 7, 165, 330):
        p = softmax(rng.normal(0, 1, (n, 3)))
        for c in (.01, .5, .8, .9, 1.):
            answered = (p.max(1) >= E.coverage_threshold(p, c)).mean()
            assert c <= answered + 1e-12 < c + 1 / n + 1e-9


def test_plots_leave_pyplot_alone():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    y, p, ids = random_case(0)
    history = pd.DataFrame(dict(epoch=[0, 1], train_loss=[1., np.nan], phase=['head', 'all']))
    figures = [E.plot_history(h) for h in (history, history[:1], history[['epoch']])]
    sizes = pd.DataFrame(dict(n=[250, 100], value=[.8, .7], low=[.7, np.nan], high=[.9, np.nan]))
    figures += [E.plot_roc(y, p), E.plot_roc(y[y < 2], p[y < 2]), E.plot_roc(y, p, 'abc'), E.plot_learning_curve(sizes)]
    for fig in (E.plot_confusion(np.array([[3, 0], [0, 0]]), ['a', 'b']), E.plot_reliability(y, p), *figures):
        fig.canvas.draw()
    assert plt.get_fignums() == before
