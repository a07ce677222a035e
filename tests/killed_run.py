"""A made-up deterministic training that is killed before any one of its changes of the disk, and resumed.

    python tests/killed_run.py each FOLDER KEEP_LAST     # once at every step
    python tests/killed_run.py chain FOLDER KEEP_LAST    # at random steps, until it gets through

Each attempt is a fork of this process (importing torch takes longer than the training), ended by SIGKILL from within a
patched `os` function, so the step is exact. Prints what it found as JSON.
"""
from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from skin_gradcam.checkpoints import Run, hold_run, run_files
from skin_gradcam.data import Manifest
from skin_gradcam.runs import verify_run

LOSSES = [.9, .5, .7]  # best in epochs 0 and 1
STEPS = ('replace', 'rename', 'link', 'unlink', 'remove', 'rmdir', 'mkdir', 'fsync')
FINISHED, KILLED = 0, -signal.SIGKILL


def train(folder: Path, keep_last: int) -> None:
    "What a real loop does: begin or go on, and then epoch by epoch"
    rows = [dict(image_id='i', path='i.jpg', dx='nv', lesion_id='l', sha256='0' * 64, role='train', fold=0)]
    with hold_run(folder):
        new = not (folder / 'run.json').exists()
        manifest = Manifest(pd.DataFrame(rows), '.')
        run = Run.create(folder, dict(seed=1), manifest, keep_last=keep_last) if new else Run.open(folder)
        if run.status == 'running': epochs(run)
        run.finish()


def epochs(run: Run) -> None:
    model, w, start = nn.Linear(4, 3), torch.zeros(3, 4), 0
    if run.has_state:
        tensors, meta = run.load_state()
        w, start = tensors['w'], meta['epoch'] + 1
        assert meta['state'] == dict(losses=LOSSES[:start])
    run.rewind(start - 1 if start else None)
    improved = []
    for k in range(start, len(LOSSES)):
        w = w * 1.5 + k
        with torch.no_grad(): model.weight.copy_(w), model.bias.zero_()
        run.log_epoch(dict(phase='all', log_loss=LOSSES[k]) | (dict(late=k) if k else dict(n=k)))
        improved.append(run.keep(model, k, dict(log_loss=LOSSES[k])))
        run.save_state(dict(w=w), k, dict(losses=LOSSES[:k + 1]))
    assert improved == [True, True, False][start:]
    run.write_metrics(dict(valid=1.))
    (run.folder / 'bundle').mkdir()  # rewinding has removed what an earlier attempt left
    (run.folder / 'bundle' / 'bundle.json').write_text('{}')


def die_at(k: int) -> list[str]:
    "Kill this process before its `k`-th change of the disk; counts on for ever when `k` is negative"
    done: list[str] = []
    def counted(name, real):
        def call(*args, **kw):
            if len(done) == k: os.kill(os.getpid(), signal.SIGKILL)
            done.append(name)
            return real(*args, **kw)
        return call
    os.fsync = lambda fd: None  # costs most of the time, and matters to power cuts, not to kills
    for name in STEPS: setattr(os, name, counted(name, getattr(os, name)))
    return done


def attempt(folder: Path, keep_last: int, k: int) -> int:
    "Train in a fork; 0 when it got to its end, minus the signal when it was killed"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            die_at(k)
            train(folder, keep_last)
            code = 0
        except BaseException as e: print(f'step {k}: {type(e).__name__}: {e}', file=sys.stderr)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state_of(folder: Path) -> dict:
    "Every file of a run but the lock, by content; the record without its clock"
    found = [f for f in folder.rglob('*') if f.is_file() and f.suffix != '.lock']
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in found}
    record = json.loads(files.pop('run.json'))
    return files | {'record': {k: v for k, v in record.items() if k not in ('created', 'digest')}}


def broken(folder: Path) -> list[str]:
    "What is wrong after a kill, beyond what was being written; the bundle here is a stub and not looked at"
    if not (folder / 'run.json').exists(): return []
    said = [s for s in verify_run(folder) if 'left by an interrupted write' not in s and 'bundle' not in s]
    return [f'{s} (killed)' for s in said]


def each(top: Path, keep_last: int) -> dict:
    assert attempt(top / 'whole', keep_last, -1) == FINISHED
    whole, kills, equal, wrong = state_of(top / 'whole'), 0, 0, []
    assert whole['record']['files'] == run_files(Run.open(top / 'whole'))
    for k in range(10_000):
        folder = top / f'r{k}'
        code = attempt(folder, keep_last, k)
        if code == FINISHED: break
        if code != KILLED: wrong.append(f'step {k} ended with {code}')
        kills += 1
        wrong += broken(folder)
        code = attempt(folder, keep_last, -1)
        if code != FINISHED: wrong.append(f'step {k}: resumed, it ended with {code}')
        elif state_of(folder) == whole: equal += 1
        else: wrong.append(f'step {k}: other files')
    return dict(kills=kills, equal=equal, wrong=wrong[:10])


def chain(top: Path, keep_last: int, runs: int = 12) -> dict:
    assert attempt(top / 'whole', keep_last, -1) == FINISHED
    whole, rng, kills, equal, wrong = state_of(top / 'whole'), random.Random(0), 0, 0, []
    for i in range(runs):
        while (code := attempt(top / f'r{i}', keep_last, rng.randrange(90))) == KILLED:
            kills += 1
            wrong += broken(top / f'r{i}')
        if code != FINISHED: wrong.append(f'run {i} ended with {code}')
        equal += code == FINISHED and state_of(top / f'r{i}') == whole
    return dict(runs=runs, kills=kills, equal=equal, wrong=wrong[:10])


if __name__ == '__main__':
    torch.set_num_threads(1)
    mode, top, keep_last = sys.argv[1:4]
    print(json.dumps(dict(each=each, chain=chain)[mode](Path(top), int(keep_last))))
