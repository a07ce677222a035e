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


def test_the_time_to_the_same_accuracy_holds_its_mark():
    "Recomputed from the stored curves, with the recipe that the trials start from"
    s = stored('training_speed.json')
    a, base = s['accuracy'], stored('ham10000_plan.json')['base']
    assert a['n'] == 330 and a['recipe'] == base
    plain, ours = (a['epochs'][k] for k in ('fastai', 'skin_gradcam'))
    assert a['target'] == plain[-1]['balanced_accuracy'] and len(ours) == base['epochs']
    reached = next(e['seconds'] for e in ours if e['balanced_accuracy'] >= a['target'])
    assert plain[-1]['seconds'] / reached >= 3 and plain[-1]['seconds'] / ours[-1]['seconds'] >= 3
    assert a['difference']['high'] >= 0


def test_notebooks_run_in_three_minutes():
    s = stored('notebook_times.json')
    books = sorted(str(f.relative_to(ROOT)) for f in (ROOT / 'nbs').rglob('*.ipynb') if '_proc' not in f.parts)
    assert s['limit_s'] == 180 and sorted(s['notebooks']) == books, 'python benchmarks/notebook_times.py'
    for name, b in s['notebooks'].items(): assert b['seconds'] < 180 and not b['error'] and not b['warned'], (name, b)


@pytest.mark.alone
def test_a_notebook_is_timed_on_a_fresh_checkout(tmp_path):
    s = measured('notebook_times.py', '--only', 'nbs/00_lesions.ipynb', '--check', out=tmp_path / 's.json')
    assert [*s['notebooks']] == ['nbs/00_lesions.ipynb'] and 0 < s['total_s'] < 180


@pytest.mark.alone
@pytest.mark.peer
def test_training_is_measured_beside_fastai(tmp_path):
    "What CI can repeat: both sides take their steps, on small phantoms"
    s = measured('training_speed.py', '--quick', out=tmp_path / 's.json')
    assert s['step']['size'] == 96 and s['step']['ratio']['median'] > 1, s


@pytest.mark.alone
@pytest.mark.peer
def test_the_loader_is_measured_beside_fastai(tmp_path):
    "What CI can repeat: that both sides run, and that ours is the quicker one by the mark (it is by far more)"
    s = measured('loader_speed.py', '--quick', '--pictures', '96', out=tmp_path / 's.json')
    names = {e['name'] for e in s['epochs']}
    assert any('fastai' in n for n in names) and any('memory-mapped' in n for n in names)
    assert s['summary']['least_epoch_ratio'] > 3, s['summary']
