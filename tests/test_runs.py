"What is done with finished runs: damage, kills, full disks, archives from elsewhere, and the commands as a process"
from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from disks import disk_of_1_mib
from test_checkpoints import full_run, held_elsewhere, small_manifest
from torch import nn

from skin_gradcam import checkpoints as C
from skin_gradcam import runs as R
from skin_gradcam.bundle import seal_json
from skin_gradcam.checkpoints import CheckpointError, Run, run_files
from skin_gradcam.runs import (compare_runs, describe_run, export_run, import_run, list_runs, prune_run, rename_run,
                               verify_run)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def done(tmp_path):
    "A finished run with a bundle and three kept epochs"
    run = Run.create(tmp_path / 'done', dict(arch='Linear', seed=1), small_manifest(tmp_path), keep_last=3)
    full_run(run)
    return run


@pytest.fixture
def stopped(tmp_path):
    "A run that a kill has interrupted: ahead of its state, and with a half-written file"
    run = Run.create(tmp_path / 'stopped', dict(arch='Linear', seed=2), small_manifest(tmp_path))
    model = nn.Linear(3, 3)
    for k in range(3):
        run.log_epoch(dict(log_loss=1. - k / 10))
        run.keep(model, k, dict(log_loss=1. - k / 10))
        if k < 2: run.save_state(dict(w=torch.zeros(3)), k, dict(step=k))
    (run.folder / 'checkpoints' / '.state.safetensors.0123abcd.tmp').write_bytes(b'half')
    return run


def content(folder): return {f.relative_to(folder): f.read_bytes() for f in Path(folder).rglob('*') if f.is_file()}


# ---------------------------------------------------------------- damage


def test_stored_trials_of_damage():
    "More than six hundred files; benchmarks/checkpoint_faults.py makes them anew"
    s = json.loads((ROOT / 'results' / 'checkpoint_faults.json').read_text())
    groups = [s['checkpoints'], s['archives'], *s['records'].values()]
    assert s['checkpoints']['n'] == 200 and len(s['records']) == 6
    assert all(g['refused'] == g['n'] == sum(g['by_kind'].values()) >= 60 for g in groups)
    assert s['executed'] == 0 and s['trap_works'] and s['whole_file']['megabytes'] > 13
    assert s['whole_file']['check_checkpoint_s'] < s['limits']['check_14mb_s'] == .2


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_trials_of_damage(tmp_path):
    "A reduced version of the same"
    command = [sys.executable, ROOT / 'benchmarks/checkpoint_faults.py', '--quick', '--out', tmp_path / 's.json']
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    s = json.loads((tmp_path / 's.json').read_text())
    assert s['checkpoints']['refused'] == s['checkpoints']['n'] > 35 and s['trap_works'] and not s['executed']


def test_what_looks_without_checking_hashes_survives_damage(done):
    "Tables read descriptions alone; a damaged one may say nonsense or be refused, and never ends the table"
    rng, best = random.Random(0), done.checkpoint('best')
    good, ends = best.read_bytes(), set()
    for _ in range(400):
        bad, bit = bytearray(good), rng.randrange(8 * len(good))
        bad[bit // 8] ^= 1 << bit % 8
        best.write_bytes(bad)
        ends.add(list_runs(done.folder.parent).set_index('run').status['done'])
        assert repr(done) and done._repr_html_()
        try: assert len(describe_run(done)['checkpoints']) == 5
        except CheckpointError: pass
        with pytest.raises(CheckpointError): done.load(nn.Linear(3, 3))
    assert ends == {'finished', 'damaged'}


@pytest.mark.parametrize('meta', [dict(metrics=3), dict(metrics=dict(log_loss='x')), dict(metrics=[1]),
                                  dict(epoch='x')])
def test_a_description_of_other_types(done, meta):
    C.save_checkpoint(done.checkpoint('best'), nn.Linear(3, 3).state_dict(), meta)
    table = list_runs(done.folder.parent).set_index('run')
    assert table.status['done'] in ('finished', 'damaged') and len(describe_run(done)) == 5
    assert verify_run(done.folder)


def test_the_history_of_an_interrupted_run_is_put_right(stopped):
    "It has no hash yet; whatever became of it, the state has the rows"
    rng, file = random.Random(0), stopped.folder / 'history.csv'
    stopped.rewind(1)
    good = file.read_bytes()
    for k in range(60):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        if k % 3 == 2: file.unlink()
        else: file.write_bytes(bad if k % 3 else bad[:rng.randrange(len(bad))])
        try: _ = stopped.history
        except CheckpointError: pass
        stopped.rewind(1)
        assert file.read_bytes() == good


@pytest.mark.parametrize('change', [
    dict(metric=3), dict(files=[]), dict(recipe=None), dict(manifest={}), dict(created=0), dict(keep_last='x'),
    dict(status=1), dict(direction='up'), dict(schema=2), dict(schema='1' * 5000), dict(files={'metrics.json': 3})])
def test_a_record_with_fields_of_another_kind(done, change):
    "Sealed rightly, as somebody may who knows how"
    record = {k: v for k, v in done.record.items() if k != 'digest'} | change
    (done.folder / 'run.json').write_bytes(seal_json(record))
    for use in (Run.open, prune_run, lambda f: export_run(f, f.parent / 'x.tar'), lambda f: compare_runs([f, f])):
        with pytest.raises(CheckpointError) as e: use(done.folder)
        assert len(str(e.value)) < 400
    assert verify_run(done.folder) and list_runs(done.folder.parent).status.tolist() == ['damaged']


# ---------------------------------------------------------------- pruning and renaming


def test_pruning_takes_what_is_asked_and_nothing_else(done):
    (done.folder / 'report.html').write_text('mine')
    (done.folder / '.bundle.12345678.tmp').mkdir()
    (done.folder / '.bundle.12345678.tmp' / 'model.safetensors').write_bytes(b'x' * 1000)
    before = content(done.folder)
    plan = prune_run(done.folder, ['last'])
    assert content(done.folder) == before
    assert plan.set_index('file')['bytes'].to_dict()['.bundle.12345678.tmp'] == 1000
    again = prune_run(done.folder, ['last'], dry=False)
    assert again.equals(plan)
    gone = {str(f) for f in before.keys() - content(done.folder).keys()}
    assert gone == {'.bundle.12345678.tmp/model.safetensors', *plan.file} - {'.bundle.12345678.tmp'}
    assert verify_run(done.folder) == [] and done.load(nn.Linear(3, 3), 'last')['epoch'] == 2


def test_the_room_that_pruning_promises_is_the_room_that_it_makes(done):
    def used(): return sum({(s := f.stat()).st_ino: s.st_size for f in done.folder.rglob('*.safetensors')}.values())
    before, plan = used(), prune_run(done.folder, dry=False)
    assert plan['bytes'].sum() == before - used() > 0


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_pruning_that_was_killed_is_done_by_doing_it_again(done, tmp_path):
    for k in range(len(prune_run(done.folder))):
        shutil.copytree(done.folder, copy := tmp_path / f'copy{k}')
        if not (pid := os.fork()):
            os.unlink = dies_at(k, os.unlink)
            prune_run(copy, dry=False)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert verify_run(copy) and all('is new since the run was finished' in s for s in verify_run(copy))
        prune_run(copy, dry=False)
        assert verify_run(copy) == []


def dies_at(k, real):
    "An `unlink` that kills the process before the `k`-th checkpoint"
    gone = []
    def unlink(path, *a, **kw):
        if str(path).endswith('.safetensors'):
            if len(gone) == k: os.kill(os.getpid(), signal.SIGKILL)
            gone.append(path)
        return real(path, *a, **kw)
    return unlink


def test_pruning_does_not_cover_up_damage(done):
    data = bytearray(done.checkpoint('last').read_bytes())
    data[-1] ^= 1
    done.checkpoint('last').write_bytes(data)
    prune_run(done.folder, ['best', 'last'], dry=False)
    assert 'last.safetensors: is torn or was changed' in verify_run(done.folder)[0]


def test_a_run_in_work_is_left_alone(done, stopped, tmp_path):
    with held_elsewhere(stopped.folder):
        before = content(stopped.folder)
        for use in (lambda: prune_run(stopped.folder, abandoned=True), lambda: rename_run(stopped.folder, 'other'),
                    lambda: prune_run(stopped.folder, dry=False, abandoned=True),
                    lambda: export_run(stopped.folder, tmp_path / 'x.tar')):
            with pytest.raises(CheckpointError, match='process is at work in this run'): use()
        assert content(stopped.folder) == before
    gone = prune_run(stopped.folder, dry=False, abandoned=True)
    assert {'checkpoints/state.safetensors', 'checkpoints/best-before.safetensors'} < set(gone.file)
    assert verify_run(stopped.folder) == [] and not stopped.has_state


def test_runs_in_work_are_told_apart(done, stopped):
    with held_elsewhere(stopped.folder): during = list_runs(done.folder.parent)
    after = list_runs(done.folder.parent)
    assert [t.set_index('run').status['stopped'] for t in (during, after)] == ['running', 'interrupted']


@pytest.mark.parametrize('name', ['', '.', '..', 'a/b', '/a', 'a\\b', '.hidden', 'a\0b', 'x' * 101, '-rf', 'a\n'])
def test_names_that_are_none(done, name):
    with pytest.raises(CheckpointError, match='is no name for a run'): rename_run(done.folder, name)
    assert verify_run(done.folder) == []


def test_nothing_is_replaced_by_renaming(done, tmp_path):
    (tmp_path / 'empty').mkdir()
    os.symlink(tmp_path / 'nowhere', tmp_path / 'dangling')
    for name in ('empty', 'dangling', 'done'):
        with pytest.raises(CheckpointError, match=f'{name}: is there already'): rename_run(done.folder, name)
    assert verify_run(rename_run(done.folder, 'Läsion.2')) == []


# ---------------------------------------------------------------- archives


def test_an_archive_says_nothing_of_the_machine(done, tmp_path):
    a = export_run(done.folder, tmp_path / 'a.tar')
    shutil.copytree(done.folder, tmp_path / 'other' / 'done', copy_function=shutil.copyfile)
    for f in (tmp_path / 'other').rglob('*'): os.utime(f, (1, 1)), f.chmod(0o700)
    assert export_run(tmp_path / 'other' / 'done', tmp_path / 'b.tar').read_bytes() == a.read_bytes()
    with tarfile.open(a) as t:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, m.type) for m in t} == {(0, 0, 0, '', 0o644, tarfile.REGTYPE)}
        inside = {m.name: t.extractfile(m).read() for m in t}
    assert {k: v for k, v in inside.items() if k != 'export.json'} == {k: (done.folder / k).read_bytes() for k in
                                                                       ('run.json', *run_files(done))}


def test_an_interrupted_run_goes_on_elsewhere(stopped, tmp_path):
    there = import_run(export_run(stopped.folder, tmp_path / 'x.tar'), tmp_path / 'there')
    for run in (there, stopped): run.rewind(run.load_state()[1]['epoch'])
    assert run_files(there) == run_files(stopped) and verify_run(there.folder) == []


def test_every_bit_of_an_archive_counts(done, tmp_path):
    file, rng = export_run(done.folder, tmp_path / 'x.tar'), random.Random(0)
    good = file.read_bytes()
    heads = [at * 512 for at in range(len(good) // 512) if good[at * 512 + 257:at * 512 + 262] == b'ustar']
    assert len(heads) > 8
    places = [h + rng.randrange(512) for h in heads for _ in range(6)] + rng.sample(range(len(good)), 100)
    for at in [*places, len(good) - 1]:
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match='x.tar'): import_run(file, tmp_path / 'in')
        assert not (tmp_path / 'in').exists() or os.listdir(tmp_path / 'in') == []
    file.write_bytes(good)
    assert verify_run(import_run(file, tmp_path / 'in').folder) == []


def forged(contents, **index):
    "An archive whose index is sealed and whose contents are as the index says"
    table = {k: dict(sha256=R.hashlib.sha256(v).hexdigest(), size=len(v)) for k, v in sorted(contents.items())}
    raw = seal_json(dict(format='skin_gradcam.run', schema=1, name='x', files=table) | index)
    parts = [(k, v) for k, v in [('export.json', raw), *sorted(contents.items())]]
    return b''.join(R._header(k, len(v)) + v + R._padding(len(v)) for k, v in parts) + bytes(1024)


def test_a_forger_gets_no_further_than_the_checks_of_a_run(done, tmp_path):
    "Index, sizes and hashes are all right; what is inside is not"
    good = {k: (done.folder / k).read_bytes() for k in ('run.json', *run_files(done))}
    file = tmp_path / 'x.tar'
    file.write_bytes(forged(good))
    assert verify_run(import_run(file, tmp_path / 'control').folder) == []
    one = dict(sha256='0' * 64, size=1)
    torn = good['checkpoints/last.safetensors'][:-4]
    for files, index in [
            (good | {'metrics.json': b'{}'}, {}), (good | {'checkpoints/x.safetensors': b'cos\nsystem\n'}, {}),
            (good | {'checkpoints/best.safetensors': torn}, {}),
            ({k: v for k, v in good.items() if k != 'recipe.json'}, {}), ({}, {}), (good, dict(name='../x')),
            (good, dict(name=3)), (good, dict(files=[])), (good, dict(files={'run.json': []})), (good, dict(schema=2)),
            (good, dict(files={'run.json': dict(one, size=-1)})), (good, dict(files={'run.json': dict(one, size=2.5)})),
            (good, dict(files={'run.json': dict(one, sha256='x')})),
            (good, dict(files={'RUN.JSON': one, 'run.json': one}))]:
        file.write_bytes(forged(files, **index))
        with pytest.raises(CheckpointError) as e: import_run(file, tmp_path / 'in')
        assert len(str(e.value)) < 400 and not (tmp_path / 'in').exists() or os.listdir(tmp_path / 'in') == []


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
                                  tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_members_that_are_no_plain_files(done, tmp_path, kind):
    "In the place of the second member of an archive that is right up to there"
    file = export_run(done.folder, tmp_path / 'x.tar')
    data = file.read_bytes()
    at = 512 + 512 * -(-int(data[124:135], 8) // 512)
    b = io.BytesIO()
    info = tarfile.TarInfo('bundle/bundle.json')
    info.type, info.linkname = kind, '../../../etc'
    b.write(info.tobuf(tarfile.USTAR_FORMAT))
    file.write_bytes(data[:at] + b.getvalue() + data[at:])
    with pytest.raises(CheckpointError, match='does not hold bundle/bundle.json where its index says'):
        import_run(file, tmp_path / 'in')
    assert os.listdir(tmp_path / 'in') == []


def full_disk(monkeypatch):
    "An `fsync` that finds the disk full, where none of 1 MiB can be mounted"
    def fsync(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return lambda: monkeypatch.setattr(R.os, 'fsync', fsync)


def test_a_full_disk_leaves_nothing(done, tmp_path, monkeypatch):
    model = nn.Linear(600, 300)  # 0.7 MB: one fits, best and last do not
    run = Run.create(tmp_path / 'large', {}, small_manifest(tmp_path))
    run.keep(model, 0, dict(log_loss=1.))
    run.finish()
    file = export_run(run.folder, tmp_path / 'large.tar')
    with disk_of_1_mib(tmp_path / 'disk', full_disk(monkeypatch)):
        with pytest.raises(CheckpointError, match='large.tar: cannot be imported .No space left'):
            import_run(file, tmp_path / 'disk')
        assert os.listdir(tmp_path / 'disk') == []
        with pytest.raises(CheckpointError, match='out.tar: cannot be written .No space left'):
            export_run(run.folder, tmp_path / 'disk' / 'out.tar')
        assert os.listdir(tmp_path / 'disk') == []


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_an_import_that_was_killed_is_no_run(done, tmp_path):
    file = export_run(done.folder, tmp_path / 'x.tar')
    if not (pid := os.fork()):
        os.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        import_run(file, tmp_path / 'in')
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(os.listdir(tmp_path / 'in')) == 1 and len(list_runs(tmp_path / 'in')) == 0
    assert len(import_run(file, tmp_path / 'in').history) == 3


def test_a_file_that_is_no_file_of_a_run_is_not_exported(done, tmp_path):
    run = Run.create(tmp_path / 'other', {}, small_manifest(tmp_path))
    run.keep(nn.Linear(2, 2), 0, dict(log_loss=1.))
    (run.folder / 'bundle').mkdir()
    (run.folder / 'bundle' / 'secret.pem').write_text('x')
    with pytest.raises(CheckpointError): export_run(run.folder, tmp_path / 'x.tar')
    (tmp_path / 'done' / 'notes.txt').write_text('mine')
    with tarfile.open(export_run(done.folder, tmp_path / 'x.tar')) as t: assert 'notes.txt' not in t.getnames()


# ---------------------------------------------------------------- as a process

MAIN = 'from skin_gradcam.cli import main; main()'


def call(*args, cwd):
    command = [sys.executable, '-c', MAIN, 'runs', *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_commands_and_their_exit_codes(done, stopped, tmp_path):
    shutil.copytree(done.folder, tmp_path / 'runs' / 'a')
    code, out, err = call('ls', cwd=tmp_path)
    assert (code, err) == (0, '') and out.splitlines()[1].split()[:3] == ['a', 'finished', 'Linear']
    code, out, err = call('verify', 'runs/a', cwd=tmp_path)
    assert (code, out, err) == (0, 'runs/a: in order\n', '')
    data = bytearray((tmp_path / 'runs/a/checkpoints/best.safetensors').read_bytes())
    data[-1] ^= 1
    (tmp_path / 'runs/a/checkpoints/best.safetensors').write_bytes(data)
    code, out, err = call('verify', 'runs/a', cwd=tmp_path)
    assert (code, err) == (1, '') and 'best.safetensors: is torn or was changed' in out
    for args, words in [(('verify', 'nowhere'), 'does not exist'), (('prune', 'stopped', '--yes'), 'is not finished'),
                        (('compare', 'done'), 'two or more'), (('rename', 'done', 'runs'), 'is there already'),
                        (('import', 'done/run.json'), 'is no exported run')]:
        code, out, err = call(*args, cwd=tmp_path)
        assert code == 2 and err.count('\n') == 1 and words in err, (args, err)


def test_prune_asks_before_it_acts(done, tmp_path):
    before = content(done.folder)
    code, out, err = call('prune', 'done', '--keep', 'best', cwd=tmp_path)
    assert code == 0 and 'say --yes' in out and content(done.folder) == before
    code, out, err = call('prune', 'done', '--keep', 'best', '--yes', cwd=tmp_path)
    assert code == 0 and 'freed' in out and os.listdir(done.folder / 'checkpoints') == ['best.safetensors']
