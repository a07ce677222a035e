"Training: options that change what is learned, kills at random moments, two at once, logs"
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from skin_gradcam.checkpoints import CheckpointError, Run, hold_run
from skin_gradcam.data import Manifest, draw_manifest, read_folder
from skin_gradcam.loaders import class_weights
from skin_gradcam.models import create_model
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.training import Recipe, epoch_line, fit, make_learner, same_weights, train, training_loss

ROOT = Path(__file__).resolve().parent.parent
TINY = Recipe(arch='resnet18', pretrained=False, size=48, epochs=2, freeze_epochs=0, bs=6, lr=2e-3)


@pytest.fixture(scope='module')
def manifest(tmp_path_factory) -> Manifest:
    folder = write_phantoms(tmp_path_factory.mktemp('training') / 'phantoms', per_class=12, seed=0)
    return draw_manifest(read_folder(folder)[0], folder, per_class=12, shares=(6, 2, 2, 2), seed=0)


def weights(run: Run):
    net = create_model('resnet18', pretrained=False)
    run.load(net, 'last')
    return net


def test_kills_at_random_moments(tmp_path):
    "A few of the fifty of results/kill_resume.json"
    out = tmp_path / 'k.json'
    done = subprocess.run([sys.executable, ROOT / 'benchmarks/kill_resume.py', '--kills', '3', '--seed', '5', '--out',
                           out], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    assert told['kills'] == 3 and told['exact_runs'] == told['runs'] > 0 and not told['wrong']


def test_the_stored_kills_are_exact():
    told = json.loads((ROOT / 'results' / 'kill_resume.json').read_text())
    assert told['kills'] >= 50 and told['exact_runs'] == told['runs'] and not told['wrong']
    assert sum(v > 0 for v in told['kills_by_finished_epochs'].values()) >= 4


@pytest.mark.parametrize('change', [dict(mixup=.4), dict(cutmix=1.), dict(label_smoothing=0.), dict(ema=0.),
                                    dict(class_weights=True, balanced=False), dict(progressive=((32, 1),)),
                                    dict(pct_start=.6), dict(seed=1), dict(dropout=.6), dict(consistency=2.),
                                    dict(consistency=2., camera=dict(jpeg=20))])
def test_each_option_changes_what_is_learned(change, manifest, tmp_path):
    if 'class_weights' in change:  # equal classes have equal weights: thin one out
        d = manifest.df
        gone = d.image_id[(d.role == 'train') & (d.dx == 'mel')][:4]
        manifest = Manifest(d[~d.image_id.isin(gone)], manifest.root, manifest.classes)
    base = TINY.change(balanced=change.get('balanced', True))
    runs = [train(r, manifest, tmp_path / str(i), progress=False) for i, r in enumerate((base, base.change(**change)))]
    assert not same_weights(*map(weights, runs))


def test_class_weights_reach_the_loss(manifest):
    loss = training_loss(TINY.change(class_weights=True, label_smoothing=0.), manifest)
    assert torch.allclose(loss.func.weight, class_weights([0, 1, 2], 3))


def test_early_stopping_ends_and_ships_the_best(manifest, tmp_path):
    "With a rate that destroys what was learned, no epoch after the first improves"
    r = train(TINY.change(epochs=9, lr=.03, head_lr=.03, patience=2, checkpoint='best', monitor='log_loss', ema=0.),
              manifest, tmp_path / 'r', progress=False)
    losses = r.history.log_loss.to_numpy()
    assert len(losses) < 9 and len(losses) - 1 - int(np.nanargmin(losses)) == 2


def test_two_at_once(manifest, tmp_path, monkeypatch):
    "A second process that trains into the same folder is refused"
    code = ('import sys, time; from skin_gradcam.checkpoints import hold_run\n'
            'with hold_run(sys.argv[1]):\n  print("held", flush=True); time.sleep(60)')
    other = subprocess.Popen([sys.executable, '-c', code, tmp_path / 'r'], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        monkeypatch.setattr('skin_gradcam.training.hold_run', lambda out: hold_run(out, wait=.1))
        with pytest.raises(CheckpointError, match='another process is at work'): train(TINY, manifest, tmp_path / 'r')
    finally:
        other.kill()
        other.wait()


def test_what_is_shown_in_a_terminal(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('skin_gradcam.training.in_notebook', lambda: False)
    r = train(TINY, manifest, tmp_path / 'r')
    said = [line for line in capsys.readouterr().out.splitlines() if 'balanced accuracy' in line]
    assert len(said) == 2 and said[1].startswith('2/2 all 48 px') and said[1] == epoch_line(r.history, 2)


def test_tensorboard_log(manifest, tmp_path):
    event_file = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    r = train(TINY, manifest, tmp_path / 'r', progress=False, tensorboard=True)
    log = event_file.EventAccumulator(str(r.folder / 'tensorboard'))
    log.Reload()
    told = [e.value for e in log.Scalars('balanced_accuracy')]
    assert np.allclose(told, r.history.balanced_accuracy, atol=1e-6)


def test_bf16_trains_where_the_processor_can(manifest):
    from skin_gradcam.steps import has_bf16
    if not has_bf16(): return  # refused: see the traps
    learn = make_learner(TINY.change(bf16=True, epochs=1), manifest)
    with learn.no_bar(), learn.no_logging(): fit(learn, TINY.change(epochs=1))
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in learn.model.parameters())
