"""Training that is killed and goes on: does it end where one ends that was never stopped?

A run of a small network on phantoms, with every option that draws numbers or holds state (frozen epochs, growing size,
mixup, pairs, dropout, averaged weights, several kept epochs), is killed (SIGKILL) at random moments and resumed, until
the asked number of kills is there. Each run must end with the files of the run that was never stopped, byte for byte:
best and last weights, kept epochs, history, bundle. CPU, one thread.

    python benchmarks/kill_resume.py             # 50 kills, about ten minutes; writes results/kill_resume.json
    python benchmarks/kill_resume.py --kills 4   # writes nothing unless --out is given
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # children are forked: no thread may exist before
import numpy as np
import torch

from skin_gradcam.data import Manifest, draw_manifest, read_folder
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.training import Recipe, train

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(arch='mobilenetv3_small_050', pretrained=False, size=96, progressive=((64, 2),), epochs=4,
                freeze_epochs=1, bs=8, mixup=.2, cutmix=1., consistency=1., ema=.9, lr=2e-3)
SAME = ('checkpoints/best.safetensors', 'checkpoints/last.safetensors', 'checkpoints/epoch-0003.safetensors',
        'checkpoints/epoch-0004.safetensors', 'history.csv', 'metrics.json', 'bundle/model.safetensors')


def in_child(manifest: Manifest, out: Path, kill_after: float | None) -> bool:
    "Train, or go on, in a forked process; True when it was killed"
    pid = os.fork()
    if not pid:
        warnings.filterwarnings('ignore')
        code = 1
        try:
            train(RECIPE, manifest, out, resume=True, progress=False, keep_last=2)
            code = 0
        finally: os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status): raise SystemExit(f'{out}: training ended with an error')
    return os.WIFSIGNALED(status)


def moment(out: Path) -> dict[str, object]:
    "Where the kill hit"
    epochs = (out / 'history.csv').read_text().count('\n') - 1 if (out / 'history.csv').exists() else 0
    return dict(epochs=max(epochs, 0), began=(out / 'run.json').exists(),
                writing=bool([*out.glob('.*.tmp'), *out.glob('checkpoints/.*.tmp')]))


def differences(a: Path, b: Path) -> list[str]:
    "Names of the files that are not the same in two runs"
    def read(f: Path) -> bytes | None: return f.read_bytes() if f.exists() else None
    return [n for n in SAME if read(a / n) is None or read(a / n) != read(b / n)]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--kills', type=int, default=50)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='JSON to write (default: results/kill_resume.json for 50 kills or more)')
    a = p.parse_args()
    torch.set_num_threads(1)
    rng, hits, runs, wrong = np.random.default_rng(a.seed), [], 0, []
    with tempfile.TemporaryDirectory() as d:
        folder = write_phantoms(Path(d) / 'phantoms', per_class=24, seed=0)
        m = draw_manifest(read_folder(folder)[0], folder, per_class=24, shares=(6, 2, 2, 2), seed=0)
        in_child(m, Path(d) / 'whole', None)
        start = time.perf_counter()
        in_child(m, Path(d) / 'again', None)
        whole = time.perf_counter() - start
        if bad := differences(Path(d) / 'whole', Path(d) / 'again'): raise SystemExit(f'two whole runs differ in {bad}')
        while len(hits) < a.kills:
            out, before = Path(d) / f'run{runs}', len(hits)
            for _ in range(int(rng.integers(1, 4))):
                if len(hits) < a.kills and in_child(m, out, float(rng.uniform(0, whole))): hits.append(moment(out))
            in_child(m, out, None)
            if bad := differences(Path(d) / 'whole', out): wrong.append(dict(run=runs, files=bad))
            print(f'run {runs}: {len(hits) - before} kills, {"differs in " + str(bad) if bad else "exact"}', flush=True)
            runs += 1
    told = dict(kills=len(hits), runs=runs, exact_runs=runs - len(wrong), wrong=wrong, seconds_of_a_run=round(whole, 1),
                kills_by_finished_epochs={str(k): sum(h['epochs'] == k for h in hits) for k in range(6)},
                kills_before_the_run_was_there=sum(not h['began'] for h in hits),
                kills_while_writing=sum(bool(h['writing']) for h in hits), torch=torch.__version__)
    print(json.dumps(told, indent=1))
    out = a.out or (ROOT / 'results' / 'kill_resume.json' if a.kills >= 50 else None)
    if out: out.write_text(json.dumps(told, indent=1) + '\n')
    return int(bool(wrong))


if __name__ == '__main__': sys.exit(main())
