"Checkpoints and run folders under damage, kills, full disks and competing processes; no pickle is ever read"
import copy
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from disks import disk_of_1_mib
from torch import nn

from skin_gradcam import checkpoints as C
from skin_gradcam.bundle import BundleInfo, write_bundle
from skin_gradcam.checkpoints import (CheckpointError, Run, hold_run, is_held, leftovers, load_checkpoint,
                                      save_checkpoint)
from skin_gradcam.data import Manifest
from skin_gradcam.runs import list_runs, verify_run


def small_manifest(root):
    kinds = [('nv', 'train', 0), ('bkl', 'train', 1), ('mel', 'valid', 0), ('nv', 'test', -1)]
    rows = [dict(image_id=f'i{k}', path=f'i{k}.jpg', dx=d, lesion_id=f'l{k}', sha256=f'{k:064d}', role=r, fold=f)
            for k, (d, r, f) in enumerate(kinds)]
    return Manifest(pd.DataFrame(rows), root)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / 'run', dict(arch='Linear', seed=1), small_manifest(tmp_path))


def full_run(run, finish=True):
    model = nn.Linear(3, 3)
    for k in range(3):
        run.log_epoch(dict(log_loss=1. - k / 10))
        run.keep(model, k, dict(log_loss=1. - k / 10))
    run.write_metrics(dict(valid=1.))
    info = BundleInfo(name='t', arch='Linear', classes=['nv', 'bkl', 'mel'], size=64, mean=[.5] * 3, std=[.5] * 3,
                      manifest_hash='0' * 64, seen_lesions=dict(train=['a'], valid=[], calibration=[]))
    write_bundle(run.bundle_path, {k: v.numpy() for k, v in model.state_dict().items()}, info)
    if finish: run.finish()
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
    for read in (load_checkpoint, C.read_meta, C.check_checkpoint):
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
    model = full_run(run, finish=False)
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
        for f in leftovers(run): f.unlink()
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
    files = sorted(f.relative_to(run.folder) for f in run.folder.rglob('*') if f.is_file() and f.suffix != '.lock')
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
    assert sorted(f.name for f in again.folder.iterdir() if f.name != '.run.lock') == left
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


# ---------------------------------------------------------------- what is read, and how


def test_a_checkpoint_is_not_held_twice(tmp_path):
    "Loading takes the memory of the tensors and no second copy; checking takes that of the largest tensor"
    file, n = tmp_path / 'big.safetensors', 8 * 2**20
    save_checkpoint(file, {f't{k}': torch.full((n // 4,), float(k)) for k in range(8)}, {})
    code = ('import sys, resource, torch\nfrom skin_gradcam import checkpoints as C\n'
            'now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n'
            'C.check_checkpoint(sys.argv[2])\nbefore = now()\nx = getattr(C, sys.argv[3])(sys.argv[1])\n'
            'print(now() - before)')
    save_checkpoint(tmp_path / 'small.safetensors', dict(t=torch.zeros(9)), {})
    taken = {}
    for f in ('load_checkpoint', 'check_checkpoint'):
        command = [sys.executable, '-c', code, file, tmp_path / 'small.safetensors', f]
        taken[f] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert taken['load_checkpoint'] < 9.5 * n and taken['check_checkpoint'] < 3 * n, taken


def test_loaded_tensors_are_aligned_and_independent(tmp_path):
    "As torch's own are, so that vectorised arithmetic on them rounds as it did before they were saved"
    save_checkpoint(tmp_path / 'c.safetensors', dict(a=torch.ones(3), b=torch.ones(5).half(), n=torch.tensor(1)), {})
    state = load_checkpoint(tmp_path / 'c.safetensors')[0]
    assert all(t.data_ptr() % 64 == 0 for t in state.values())
    state['a'].mul_(2)
    assert state['b'].sum() == 5 and len({t.untyped_storage().data_ptr() for t in state.values()}) == 3


def sealed(layout, data=b'\0' * 16):
    "A file whose hash is right, whatever its tensors say"
    about = json.dumps(dict(format=C.FORMAT, schema=1, sha256='0' * 64, meta={}))
    head = json.dumps(dict(__metadata__=dict(skin_gradcam=about), **layout)).encode()
    head = len(head).to_bytes(8, 'little') + head
    h = C._start_hash(head, '0' * 64)
    h.update(data)
    return head.replace(b'0' * 64, h.hexdigest().encode(), 1) + data


def entry(shape=(4,), dtype='F32', begin=0, end=16):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[begin, end])


def test_the_forger_of_these_tests_can_forge(tmp_path):
    (tmp_path / 'c.safetensors').write_bytes(sealed(dict(a=entry())))
    assert load_checkpoint(tmp_path / 'c.safetensors')[0]['a'].tolist() == [0] * 4


@pytest.mark.parametrize('layout', [
    dict(a=entry(), b=entry()), dict(a=entry(begin=4)), dict(a=entry((3,), end=12)), dict(a=entry((5,))), {},
    dict(a=entry(dtype='F64')), dict(a=entry(dtype='pickle')), dict(a=entry(dtype=['F32'])), dict(a=entry((-4, -1))),
    dict(a=entry((0, 10**17, 10**17), end=0), b=entry()), dict(a=entry((4.0,))), dict(a=entry((True, 4))),
    dict(a=entry((1,) * 40 + (4,))), dict(a=entry(begin=-16, end=0), b=entry()), dict(a=3), dict(a=[]), dict(a={}),
    dict(a=dict(entry(), data_offsets=[0])), dict(a=dict(entry(), data_offsets=['0', '16'])),
    dict(a=dict(entry(), shape=None)), dict(a=entry((2**40,))), dict(a=entry((10**17, 10**17, 10**17)))])
def test_a_layout_that_does_not_fit_is_refused_though_its_hash_is_right(tmp_path, layout):
    file = tmp_path / 'c.safetensors'
    file.write_bytes(sealed(layout))
    for read in (load_checkpoint, C.check_checkpoint):
        with pytest.raises(CheckpointError, match='c.safetensors: (its tensors cannot be read|is torn)'): read(file)


def test_a_surrogate_in_the_place_of_the_hash(tmp_path):
    file = tmp_path / 'c.safetensors'
    file.write_bytes(sealed(dict(a=entry())).replace(rb'"sha256\": \"', rb'"sha256\": \"\\ud800', 1))
    with pytest.raises(CheckpointError, match='c.safetensors'): load_checkpoint(file)


def test_what_cannot_be_read_again_is_not_written(run):
    model = nn.Linear(2, 2)
    for bad in ({1: 2, '1': 3}, dict(n=10**30), dict(f=print)):
        with pytest.raises(CheckpointError, match='nothing was written'): run.save(model, 'last', 0, {}, state=bad)
    with pytest.raises(CheckpointError, match='would have a header of'):
        run.save(model, 'last', 0, {}, state=dict(t='x' * 2**24))
    assert not run.checkpoint('last').exists() and leftovers(run) == []


# ---------------------------------------------------------------- full disks


def full_disk(folder, monkeypatch):
    "An `fsync` that counts, where no disk of 1 MiB can be mounted"
    real = os.fsync
    def fsync(fd):
        full = sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) > 2**20
        if full: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd)
    return lambda: monkeypatch.setattr(C.os, 'fsync', fsync)


def test_a_full_disk_leaves_weights_and_state_as_they_were(tmp_path, monkeypatch):
    "300 kB of weights as best and last and 200 kB of state fit into 1 MiB, what comes next does not"
    small, large = nn.Linear(270, 270), nn.Linear(400, 400)
    with disk_of_1_mib(tmp_path / 'disk', full_disk(tmp_path / 'disk', monkeypatch)):
        run = Run.create(tmp_path / 'disk' / 'run', {}, small_manifest(tmp_path))
        run.log_epoch(dict(log_loss=1.))
        run.keep(small, 0, dict(log_loss=1.))
        run.save_state(dict(w=torch.zeros(50_000)), 0, {})
        before = {f: f.read_bytes() for f in run.folder.rglob('*') if f.is_file()}
        with pytest.raises(CheckpointError, match='best.safetensors: cannot be written .No space left .*; what was'):
            run.keep(large, 1, dict(log_loss=.5))
        with pytest.raises(CheckpointError, match='state.safetensors: cannot be written .No space left'):
            run.save_state(dict(w=torch.zeros(200_000)), 1, {})
        run.rewind(0)
        assert {f: f.read_bytes() for f in run.folder.rglob('*') if f.is_file()} == before
        assert verify_run(run.folder) == [] and run.load(small, 'last')['epoch'] == 0


# ---------------------------------------------------------------- killed at every single step

KILLS = Path(__file__).with_name('killed_run.py')


def killed_run(*args):
    return subprocess.run([sys.executable, KILLS, *map(str, args)], capture_output=True, text=True, timeout=500)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_before_any_change_of_the_disk_and_resumed(tmp_path):
    "From the first folder to the last rename of a run of three epochs: it ends with the files of the run never killed"
    done = killed_run('each', tmp_path, 2)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said['kills'] == said['equal'] > 100 and said['wrong'] == []


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_again_and_again(tmp_path):
    "In the resumed run too, and while it rewinds"
    done = killed_run('chain', tmp_path, 1)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said['runs'] == said['equal'] == 12 and said['kills'] > 30 and said['wrong'] == []


# ---------------------------------------------------------------- one process at a time

HOLD = """
import sys, time
from skin_gradcam.checkpoints import Run, hold_run
with hold_run(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
"""


@contextmanager
def held_elsewhere(folder):
    p = subprocess.Popen([sys.executable, '-c', HOLD, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'held\n'
        yield p
    finally:
        p.kill()
        p.wait()
        p.stdout.close()


def test_a_second_training_in_the_same_folder_is_refused(run, tmp_path):
    with held_elsewhere(run.folder):
        assert is_held(run.folder) and list_runs(run.folder.parent).status.tolist() == ['running']
        with pytest.raises(CheckpointError, match='run: another process is at work in this run; wait for it, end it'):
            with hold_run(run.folder, wait=.1): pass
    assert not is_held(run.folder)  # the death of the holder lets go
    with hold_run(run.folder, wait=5):
        Run.create(run.folder, {}, small_manifest(tmp_path), overwrite=True)  # the same process may go in again


def test_a_folder_that_is_trained_in_cannot_be_overwritten(run, tmp_path, monkeypatch):
    real = C.hold_run
    monkeypatch.setattr(C, 'hold_run', lambda folder: real(folder, wait=.1))
    with held_elsewhere(run.folder), pytest.raises(CheckpointError, match='another process is at work'):
        Run.create(run.folder, dict(seed=2), small_manifest(tmp_path), overwrite=True)
    assert run.recipe['seed'] == 1


# ---------------------------------------------------------------- the state


def test_a_state_gives_every_number_back(run):
    rng = np.random.default_rng(0)
    losses, bad = rng.normal(0, 1, 200) * 10.**rng.integers(-300, 300, 200), [float('nan'), float('-inf')] * 100
    rows = [dict(epoch=k, loss=float(v), bad=b) for k, (v, b) in enumerate(zip(losses, bad))]
    generator = np.random.default_rng(1).bit_generator.state
    run.save_state(dict(w=torch.zeros(1)), 0, dict(rows=rows, generator=generator))
    back = run.load_state()[1]['state']
    assert all(repr(a) == repr(b) for a, b in zip(rows, back['rows']))
    again = np.random.default_rng()
    again.bit_generator.state = back['generator']
    assert again.random() == np.random.default_rng(1).random()


@pytest.mark.parametrize('bad', [{'a': {3: 4}}, {'$float': 'nan'}, {'f': {1, 2}}, {'f': b'x'}])
def test_a_state_that_would_not_come_back_is_refused(run, bad):
    run.save_state(dict(w=torch.zeros(1)), 0, dict(a=1))
    with pytest.raises(CheckpointError, match='state.safetensors: .*nothing was written'):
        run.save_state(dict(w=torch.ones(1)), 1, bad)
    assert run.load_state()[1]['epoch'] == 0


def test_a_history_with_new_columns_goes_back_byte_for_byte(run):
    "A column that comes late makes whole numbers of the earlier rows floats; rewinding undoes that too"
    run.log_epoch(dict(n=3, log_loss=1.))
    run.save_state(dict(w=torch.zeros(1)), 0, {})
    before = (run.folder / 'history.csv').read_bytes()
    run.log_epoch(dict(log_loss=.5, new='x'))
    assert (run.folder / 'history.csv').read_bytes() != before
    run.rewind(0)
    assert (run.folder / 'history.csv').read_bytes() == before
    run.rewind(None)
    assert not run.has_state and len(run.history) == 0


def test_weights_are_no_state_and_a_state_is_no_weights(run):
    model = nn.Linear(2, 2)
    run.keep(model, 0, dict(log_loss=1.))
    run.save_state(dict(w=torch.zeros(1)), 0, {})
    with pytest.raises(CheckpointError, match='does not fit the network'): run.load(model, 'state')
    shutil.copy(run.checkpoint('best'), run.checkpoint('state'))
    with pytest.raises(CheckpointError, match='state.safetensors: holds no state'): run.load_state()


def test_records_of_before_are_read(run):
    "run.json of earlier versions has no keep_last, and their checkpoints say which they are"
    record = {k: v for k, v in run.record.items() if k != 'keep_last'}
    C._write_record(run.folder, record)
    model = nn.Linear(2, 2)
    for k in range(3): run.keep(model, k, dict(log_loss=1.))
    assert sorted(f.stem for f in (run.folder / 'checkpoints').iterdir()) == ['best', 'last']
    about = dict(which='last', **C.read_meta(run.checkpoint('last')))
    save_checkpoint(run.checkpoint('last'), model.state_dict(), about)
    assert run.load(model, 'last')['epoch'] == 2 and verify_run(run.folder) == []
