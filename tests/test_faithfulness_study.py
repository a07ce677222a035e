"""The committed figures of tools/faithfulness_study.py hang together, belong to the model that ships, and pass.

What they mean is told, and asserted once more beside the words, on the page Faithfulness.
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from skin_gradcam.bundle import default_bundle
from skin_gradcam.faithfulness import PLANTED

FILE = Path(__file__).resolve().parents[1] / 'results' / 'ham10000_faithfulness.json'
FIGURES = ('hit', 'energy', 'auprc', 'iou', 'iou_evidence')
BASELINES = ('gaussian', 'narrow gaussian', 'mean mask')


@pytest.fixture(scope='module')
def study() -> dict: return json.loads(FILE.read_text())


@pytest.fixture(scope='module')
def table(study) -> dict: return study['maps']['table']


def test_of_the_shipped_model(study):
    "Another model ships: run the study again"
    assert study['weights'] == default_bundle().info.files['model.safetensors']
    assert study['roles'] == ['valid', 'calibration'] and study['maps']['n'] == 330


def test_figures_are_figures(table):
    "Shares between 0 and 1, each in its interval, none undefined"
    for name, row in table.items():
        for k in FIGURES:
            v = row[k]
            assert 0 <= v['low'] <= v['value'] <= v['high'] <= 1 and v['undefined'] == 0, (name, k)
        assert row['no_evidence'] <= 330


def test_differences_are_differences(table):
    for name, row in table.items():
        for base in BASELINES:
            if base == name: continue
            for k in FIGURES:
                d = row[f'minus {base}'][k]
                assert d['value'] == pytest.approx(row[k]['value'] - table[base][k]['value'], abs=3e-5)
                assert d['low'] <= d['value'] <= d['high']


def test_one_map_by_four_names(table):
    "Behind pooling and one linear layer CAM, HiResCAM and XGrad-CAM are Grad-CAM"
    for other in ('cam last', 'hirescam last', 'xgradcam last'):
        for k in FIGURES: assert table[other][k]['value'] == pytest.approx(table['gradcam last'][k]['value'], abs=5e-3)


def test_controls_fail(table):
    "Blurred noise finds a lesion no better than its share of the picture; Grad-CAM beats it and the random weights"
    assert table['noise']['hit']['value'] < .5
    for k in FIGURES: assert table['gradcam last'][k]['low'] > table['noise'][k]['high']
    for k in ('energy', 'auprc', 'iou'): assert table['gradcam last']['minus random last'][k]['low'] > 0


def test_account_adds_up(study):
    assert study['maps']['completeness_gap'] < 1e-5 * study['maps']['largest_logit'] + 1e-5


def test_randomisation(study):
    "At least 100 pictures and 10 seeds; with random weights the maps have nothing in common with those of before"
    c = study['cascade']
    assert c['n'] >= 100 and c['seeds'] >= 10
    for part, r in c['correlation'].items(): assert r['low'] < 0 < r['high'], part


def test_planted(study):
    "Planted evidence and planted shortcuts are found in at least 95 of 100 cases, where chance is an eighth at most"
    nets = study['planted']['nets']['4 stages, head fitted']
    for what in PLANTED:
        assert nets[what]['hit']['value'] >= .95 and nets[what]['accuracy'] >= .9
        assert nets[what]['area']['value'] < .14
