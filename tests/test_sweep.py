"""A sweep through its command: two at once, killed and started again, wrong input; no fold is trained twice."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

optuna = pytest.importorskip('optuna', reason="pip install 'skin_gradcam[sweep]'")

from skin_gradcam.data import Manifest, draw_manifest, read_folder  # noqa: E402
from skin_gradcam.phantoms import write_phantoms  # noqa: E402
from skin_gradcam.sweep import SweepError, found, judge, open_study, read_space, sweep  # noqa: E402

BASE = dict(arch='resnet18', pretrained=False, size=32, epochs=2, freeze_epochs=0, bs=8)
SEARCH = {'lr': dict(low=1e-4, high=1e-2, log=True), 'augment.blur': dict(low=0., high=1.)}
COMMAND = """
import sys, time
from pathlib import Path
import torch
from skin_gradcam import sweep as s
torch.set_num_threads(1)
d, n, hold = sys.argv[1:]
plain = s.run_fold
def noted(trial, seed, fold, manifest, out, *a):
    done = (Path(out) / trial.name / f'seed{seed}-fold{fold}.json').exists()
    told = plain(trial, seed, fold, manifest, out, *a)
    if not done:
        with open(f'{d}/trained.txt', 'a') as f: f.write(f'{trial.name} {fold}\\n')
    while hold and fold == 0:
        Path(f'{d}/inside').touch()
        time.sleep(.1)
    return told
s.run_fold = noted
manifest = s.Manifest.load(f'{d}/roles.csv', f'{d}/phantoms')
s.sweep(s.read_space(f'{d}/space.json'), manifest, f'{d}/out', f'{d}/runs', n=int(n), silent=4., cache='memory')
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = write_phantoms(tmp_path / 'phantoms', per_class=8, seed=0)
    draw_manifest(read_folder(folder)[0], folder, per_class=8, shares=(4, 2, 2, 2), folds=2,
                  seed=0).save(tmp_path / 'roles.csv')
    (tmp_path / 'space.json').write_text(json.dumps(dict(base=BASE, search=SEARCH, metric='brier')))
    return tmp_path


def start(place: Path, n: int, hold: str = '') -> subprocess.Popen:
    "A process of the sweep; one that is to `hold` stops between the first and the second fold of its first recipe"
    return subprocess.Popen([sys.executable, '-c', COMMAND, place, str(n), hold], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, start_new_session=True)


def until(what, seconds: float = 120.) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'it did not come about'
        time.sleep(.05)


def test_two_at_once_killed_and_called_again(place: Path):
    "One of two processes is killed between two folds; who comes later judges its recipe, and trains nothing twice"
    a, b = start(place, 6, 'hold'), start(place, 6)
    until(lambda: (place / 'inside').exists())
    os.kill(a.pid, signal.SIGKILL)
    a.wait()
    assert b.wait(240) == 0, b.stderr.read().decode()
    time.sleep(5)                                          # the killed one has been silent for long enough
    c = start(place, 9)
    assert c.wait(240) == 0, c.stderr.read().decode()

    space, m = read_space(place / 'space.json'), Manifest.load(place / 'roles.csv', place / 'phantoms')
    study = open_study(space, m, place / 'out' / 'study.db')
    states = Counter(t.state.name for t in study.trials)
    assert states['COMPLETE'] + states['PRUNED'] >= 9 and states['RUNNING'] == 0
    killed = [t for t in study.trials if t.state.name == 'FAIL']
    assert len(killed) == 1 and 'reason' not in killed[0].user_attrs
    heirs = [t for t in study.trials if t.params == killed[0].params and t.number != killed[0].number]
    assert [t.state.name in ('COMPLETE', 'PRUNED') for t in heirs] == [True]
    trained = Counter((place / 'trained.txt').read_text().split('\n')[:-1])
    assert max(trained.values()) == 1
    best = study.best_trial
    assert judge(best, space, m, place / 'out', place / 'runs', 'memory') == best.value
    table = found(study)
    assert table.folder[0] == best.user_attrs['folder'] and len(table) == len(study.trials)


def test_several_processes_of_one_call(place: Path):
    space, m = read_space(place / 'space.json'), Manifest.load(place / 'roles.csv', place / 'phantoms')
    study = sweep(space, m, place / 'out', place / 'runs', n=3, jobs=2)
    assert sum(t.state.name in ('COMPLETE', 'PRUNED') for t in study.trials) >= 3


def test_what_goes_wrong_is_told(place: Path):
    space, m = read_space(place / 'space.json'), Manifest.load(place / 'roles.csv', place / 'phantoms')
    sweep(space, m, place / 'out', place / 'runs', n=1, cache='memory')
    with pytest.raises(SweepError, match='was begun with another manifest'):
        folder = write_phantoms(place / 'others', per_class=8, seed=1)
        other = draw_manifest(read_folder(folder)[0], folder, per_class=8, shares=(4, 2, 2, 2), folds=2, seed=0)
        open_study(space, other, place / 'out' / 'study.db')
    for picture in (place / 'phantoms').rglob('*.jpg'): picture.write_bytes(b'torn')
    with pytest.raises(ValueError, match='jpg|recipes in a row'):
        sweep(space, m, place / 'out', place / 'runs', n=9, cache='memory')
    with pytest.raises(SweepError, match='no database of a study'):
        open_study(space, m, 'postgresql://nobody@localhost:1/none')
    for text, words in (('{', 'not a space'), ('[]', 'no "search"'), ('{"search": {"lr": []}}', 'search.lr is'),
                        ('{"search": {"lr": {"low": 2, "high": 1}}}', 'search.lr is'),
                        ('{"search": {"checkpoint": ["best"]}}', 'choose the epoch')):
        (place / 'wrong.json').write_text(text)
        with pytest.raises(ValueError, match=words): read_space(place / 'wrong.json')
