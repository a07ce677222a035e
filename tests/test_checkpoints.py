"Checkpoints and run folders under damage, kills and refused writes; no pickle is ever read"
import copy
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from skin_gradcam import checkpoints as C
from skin_gradcam.bundle import BundleInfo, write_bundle
from skin_gradcam.checkpoints import CheckpointError, Run, list_runs, load_checkpoint, save_checkpoint, verify_run
from skin_gradcam.data import Manifest


def small_manifest(root):
    kinds = [('nv', 'train', 0), ('bkl', 'train', 1), ('mel', 'valid', 0), ('nv', 'test', -1)]
    rows = [dict(image_id=f'i{k}', path=f'i{k}.jpg', dx=d, lesion_id=f'l{k}', sha256=f'{k:064d}', role=r, fold=f)
            for k, (d, r, f) in enumerate(kinds)]
    return Manifest(pd.DataFrame(rows), root)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / 'run', dict(arch='Linear', seed=1), small_manifest(tmp_path))


def full_run(run):
    model = nn.Linear(3, 3)
    for k in range(3):
        run.log_epoch(dict(log_loss=1. - k / 10))
        run.keep(model, k, dict(log_loss=1. - k / 10))
    run.write_metrics(dict(valid=1.))
    info = BundleInfo(name='t', arch='Linear', classes=['nv', 'bkl', 'mel'], size=64, mean=[.5] * 3, std=[.5] * 3,
                      manifest_hash='0' * 64, seen_lesions=dict(train=['a'], valid=[], calibration=[]))
    write_bundle(run.bundle_path, {k: v.numpy() for k, v in model.state_dict().items()}, info)
    run.finish()
    return model


def test_200_damaged_files_are_refused_and_nothing_is_unpickled(tmp_path, monkeypatch):
    def never(*a, **k): raise AssertionError('a pickle was read')
    for where, name in ((pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'), (torch, 'load')):
        monkeypatch.setattr(where, name, never)
    file = tmp_path / 'c.safetensors'
    save_checkpoint(file, nn.Linear(4, 4).state_dict(), dict(epoch=1, metrics=dict(log_loss=.5)))
    good, rng = file.read_bytes(), random.Random(0)
    for k in range(200):
        bad = bytearray(good)
        bit = rng.randrange(8 * len(good))
        if k % 4 < 2: bad[bit // 8] ^= 1 << bit % 8
        elif k % 4 == 2: del bad[bit // 8:]
        else: bad = bytearray(rng.randbytes(rng.randrange(300)))
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match='c.safetensors'): load_checkpoint(file)
    file.write_bytes(good)
    assert load_checkpoint(file)[1]['epoch'] == 1


def test_every_bit_of_the_header_counts(tmp_path):
    file = tmp_path / 'c.safetensors'
    save_checkpoint(file, dict(w=torch.zeros(2)), dict(epoch=1))
    good = file.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(good)), 1500):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(CheckpointError): load_checkpoint(file)


@pytest.mark.parametrize('header', [
    b'', b'{}', b'[]', b'[' * 10**5, b'{"__metadata__":3}', b'{"__metadata__":{"skin_gradcam":"{}"}}',
    b'{"__metadata__":{"skin_gradcam":"[1]"}}', b'{"__metadata__":{"skin_gradcam":3}}',
    b'{"__metadata__":{"skin_gradcam":"{\\"format\\":\\"skin_gradcam.checkpoint\\",\\"schema\\":1}"}}'])
def test_foreign_headers(tmp_path, header):
    file = tmp_path / 'c.safetensors'
    file.write_bytes(len(header).to_bytes(8, 'little') + header + b'\0' * 16)
    for read in (load_checkpoint, C.read_meta):
        with pytest.raises(CheckpointError, match='c.safetensors'): read(file)


def test_a_real_network_comes_back_bit_for_bit(tmp_path):
    from skin_gradcam.models import create_model
    net = create_model('tf_efficientnet_lite0', pretrained=False).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / 'n.safetensors', net.state_dict(), dict(arch=net.arch))
    other = copy.deepcopy(net)
    for q in other.parameters(): nn.init.zeros_(q)
    other.load_state_dict(load_checkpoint(tmp_path / 'n.safetensors')[0])
    back = other.state_dict()
    for k, v in net.state_dict().items(): assert torch.equal(v, back[k]), k


LIMIT = """
import resource, signal, sys, torch
from skin_gradcam.checkpoints import CheckpointError, Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try: run.save(torch.nn.Linear(300, 300), 'best', 9, {})
except CheckpointError as e: print(e)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='needs setrlimit')
def test_a_save_that_the_system_refuses_leaves_the_old_checkpoint(run):
    model = full_run(run)
    out = subprocess.run([sys.executable, '-c', LIMIT, str(run.folder)], check=True, capture_output=True, text=True)
    assert 'best.safetensors: cannot be written' in out.stdout and 'untouched' in out.stdout
    assert run.load(model, 'best')['epoch'] == 2 and verify_run(run.folder) == []


WRITER = """
import sys, torch
from skin_gradcam.checkpoints import Run
run, model = Run.open(sys.argv[1]), torch.nn.Linear(300, 300)
print('go', flush=True)
while True:
    k = len(run.history)
    with torch.no_grad(): model.weight.fill_(k)
    run.log_epoch(dict(log_loss=1/(k+1)))
    run.keep(model, k, dict(log_loss=1/(k+1)))
"""


def test_a_kill_at_any_moment_leaves_whole_files(run):
    rng, model = random.Random(1), nn.Linear(300, 300)
    run.log_epoch(dict(log_loss=1.))
    nn.init.zeros_(model.weight)
    run.keep(model, 0, dict(log_loss=1.))
    for _ in range(3):
        p = subprocess.Popen([sys.executable, '-c', WRITER, str(run.folder)], stdout=subprocess.PIPE)
        assert p.stdout.readline() == b'go\n'
        time.sleep(.05 + rng.random() / 4)
        p.send_signal(signal.SIGKILL)
        p.wait()
        p.stdout.close()
        for said in verify_run(run.folder): assert 'was left by an interrupted write' in said
        for f in C._leftovers(run.folder): f.unlink()
        assert verify_run(run.folder) == []
        last = run.load(model, 'last')['epoch']
        assert (model.weight == last).all() and len(run.history) - last in (1, 2)
        assert run.load(model, 'best')['epoch'] - last in (0, 1)
        assert list(run.history.epoch) == list(range(len(run.history)))


def test_history_gives_numbers_back_exactly(run):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 50) * 10.**rng.integers(-20, 20, 50)
    for v in values: run.log_epoch(dict(phase='all', x=v, y=torch.tensor(float(v)), n=np.int64(3)))
    assert list(run.history.x) == list(values) and list(run.history.n) == [3] * 50
    run.log_epoch(dict(x=float('nan'), z=1))
    run.log_epoch(dict(x=float('inf'), phase='a, "quoted"\nword'))
    h = run.history
    assert np.isnan(h.x.iloc[-2]) and h.x.iloc[-1] == np.inf and h.z.isna().sum() == 51
    assert h.phase.iloc[-1] == 'a, "quoted"\nword'
    assert list(h.epoch) == list(range(52))


@pytest.mark.parametrize('text', [b'', b'\xff\xfe', b'a,b\n1,2\n', b'epoch,x\n0,1\n0,2\n', b'epoch\nx\n',
                                  b'epoch,x\n0,1,2,3\n1,2\n', b'"'])
def test_a_foreign_history_is_refused(run, text):
    (run.folder / 'history.csv').write_bytes(text)
    with pytest.raises(CheckpointError, match='history.csv'): _ = run.history
    with pytest.raises(CheckpointError, match='history.csv'): run.log_epoch(dict(x=1))
    assert (run.folder / 'history.csv').read_bytes() == text
    assert list_runs(run.folder.parent).status.tolist() == ['damaged']


@pytest.mark.parametrize('epoch', ['1', 1.5, None, True, float('nan')])
def test_an_epoch_is_a_whole_number(run, epoch):
    with pytest.raises(CheckpointError, match='no whole number'): run.log_epoch(dict(epoch=epoch))


def test_every_damage_to_a_finished_run_is_found(run, tmp_path):
    full_run(run)
    assert verify_run(run.folder) == []
    files = sorted(f.relative_to(run.folder) for f in run.folder.rglob('*') if f.is_file())
    assert len(files) == 9
    for f in files:
        for damage in ('flip', 'cut', 'delete'):
            copy = tmp_path / 'copy'
            shutil.copytree(run.folder, copy)
            data = bytearray((copy / f).read_bytes())
            data[len(data) // 2] ^= 1
            if damage == 'delete': (copy / f).unlink()
            else: (copy / f).write_bytes(data if damage == 'flip' else data[:-3])
            problems = verify_run(copy)
            assert len(problems) == 1 and (f.name in problems[0] or f.name == 'bundle.json'), (f, damage, problems)
            shutil.rmtree(copy)
    (run.folder / 'checkpoints' / 'learner.pkl').write_bytes(b'cos\nsystem\n')
    assert 'learner.pkl' in verify_run(run.folder)[0]


def test_overwriting_takes_only_the_runs_own_files(run, tmp_path):
    full_run(run)
    (run.folder / 'report.html').write_text('mine')
    os.symlink(tmp_path, run.folder / 'elsewhere')
    again = Run.create(run.folder, dict(arch='Linear', seed=2), small_manifest(tmp_path), overwrite=True)
    left = ['checkpoints', 'elsewhere', 'manifest.csv', 'recipe.json', 'report.html', 'run.json']
    assert sorted(f.name for f in again.folder.iterdir()) == left
    assert len(again.history) == 0 and again.status == 'running'


def test_a_folder_with_pictures_may_become_a_run(tmp_path):
    (tmp_path / 'demo' / 'phantoms').mkdir(parents=True)
    assert Run.create(tmp_path / 'demo', {}, small_manifest(tmp_path)).status == 'running'
    (tmp_path / 'file').write_text('')
    with pytest.raises(CheckpointError, match='is a file'): Run.create(tmp_path / 'file', {}, small_manifest(tmp_path))


def test_two_handles_see_the_same_run(run):
    other, model = Run.open(run.folder), nn.Linear(2, 2)
    assert run.keep(model, 0, dict(log_loss=.5)) and not other.keep(model, 1, dict(log_loss=.6))
    assert other.load(model, 'last')['epoch'] == 1
    run.finish()
    assert other.status == 'finished'


def test_equal_runs_write_equal_checkpoints(tmp_path):
    torch.manual_seed(0)
    model, files = nn.Linear(2, 2), []
    for name in 'ab':
        r = Run.create(tmp_path / name, dict(seed=1), small_manifest(tmp_path))
        files.append(r.save(model, 'last', 3, dict(log_loss=.1)).read_bytes())
    assert files[0] == files[1]
