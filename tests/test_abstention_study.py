"""The committed figures of abstention agree with the committed answers, with the shipped network and with the marks.

The gate's features take minutes to compute: `python tools/abstention_study.py` does it. Here a sample of the pictures
goes through the same code.
"""
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from conftest import ROOT, load_script

from skin_gradcam import abstention as A
from skin_gradcam.bundle import default_bundle, write_bundle
from skin_gradcam.evaluation import Interval


@cache
def told() -> dict: return json.loads((ROOT / 'results/ham10000_abstention.json').read_text())


@pytest.fixture(scope='module')
def tool():
    return load_script('tools/abstention_study.py')


def test_thresholds_again(tool):
    "From the committed answers, without a picture: the same numbers, intervals included"
    from skin_gradcam.selection import read_plan, read_trial
    plan = {t.name: t for t in read_plan(tool.RESULTS / 'ham10000_plan.json')}
    o = read_trial(plan['lite0'], tool.manifest(), tool.RESULTS / 'trials', views=1)
    p = tool.cross_fit_temperature(o.logits[0], o.y, o.fold)[0]
    chosen, kept = A.choose_threshold(p, o.y, tool.COVERAGE, o.lesion_id), told()['trials']['lite0']['chosen']
    assert chosen.n == kept['n'] == 1320
    assert chosen.indeterminate == pytest.approx(kept['indeterminate'], abs=1e-9)
    for k, v in chosen.figures.items(): assert v.to_dict() == pytest.approx(kept['figures'][k], abs=1e-9), k
    sets = json.loads(json.dumps(tool.conformal(p, o.y, o.fold)))
    for k, v in sets.items(): assert v == pytest.approx(told()['conformal']['lite0'][k], abs=1e-9), k


@pytest.mark.parametrize('name', ['lite0', 'mobilenetv2'])
@pytest.mark.parametrize('part', ['trials', 'eight_views'])
def test_mark_of_the_thresholds(name, part):
    "Five points more at 80 %, with thresholds from other folds too, and the melanomas add up"
    t = told()[part][name]
    for f in (t['chosen']['figures'], t['cross_fitted']):
        assert abs(f['coverage']['value'] - .8) < .01 and f['gain']['value'] >= .05 and f['gain']['low'] > 0
        assert f['found']['value'] + f['away']['value'] + f['missed']['value'] == pytest.approx(1)


def test_mark_of_the_gate():
    "Far strangers: AUROC at least 0.99 with at most 5 % of lesions refused; near ones better than the baseline"
    g = told()['gate']
    auroc, ships = g['auroc'], g['ships']
    assert auroc[ships]['far']['value'] >= .99
    for role in ('valid', 'calibration'): assert g['refused'][ships][role] <= .05 + 1.96*(.05*.95/165)**.5
    assert auroc[ships]['near']['value'] > auroc['doubt']['near']['value']
    assert g['nbytes'][ships] <= A.GATE_BYTES
    assert set(auroc) == set(A.SCORES)
    for of in auroc.values():
        for v in of.values(): Interval(**v); assert v['low'] <= v['value'] <= v['high']


def test_the_gate_is_of_the_shipped_network():
    "A new network needs a new gate: python tools/abstention_study.py --only gate"
    b = default_bundle()
    assert told()['gate']['weights'] == b.info.files['model.safetensors'] and told()['gate']['bundle'] == b.name


def test_strangers(tool):
    "The same pictures at every run, as many as the figures say, none of them the same picture twice in a group"
    drawn = [p for p, _ in zip(tool.strangers(), range(150))]
    again = [p for p, _ in zip(tool.strangers(), range(150))]
    for a, b in zip(drawn, again): assert a[:2] == b[:2] and a.image.tobytes() == b.image.tobytes()
    n = sum(p.group == 'photographs' for p in drawn)
    assert n == told()['gate']['counts']['photographs'] and len({p.source for p in drawn[:n]}) == n/(tool.CROPS+1)
    assert len({p.image.tobytes() for p in drawn[:n]}) == n


def test_features_are_those_of_the_network(tool, one_thread, tmp_path):
    "Pooled features through the head give the logits; phantoms as pictures, so that no data set is needed"
    shipped = default_bundle()
    b = write_bundle(tmp_path / 'b', shipped.tensors(), replace(shipped.info, gate_stages=None, gate=None))
    pictures = [(tool.Picture('phantoms', str(i), tool.draw_phantom('nv', i).picture), -1) for i in range(3)]
    a = tool.answers(b, iter(pictures), batch=2)
    weight, bias = b.head()
    np.testing.assert_allclose(a.features @ np.asarray(weight, np.float64).T + bias, a.logits, atol=1e-3)
    assert list(a.source) == ['0', '1', '2'] and a.features.shape[0] == 3
    staged = tool.answers(shipped, iter(pictures), batch=2)  # its gate looks at two stages beside them
    assert np.array_equal(staged.logits, a.logits) and staged.features.shape[1] > a.features.shape[1]
    np.testing.assert_allclose(staged.features[:, -a.features.shape[1]:], A.unit_length(a.features), atol=1e-6)


@pytest.mark.data
def test_notes_again(tool, real_data):
    "The validation role once more: the notes are as rare as the figures say"
    folder = real_data / 'ham10000'
    at = {p.stem: p for p in folder.glob('HAM10000_images_part_*/*.jpg')}
    ids = tool.manifest().role('valid').image_id
    shares = tool.shares([A.picture_notes(tool.open_picture(at[i])) for i in ids])
    for k, v in told()['notes']['noted']['as they are'].items():
        assert abs(shares[k] - v) < .05, k   # half of the pictures of that figure


def test_says_what_is_missing(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'real_data', lambda: None)
    assert tool.main(['--only', 'gate', '--out', str(tmp_path / 'x.json')]) == 2
    assert 'SKIN_GRADCAM_DATA' in capsys.readouterr().err
    assert not (tmp_path / 'x.json').exists()
