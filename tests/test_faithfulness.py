"""What has no place on the page Faithfulness: random maps, peers, a model left as it was, real pictures.

Quantus and pytorch-grad-cam are the peers meant where a comment says what others do; the imputer of ROAD is compared
with that of pytorch-grad-cam. The study on real pictures is checked in test_faithfulness_study.py.
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from skin_gradcam.faithfulness import (
    LOCAL,
    cascade,
    crossed_interval,
    gaussian_map,
    impute,
    localise,
    marked,
    mean_difference,
    noise_map,
    positive_part,
    ranking,
    remeasure,
    stages,
)
from skin_gradcam.models import create_model

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / 'tools' / 'faithfulness_study.py'
VALUES = st.floats(-1e6, 1e6, allow_nan=False, width=32)
MAPS = arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=VALUES)
MASKS = arrays(bool, st.just((24, 32)))


@settings(deadline=None, max_examples=80)
@given(MAPS, MASKS)
def test_any_map(m, mask):
    "Every figure of a mask that asks something is a number between its bounds; the others are all NaN"
    r = localise(m, mask)
    v = np.array([r[k] for k in LOCAL])
    if mask.any() and not mask.all():
        assert np.isfinite(v).all() and (v >= 0).all() and (v <= 1 + 1e-9).all()
        if not r['evidence']: assert [r[k] for k in ('hit', 'energy', 'iou')] == [0, 0, 0]
    else: assert np.isnan(v).all()


@settings(deadline=None, max_examples=40)
@given(MAPS, MASKS, st.sampled_from([1e-30, 1e-6, 1e6, 1e30]))
def test_unit_and_mirror(m, mask, unit):
    "The unit of a map changes nothing; map and mask mirrored together give the same figures"
    m = m + np.arange(m.size).reshape(m.shape) * 7.
    a = localise(m, mask)
    for b in (localise(m * unit, mask), localise(m[:, ::-1], mask[:, ::-1]), localise(m[::-1], mask[::-1])):
        # bilinear enlarging in float32 may move a value by rounding, and with it a tie or a threshold
        for k in ('energy', 'background', 'lesion'): np.testing.assert_allclose(a[k], b[k], atol=1e-4)


def test_rank_figures_ignore_a_monotone_curve():
    e = positive_part(noise_map(3), (64, 64))
    mask = positive_part(gaussian_map(), (64, 64)) > .5
    for bent in (e**3, np.sqrt(e)):
        for k in ('hit', 'auprc'): assert localise(bent, mask)[k] == pytest.approx(localise(e, mask)[k], abs=1e-9)
    assert np.array_equal(ranking(e, e.shape), ranking(2 * e - 5, e.shape))


def test_where_others_are_wrong():
    "An all-zero map is no hit, an empty mask no success, a flat map no better than chance"
    mask = np.zeros((20, 20), bool)
    mask[5:10, 5:15] = True
    assert localise(np.zeros((5, 5)), mask)['hit'] == 0 and not localise(np.zeros((5, 5)), mask)['evidence']
    assert np.isnan(localise(np.ones((5, 5)), mask & False)['hit'])
    assert localise(np.ones((5, 5)), mask)['hit'] == localise(np.ones((5, 5)), mask)['auprc'] == mask.mean()


def test_energy_favours_a_narrow_map():
    "Why the narrow Gaussian stands among the baselines: squeezing a map raises its energy and not its order"
    mask = positive_part(gaussian_map(), (64, 64)) > .5
    wide, narrow = (localise(gaussian_map(64, s), mask) for s in (.25, .125))
    assert narrow['energy'] > wide['energy'] + .1 and narrow['auprc'] == pytest.approx(wide['auprc'], abs=1e-6)


def test_marked_whole():
    assert marked(np.ones((4, 4)), 1, 'evidence').all() and not marked(np.zeros((4, 4))).any()
    with pytest.raises(ValueError, match='share of maximum or evidence'): marked(np.ones((4, 4)), .5, 'area')


def test_pairing_narrows_the_interval():
    "Two figures that vary together differ by less than each varies: what pairing is for"
    dice = np.random.default_rng(0)
    base = dice.random(60)
    better = base + .02 + .01 * dice.standard_normal(60)
    d = mean_difference(better, base, range(60))
    assert d.low > 0 and d.high - d.low < .01
    apart = mean_difference(better, base[dice.permutation(60)], range(60))
    assert apart.low < 0 < apart.high


def test_crossed_interval_covers_both():
    "Pictures of one seed share its weights: many pictures do not make up for few seeds"
    dice = np.random.default_rng(1)
    t = dice.standard_normal((8, 1)) + .1 * dice.standard_normal((8, 200))
    both, wrong = crossed_interval(t, range(200)), crossed_interval(t.mean(0)[None], range(200))
    assert both.high - both.low > 10 * (wrong.high - wrong.low)


@pytest.mark.peer
@pytest.mark.filterwarnings('ignore')  # of the peer, with new numpy
def test_imputer_against_pytorch_grad_cam():
    "The same system of equations inside the frame. Its own check of the frame lets the last row pass."
    road = pytest.importorskip('pytorch_grad_cam.metrics.road', reason="grad-cam: pip install -e '.[dev]'")
    x = np.random.default_rng(0).random((3, 24, 30)).astype(np.float32)
    gone = np.zeros((24, 30), bool)
    gone[2:20, 3:25] = np.random.default_rng(1).random((18, 22)) < .7
    theirs = road.NoisyLinearImputer(noise=0.)(torch.from_numpy(x), torch.from_numpy(~gone).float()).numpy()
    np.testing.assert_allclose(impute(x, gone, noise=0.), theirs, atol=1e-5)


def test_imputer_at_the_frame():
    "A picture of one colour is restored whatever is gone, corners and frame too"
    x = np.full((3, 16, 16), .3)
    gone = np.ones((16, 16), bool)
    gone[7, 7] = False
    np.testing.assert_allclose(impute(x, gone, noise=0.), x, atol=1e-9)


def test_cascade_of_a_real_network():
    "Head first, stem last; the model, its mode and the global random numbers stay; the net stays alive to the end"
    net = create_model('tf_efficientnet_lite0', pretrained=False).train()
    parts = stages(net)
    assert parts[0] == 'head.1' and parts[-1].endswith('conv_stem') and len(parts) == 12
    owned = [n for n, _ in net.named_parameters() if sum(n == p or n.startswith(p + '.') for p in parts) != 1]
    assert not owned
    before, dice = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    *_, (last, broken) = cascade(net, x, seed=3, stop=parts[-1:])
    assert last == parts[-1] and net.training and not any(m.training for m in broken.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(dice, torch.get_rng_state())
    with torch.inference_mode(): f = broken.features(x)
    assert torch.isfinite(f).all() and f.std((2, 3)).mean() > 1e-3
    *_, (_, again) = cascade(net, x, seed=3, stop=parts[-1:])
    assert all(torch.equal(a, b) for a, b in zip(broken.parameters(), again.parameters()))


def test_remeasure_keeps_momentum():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=.3)).eval()
    x = torch.randn(8, 3, 5, 5) * 4 + 2
    remeasure(net, x)
    assert net[0].momentum == .3 and not net[0].training
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 2, 3)))


@pytest.mark.data
def test_study_goes_on_where_it_stopped(real_data, tmp_path):
    "A part that is there is not made again, another one is added"
    out = tmp_path / 'study.json'
    def run(*parts):
        command = [sys.executable, str(STUDY), '--limit', '6', '--out', str(out), '--only', *parts]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert run('turns').startswith('turns:')
    first = json.loads(out.read_text())
    assert first['turns']['n'] == 6 and -1 <= first['turns']['all']['value'] <= 1
    assert run('turns') == '' and json.loads(out.read_text()) == first
