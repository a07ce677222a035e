"""Bulk runs: as fast as a bare loop, flat in memory, and nothing lost or doubled when they are killed.

Three claims. (1) `explain_bulk` (table and maps, no overlays) reaches at least 0.85 times the pictures a second of a
loop that only decodes and runs the model, same batch, same backend. (2) The peak memory of a run over 20,000 pictures
is at most 5 % above that of one over 1,000. (3) Of 20 runs, each killed at a random moment and then run to its end,
none loses a row, doubles one, or changes a byte of the table.

Drawn pictures (450x600 JPEG, as many files as asked for, hard links to 60 different ones). Speed and kills with the
shipped model; memory with a stand-in for the network, because it is the writing that is in question.

    python benchmarks/bulk_speed.py            # the full run; writes results/bulk.json
    python benchmarks/bulk_speed.py --quick    # half a minute, writes nothing unless --out is given
"""
from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from skin_gradcam.bulk import explain_bulk
from skin_gradcam.bundle import default_bundle
from skin_gradcam.inference import Explainer
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.pictures import open_picture, squash, to_input

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SPEED, LIMIT_GROWTH, BS = .85, .05, 16


def stand_in(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Logits and maps by brightness"
    cells = x.mean(1).reshape(len(x), 7, 32, 7, 32).mean((2, 4))
    maps = np.stack([cells, -cells, cells**2], 1) / 49
    return maps.sum((2, 3)) + default_bundle().head()[1], maps


def pictures(folder: Path, n: int, side: int = 600) -> Path:
    "A folder of `n` files, 60 of which differ"
    folder.mkdir(parents=True)
    originals = []
    for i in range(min(n, 60)):
        f = folder / f'{i:05d}.jpg'
        im = Image.fromarray(draw_phantom(CLASSES[i % 3], seed=i).image)
        im.resize((side, side * 3 // 4)).save(f, quality=90)
        originals.append(f)
    for i in range(60, n): os.link(originals[i % 60], folder / f'{i:05d}.jpg')
    return folder


def bare_loop(files: list[Path], explainer: Explainer) -> float:
    "Seconds to decode and run the model over the files, nothing else"
    info, start = explainer.bundle.info, time.perf_counter()
    for i in range(0, len(files), BS):
        squares = [squash(open_picture(f), info.size, info.resize)[0] for f in files[i:i + BS]]
        batch = [to_input(s, info.mean, info.std) for s in squares]
        explainer.backend(np.stack(batch))
    return time.perf_counter() - start


def speed(tmp: Path, n: int, rounds: int) -> dict:
    "Pictures a second of both, in alternating rounds"
    folder, explainer = pictures(tmp / 'speed', n), Explainer.load()
    files = sorted(folder.iterdir())
    bare_loop(files[:BS], explainer)
    ours, bare = [], []
    for r in range(rounds):
        for name in ('bare', 'ours') if r % 2 else ('ours', 'bare'):
            if name == 'bare':
                bare.append(bare_loop(files, explainer))
                continue
            start = time.perf_counter()
            explain_bulk(explainer, folder, tmp / f'speed-{r}', overlays=0, bs=BS, progress=False)
            ours.append(time.perf_counter() - start)
    ratios = [b / o for b, o in zip(bare, ours)]
    return dict(pictures=n, rounds=rounds, ratio=round(statistics.median(ratios), 3),
                ratios=[round(r, 3) for r in ratios], bulk_per_second=round(n / statistics.median(ours), 1),
                bare_per_second=round(n / statistics.median(bare), 1))


WORKER = """
import sys
sys.path.insert(0, sys.argv[4])
import bulk_speed
from skin_gradcam.bulk import explain_bulk
from skin_gradcam.bundle import default_bundle
from skin_gradcam.inference import Explainer
ex = Explainer.load() if sys.argv[3] == 'model' else Explainer(default_bundle(), bulk_speed.stand_in)
print('ready', flush=True)
explain_bulk(ex, sys.argv[1], sys.argv[2], overlays=0, per_shard=16 if sys.argv[3] == 'model' else 64, progress=False)
# of this program; ru_maxrss would begin with what the program that started it had
print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))
"""


def worker(folder: Path, out: Path, kind: str) -> subprocess.Popen:
    "A bulk run in its own process, started"
    command = [sys.executable, '-c', WORKER, str(folder), str(out), kind, str(Path(__file__).parent)]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert p.stdout is not None and p.stdout.readline() == 'ready\n'
    return p


def memory(tmp: Path, sizes: list[int]) -> dict:
    "Peak memory of runs of two lengths"
    peaks = []
    for n in sizes:
        p = worker(pictures(tmp / f'memory-{n}', n, 300), tmp / f'memory-out-{n}', 'stand-in')
        peaks.append(int(p.communicate()[0]) / 1024)
        if p.returncode: raise SystemExit(f'the run over {n} pictures failed')
    return dict(pictures=sizes, peak_mib=[round(v, 1) for v in peaks], growth=round(peaks[1] / peaks[0] - 1, 4))


def kills(tmp: Path, n: int, times: int, seed: int = 0) -> dict:
    "Runs that are killed at a random moment and then finished"
    folder, rng = pictures(tmp / 'kills', n), random.Random(seed)
    start, p = time.perf_counter(), worker(folder, tmp / 'whole', 'model')
    p.wait()
    whole, seconds = (tmp / 'whole' / 'predictions.csv').read_bytes(), time.perf_counter() - start
    lost = doubled = wrong = killed = 0
    moments = []
    for k in range(times):
        out, when = tmp / f'kill-{k}', rng.uniform(0, .9 * seconds)
        p = worker(folder, out, 'model')
        time.sleep(when)
        p.send_signal(signal.SIGKILL)
        killed += p.wait() == -signal.SIGKILL
        moments.append(len(list((out / '.answers').glob('[0-9]*.npz'))) if out.exists() else 0)
        worker(folder, out, 'model').wait()
        table = (out / 'predictions.csv').read_bytes()
        with open(out / 'predictions.csv', newline='') as f: names = Counter(r['image'] for r in csv.DictReader(f))
        with np.load(out / 'maps.npz') as npz: stored = Counter(npz.files)
        wanted = {f.name for f in folder.iterdir()}
        lost += len(wanted - set(names)) + len(wanted - set(stored))
        doubled += sum(c > 1 for c in (names + Counter()).values()) + sum(c > 1 for c in stored.values())
        wrong += table != whole
    return dict(kills=times, in_the_middle=killed, pictures=n, shards_at_the_kill=moments, lost=lost, doubled=doubled,
                wrong=wrong)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true')
    p.add_argument('--out', type=Path)
    a = p.parse_args(argv)
    out = a.out or (None if a.quick else ROOT / 'results' / 'bulk.json')
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d)
        s = speed(tmp, *((64, 1) if a.quick else (480, 5)))
        print(f"bulk {s['bulk_per_second']} pictures/s, bare loop {s['bare_per_second']}: {s['ratio']:.3f} "
              f'(mark {LIMIT_SPEED})')
        k = kills(tmp, *((48, 2) if a.quick else (120, 20)))
        print(f"{k['kills']} kills: {k['lost']} lost, {k['doubled']} doubled, {k['wrong']} tables that differ")
        m = memory(tmp, [200, 400] if a.quick else [1000, 20000])
        print(f"peak memory {m['peak_mib']} MiB over {m['pictures']} pictures: {100 * m['growth']:+.1f} % "
              f'(mark {100 * LIMIT_GROWTH:.0f} %)')
    machine = dict(processor=platform.machine(), cores=os.cpu_count(), load=round(os.getloadavg()[0], 1))
    figures = dict(speed=s, kills=k, memory=m, limits=dict(speed=LIMIT_SPEED, growth=LIMIT_GROWTH), machine=machine)
    if out: out.write_text(json.dumps(figures, indent=1) + '\n')
    return 0


if __name__ == '__main__': sys.exit(main())
