"""Training in two processes with gloo: what the page of `ddp` shows, for a network with batch norm, and with faults."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from skin_gradcam.data import draw_manifest, read_folder
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.training import Recipe, train

pytest.importorskip('accelerate', reason="pip install 'skin_gradcam[scale]'")

ROOT = Path(__file__).resolve().parent.parent
TINY = Recipe(arch='resnet18', pretrained=False, size=48, epochs=3, freeze_epochs=1, bs=12, lr=2e-3, seed=0)
PAIR = """
import json, os, sys
import torch
from skin_gradcam import ddp
torch.set_num_threads(1)
place, out, what = sys.argv[1:]
recipe = ddp.Recipe.load(f'{place}/recipe.json')
manifest = ddp.Manifest.load(f'{place}/roles.csv', f'{place}/phantoms')
rank, seen = int(os.environ['RANK']), dict(epochs=[], wrote=[])
class Note(ddp.Callback):
    order = 70
    def after_epoch(self):
        m, average = self.learn.model, self.learn.averaged_weights.state
        sums = [float(sum(v.double().abs().sum() for v in s.values())) for s in (m.state_dict(), average)]
        moved = [float(b.double().sum()) for n, b in m.named_buffers() if n.endswith('running_var')]
        seen['epochs'].append(dict(sums=sums, buffers=moved[:5], n=[len(v) for v in self.learn.dls.loaders],
                                   values=[float(v) for v in self.learn.recorder.values[-1]]))
plain = ddp.shared_learner
def noted(*a):
    learn, recorder = plain(*a)
    learn.add_cb(Note())
    return learn, recorder
ddp.shared_learner = noted
def audit(event, args):
    writes = event == 'open' and isinstance(args[0], str) and isinstance(args[1], str) and set(args[1]) & set('wax')
    if writes and args[0].startswith(out): seen['wrote'].append(os.path.relpath(args[0], out))
sys.addaudithook(audit)
try: ddp.train_together(recipe, manifest, out, progress=False, resume=what == 'resume')
except ValueError as e: seen['error'] = str(e)
with open(f'{place}/seen-{what}-{rank}.json', 'w') as f: json.dump(seen, f)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Phantoms, with a validation role of 9 pictures, which two processes cannot share evenly"
    d = tmp_path_factory.mktemp('ddp')
    folder = write_phantoms(d / 'phantoms', per_class=14, seed=0)
    m = draw_manifest(read_folder(folder)[0], folder, per_class=14, shares=(6, 3, 2, 2), seed=0)
    spare = m.df[m.df.role == 'valid'].groupby('dx').head(1).index
    m = type(m)(m.df.drop(spare).reset_index(drop=True), folder)
    m.save(d / 'roles.csv')
    TINY.save(d / 'recipe.json')
    (d / 'pair.py').write_text(PAIR)
    return d, m


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def launched(module: str, *args: object) -> subprocess.CompletedProcess:
    "A launcher's run, that has to succeed"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    command = [sys.executable, '-m', module, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def pair(place: Path, out: Path, what: str) -> list[dict]:
    "Two processes; what each of them saw"
    launched('torch.distributed.run', '--nproc_per_node', '2', '--master_port', free_port(),
             place / 'pair.py', place, out, what)
    return [json.loads((place / f'seen-{what}-{r}.json').read_text()) for r in range(2)]


@pytest.fixture(scope='module')
def two(place):
    d, _ = place
    return d / 'two', pair(d, d / 'two', 'new')


def test_both_processes_hold_and_know_the_same(two):
    "Weights, averages, running statistics and figures after each epoch; only the first process writes"
    out, (a, b) = two
    assert len(a['epochs']) == 4 and a['epochs'] == b['epochs']
    assert len({tuple(e['buffers']) for e in a['epochs']}) == 4            # they do move
    assert b['wrote'] == []
    assert any('run.json' in f for f in a['wrote']) and any('last.safetensors' in f for f in a['wrote'])


def test_the_figures_count_every_picture_once(place, two):
    "The best checkpoint, judged by one process over the 9 pictures, has the figures that two wrote down"
    from skin_gradcam.checkpoints import Run
    from skin_gradcam.evaluation import balanced_accuracy, softmax
    from skin_gradcam.models import create_model
    from skin_gradcam.training import log_loss, plain_loader, predict_logits
    _, m = place
    run = Run.open(two[0], m.root)
    model = create_model('resnet18', n_classes=3, pretrained=False)
    run.load(model, 'last')
    logits, y = predict_logits(model, plain_loader(model, m, 'valid', TINY))
    assert len(y) == 9
    last = run.history.iloc[-1]
    assert last.log_loss == pytest.approx(float(log_loss(torch.tensor(logits), torch.tensor(y))), abs=1e-4)
    assert last.balanced_accuracy == pytest.approx(float(balanced_accuracy(y, softmax(logits))), abs=1e-6)
    assert run.status == 'finished' and run.metrics['valid']['n'] == 9


def test_the_curve_is_that_of_one_process_within_noise(place, two):
    "Closer to a single process with the same seed than, at most, twice the spread over seeds"
    from skin_gradcam.checkpoints import Run
    d, m = place
    torch.set_num_threads(1)
    runs = [train(TINY.change(seed=s), m, d / f'one-{s}', progress=False) for s in range(4)]
    curves = [r.history.log_loss.to_numpy() for r in runs]
    spread = max(np.abs(a - b).max() for a in curves for b in curves)
    assert np.abs(Run.open(two[0]).history.log_loss.to_numpy() - curves[0]).max() <= 2 * spread


def test_what_fails_in_the_first_fails_in_all(place, two):
    "A finished run in the way: both processes stop with the same message, nobody waits"
    d, _ = place
    a, b = pair(d, two[0], 'again')
    assert 'holds a run' in a['error'] and a['error'] == b['error']
    assert pair(d, two[0], 'resume')[1].get('error') is None               # finished: nothing to do


def test_accelerate_launch_gives_what_torchrun_gives(place, two):
    "The command of the page, on a machine without a GPU: weights bit for bit as in the run that torchrun started"
    from skin_gradcam.checkpoints import Run
    d, m = place
    done = launched('accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
                    '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', free_port(),
                    '-m', 'skin_gradcam.ddp', '--data', m.root, '--manifest', d / 'roles.csv',
                    '--out', d / 'accelerate', '--recipe', d / 'recipe.json', '--quiet')
    run, other = Run.open(d / 'accelerate', m.root), Run.open(two[0], m.root)
    assert run.status == 'finished' and done.stdout.strip() == str(run.bundle_path)
    a, b = (load_file(r.bundle_path / 'model.safetensors') for r in (run, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (run.folder / 'history.csv').read_bytes() == (other.folder / 'history.csv').read_bytes()
