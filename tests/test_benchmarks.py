"""The stored figures hold their marks, and the commands that measure them run (reduced: a few pictures and rounds)."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def stored(name: str) -> dict: return json.loads((ROOT / 'results' / name).read_text(encoding='utf-8'))


def measured(script: str, *args: str, out: Path) -> dict:
    "The figures of a reduced run of a benchmark"
    command = [sys.executable, ROOT / 'benchmarks' / script, *args, '--out', out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_the_loader_holds_its_marks():
    s = stored('loader_speed.json')
    assert s['pictures'] == 1650 and {e['workers'] for e in s['epochs']} == {0, 2}
    ours = [e['ratio']['median'] for e in s['epochs'] if e['name'].startswith('skin_gradcam')]
    assert s['summary']['limits'] == dict(epoch_ratio=3, step_ratio=1.1)
    assert min(ours) >= 3 and max(r['ratio']['median'] for r in s['steps']) <= 1.1


def test_the_check_holds_its_marks():
    s = stored('data_check.json')
    assert s['limits'] == dict(first_s=60, second_s=5, memory_mb=300)
    assert all(s['measured'][k] <= v for k, v in s['limits'].items())
    assert s['found']['pictures'] == s['found']['masks'] == 9873


def test_a_training_step_holds_its_mark():
    s = stored('training_speed.json')
    assert s['step']['size'] == 224 and s['limits'] == dict(step_ratio=2, time_ratio=3)
    assert s['step']['ratio']['median'] >= 2


@pytest.mark.peer
def test_training_is_measured_beside_fastai(tmp_path):
    "What CI can repeat: both sides take their steps, on small phantoms"
    s = measured('training_speed.py', '--quick', out=tmp_path / 's.json')
    assert s['step']['size'] == 96 and s['step']['ratio']['median'] > 1, s


@pytest.mark.peer
def test_the_loader_is_measured_beside_fastai(tmp_path):
    "What CI can repeat: that both sides run, and that ours is the quicker one by the mark (it is by far more)"
    s = measured('loader_speed.py', '--quick', '--pictures', '96', out=tmp_path / 's.json')
    names = {e['name'] for e in s['epochs']}
    assert any('fastai' in n for n in names) and any('memory-mapped' in n for n in names)
    assert s['summary']['least_epoch_ratio'] > 3, s['summary']
