"""Damaged pictures and damaged bundles: answered or refused, and nothing else. The reduced form of tools/fuzz.py, whose
stored figures are held here too."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import load_script
from PIL import Image

from skin_gradcam.inference import Explainer
from skin_gradcam.phantoms import draw_phantom

ROOT = Path(__file__).resolve().parent.parent
fuzz = load_script('tools/fuzz.py')
pytestmark = pytest.mark.filterwarnings('ignore')  # decoders warn of what they then refuse


@pytest.fixture(scope='module')
def seed(tmp_path_factory):
    "The small bundle, without the file that needs torch to be made"
    return fuzz.small_bundle(tmp_path_factory.mktemp('fuzz') / 'seed')


def test_the_seeds_are_sound(seed):
    "Each is answered as it is: what is refused later, is refused for its damage"
    explainer = Explainer(seed, fuzz.by_cells(seed))
    assert len(fuzz.picture_seeds()) == 25
    for name, data in fuzz.picture_seeds().items(): assert fuzz.try_picture(data, explainer) == 'answered', name
    files = {f.name: f.read_bytes() for f in seed.folder.iterdir()}
    copy = seed.folder.parent / 'copy'
    copy.mkdir()
    assert fuzz.try_bundle(files, copy, Image.fromarray(draw_phantom('nv', seed=2).image)) == 'answered'


def test_damaged_pictures(seed):
    "Numbers that the full run does not have; none takes 5 s of processor time"
    explainer, said = Explainer(seed, fuzz.by_cells(seed)), set()
    for i in range(10**6, 10**6 + 400):
        data, began = fuzz.picture(i)[1], time.process_time()
        said.add(fuzz.try_picture(data, explainer))
        assert time.process_time() - began < fuzz.SECONDS, i
    assert said == {'answered', 'PictureError'}


def test_damaged_bundles(seed, tmp_path):
    "Without a new seal every change is found, whatever the file; with one, there is an answer or a reason"
    explained, said = Image.fromarray(draw_phantom('nv', seed=2).image), set()
    good = {f.name: f.read_bytes() for f in seed.folder.iterdir()}
    for i in range(10**6, 10**6 + 400):
        name, files = fuzz.bundle_case(i, seed)
        said.add(outcome := fuzz.try_bundle(files, tmp_path, explained))
        if name.endswith('as it is'): assert (outcome == 'answered') == (files == good), (i, name)
    assert {'answered', 'BundleError'} <= said


@pytest.mark.parametrize('script, said', [('os.kill(os.getpid(), 9)', 'crash: the process ended'),
                                          ('time.sleep(60)', 'hang: over'), ('1/0', 'crash: the process ended')])
def test_a_process_that_dies_or_hangs_is_noticed(monkeypatch, script, said):
    "What native code can do to a process is not passed over"
    monkeypatch.setattr(fuzz, 'WAIT', 1)
    code = f'import os, time; print(\'{{"i": 7, "name": "bmp"}}\', flush=True); {script}'
    tally = fuzz.Tally()
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True, bufsize=1) as p:
        assert fuzz.read_lines(p, tally, 7) == 8
    assert [(w['i'], w['name']) for w in tally.wrong] == [(7, 'bmp')] and tally.wrong[0]['said'].startswith(said)


def test_a_slow_or_silent_answer_is_wrong():
    tally = fuzz.Tally()
    tally.add('bmp', 1, 'answered', 5.1)
    tally.add('bmp', 2, 'PictureError', .1)
    d = tally.to_dict()
    assert (d['inputs'], d['hangs'], d['crashes'], d['slowest_s']) == (2, 1, 0, 5.1)
    with pytest.raises(AssertionError, match='says nothing'): fuzz.say(ValueError('no'))


def test_the_stored_run():
    "At least 20,000 inputs, no crash, no hang, memory within 400 MiB of what the program has before the first"
    d = json.loads((ROOT / 'results' / 'fuzz.json').read_text())
    parts = d['pictures'], d['bundles']
    assert sum(p['inputs'] for p in parts) >= 20_000 and d['pictures']['inputs'] >= 20_000
    for p in parts:
        assert p['crashes'] == p['hangs'] == 0 and p['wrong'] == [] and p['slowest_s'] <= d['limits']['seconds'] == 5
        assert sum(p['said'].values()) == p['inputs'] and p['said']['answered'] > 400
        assert p['peak_mib'] - p['start_mib'] <= 400          # a header may ask for as many pixels as `Limits` allow
    assert set(d['pictures']['by_seed']) == set(fuzz.picture_seeds())
