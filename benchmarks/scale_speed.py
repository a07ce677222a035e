"""Explaining an archive on Ray Data: as quick as one process, flat in memory, exact when killed.

Claims, on a machine of two cores with nothing else to do. (1) Two one-thread workers on Ray explain at least 0.85
times the pictures a second of `explain_bulk` on the same two cores, as it comes (all cores for the network, two
threads that decode) or with one thread for each, whichever is better.
(2) Two one-thread workers are at least 1.7 times as quick as one. (3) The memory of the process that starts the run
and of its workers grows by no more than 10 % from 2,000 pictures to 50,000. (4) Of 10 runs in which the process that
started it, or a worker, is killed with SIGKILL at a random moment, each gives, after it is given again, every row
once, and all files byte for byte as in a run that nobody disturbed. (5) A row with its maps takes at most 2 kB, and
DuckDB answers a query over 50,000 rows in less than a second.

Speed is counted from the first shard's rows to the last's, so that the start of Ray, which is told apart, does not
count; bulk is measured without its start too. Pictures are drawn ones (600x450 JPEG), hard links to 60 different
files. Memory uses a stand-in for the network.

    python benchmarks/scale_speed.py            # the full run, about an hour; writes results/scale.json
    python benchmarks/scale_speed.py --quick    # some minutes; writes nothing unless --out is given
    python benchmarks/scale_speed.py --only speed picture memory kills size     # some parts of it
"""
from __future__ import annotations

import argparse
import hashlib
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
from pathlib import Path

import psutil
from bulk_speed import pictures
from medians import interval

from skin_gradcam.lesions import CLASSES

ROOT = Path(__file__).resolve().parent.parent
LIMITS = dict(per_core=.85, two_workers=1.7, growth=.10, bytes_a_row=2000, query_s=1.)

RUN = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from bulk_speed import stand_in
from skin_gradcam import scale
source, out, actors, kind, per_shard = sys.argv[2:]
plain, seen, own = scale.run_shards, [], [0]
def noted(*a, **k):
    global own
    for r in plain(*a, **k):
        seen.append((time.perf_counter(), r['rows']))
        own = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')]
        yield r
scale.run_shards = noted
start = time.perf_counter()
print('ready', flush=True)
drawn = kind == 'stand-in'
told = scale.explain_archive(source, out, backend=stand_in if drawn else 'runtime', gate=not drawn,
                             actors=int(actors), per_shard=int(per_shard), progress=False)
first, last = seen[0][0], seen[-1][0]
print(json.dumps(dict(start_s=first-start, rows=told['rows'], bytes=told['bytes'], peak_kb=own[0],
                      per_second=(told['rows']-seen[0][1])/max(last-first, 1e-9))), flush=True)
"""

BULK = """
import json, sys, time
from skin_gradcam import bulk
from skin_gradcam.inference import Explainer
from skin_gradcam.runtime import runtime_backend
from skin_gradcam.bundle import default_bundle
b = default_bundle()
ex = Explainer(b, runtime_backend(b, threads=int(sys.argv[3])))
ex(next(bulk.name_sources(sys.argv[1]))[1])
start = time.perf_counter()
table = bulk.explain_bulk(ex, sys.argv[1], sys.argv[2], overlays=0, workers=int(sys.argv[4]), progress=False)
n = len(table.read_text().splitlines()) - 1
print(json.dumps(dict(per_second=n/(time.perf_counter()-start))))
"""


def started(code: str, *args: object) -> subprocess.Popen:
    "A run in its own process"
    env = os.environ | dict(PYTHONPATH=f'{ROOT}:{ROOT / "benchmarks"}', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env)


def ray_run(source: Path, out: Path, actors: int, kind: str = 'model', per_shard: int = 256) -> subprocess.Popen:
    return started(RUN, Path(__file__).parent, source, out, actors, kind, per_shard)


def finished(p: subprocess.Popen, watch: bool = False) -> dict:
    "What a run printed; with `watch`, also the largest worker that was seen"
    worker = 0
    while watch and p.poll() is None:
        for w in workers(p.pid): worker = max(worker, memory_of(w))
        time.sleep(.5)
    out, err = p.communicate()
    if p.returncode: raise SystemExit(f'a run failed: {err[-2000:]}')
    return json.loads(out.splitlines()[-1]) | dict(worker_mib=worker)


def workers(pid: int) -> list[psutil.Process]:
    "The processes that hold a model, below the one that started the run"
    try: return [c for c in psutil.Process(pid).children(recursive=True) if 'MapWorker' in name_of(c)]
    except psutil.Error: return []


def name_of(p: psutil.Process) -> str:
    try: return ' '.join(p.cmdline())
    except psutil.Error: return ''


def memory_of(p: psutil.Process) -> float:
    "MiB of its own: what it shares with the object store is not counted"
    try:
        m = p.memory_info()
        return (m.rss - m.shared) / 2**20
    except psutil.Error: return 0.


def speed(tmp: Path, n: int, rounds: int) -> dict:
    "Pictures a second of two workers, one worker and bulk, in alternating rounds"
    folder = pictures(tmp / 'speed', n)
    per_shard = 64 if n >= 1024 else 16
    found: dict[str, list[float]] = dict(two=[], one=[], bulk=[], bulk_1=[])
    starts = []
    for r in range(rounds):
        for name in sorted(found, reverse=bool(r % 2)):
            out = tmp / f'speed-{name}-{r}'
            if name.startswith('bulk'):
                told = finished(started(BULK, folder, out, *((1, 1) if name == 'bulk_1' else (os.cpu_count(), 2))))
            else:
                told = finished(ray_run(folder, out, 2 if name == 'two' else 1, per_shard=per_shard))
                starts.append(told['start_s'])
            found[name].append(told['per_second'])
            print(f'round {r + 1}: {name:7s}{told["per_second"]:7.1f} pictures/s', flush=True)
    middle = {k: round(statistics.median(v), 1) for k, v in found.items()}
    two = [a / b for a, b in zip(found['two'], found['one'])]
    core = [a / max(b, c) for a, b, c in zip(found['two'], found['bulk'], found['bulk_1'])]
    return dict(pictures=n, rounds=rounds, per_second=middle, two_workers=round(statistics.median(two), 3),
                per_core=round(statistics.median(core), 3), all_two=[round(v, 3) for v in two],
                all_per_core=[round(v, 3) for v in core], interval_two=[round(v, 3) for v in interval(two)],
                interval_per_core=[round(v, 3) for v in interval(core)], start_s=round(statistics.median(starts), 1))


def memory(tmp: Path, sizes: list[int]) -> dict:
    "Peaks of the starter and of the largest worker, for runs of two lengths"
    out: dict = dict(pictures=sizes, starter_mib=[], worker_mib=[])
    for n in sizes:
        folder = pictures(tmp / f'memory-{n}', n, 300)
        told = finished(ray_run(folder, tmp / f'memory-out-{n}', 2, 'stand-in'), watch=True)
        out['starter_mib'].append(round(told['peak_kb'] / 1024, 1))
        out['worker_mib'].append(round(told['worker_mib'], 1))
    out['growth'] = {k[:-4]: round(out[k][-1] / max(out[k][0], 1) - 1, 4) for k in ('starter_mib', 'worker_mib')}
    return out


def content(out: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.glob('rows-*.parquet'))}


def kills(tmp: Path, n: int, times: int, seed: int = 0) -> dict:
    "Runs whose starter (odd) or a worker (even) is killed at a random moment, then finished"
    from skin_gradcam.scale import check_dataset
    folder, rng = pictures(tmp / 'kills', n), random.Random(seed)
    begun = time.perf_counter()
    told = finished(ray_run(folder, tmp / 'whole', 2, per_shard=16))
    seconds, whole = time.perf_counter() - begun, content(tmp / 'whole')
    lo, rows, moments = told['start_s'], [], []
    lost = doubled = differ = hit = 0
    for k in range(times):
        out, when = tmp / f'kill-{k}', rng.uniform(.9 * lo, .97 * seconds)
        p, begun = ray_run(folder, out, 2, per_shard=16), time.perf_counter()
        while (left := begun + when - time.perf_counter()) > 0 and p.poll() is None: time.sleep(min(left, .2))
        moments.append(len(content(out)))
        targets: list = [p] if k % 2 else []
        while not targets and p.poll() is None: targets = workers(p.pid)[:1]
        for t in targets: t.send_signal(signal.SIGKILL)
        hit += len(targets)
        p.wait()
        finished(ray_run(folder, out, 2, per_shard=16) if p.returncode else p) if p.returncode else p.communicate()
        checked = check_dataset(out)
        rows.append(checked['rows'])
        lost, doubled = lost + max(n - checked['rows'], 0), doubled + max(checked['rows'] - n, 0)
        differ += content(out) != whole
    return dict(kills=times, hit=hit, pictures=n, shards_at_the_kill=moments, lost=lost, doubled=doubled,
                runs_that_differ=differ)


def size(tmp: Path, n: int, real: int) -> dict:
    "Bytes a row of real answers, and the time of queries over many"
    import duckdb

    from skin_gradcam.bundle import default_bundle
    from skin_gradcam.inference import Explainer
    from skin_gradcam.phantoms import draw_phantom
    from skin_gradcam.scale import archive_row, parquet_bytes
    ex, rows = Explainer.load(), []
    for i in range(real):
        name = f'archive/part-{i // 1000:03d}/ISIC_{i:07d}.jpg'
        rows.append(archive_row(name, hashlib.sha256(name.encode()).hexdigest(),
                                ex(draw_phantom(CLASSES[i % 3], seed=i).image, name=name, keep_side=0)))
    assert default_bundle().hash == ex.stamp.hash
    folder = tmp / 'size'
    folder.mkdir()
    for k in range(0, n, 256):
        some = [rows[i % real] | dict(id=f'{i:07d}-{rows[i % real]["id"]}') for i in range(k, min(k + 256, n))]
        (folder / f'rows-{k // 256:06d}.parquet').write_bytes(parquet_bytes(some, dict(shard=k // 256)))
    one = len(parquet_bytes(rows[:min(256, real)], {})) / min(256, real)
    queries = dict(
        decisions=f"select decision, count(*), avg(p_mel) from '{folder}/*.parquet' group by 1",
        most_doubtful=f"select id, p_mel from '{folder}/*.parquet' order by abs(p_mel - .5) limit 20",
        average_map=f"""select decision, i, avg(map_mel[i]) from (select decision, map_mel, unnest(range(1, 50)) i
                        from '{folder}/*.parquet') group by 1, 2""")
    took = {}
    for name, q in queries.items():
        start = time.perf_counter()
        assert duckdb.sql(q).fetchall()
        took[name] = round(time.perf_counter() - start, 3)
    return dict(rows=n, bytes_a_row=round(one), query_s=took)


def picture(tmp: Path, times: int) -> dict:
    "Seconds in one thread to decode a small and a large picture, and to run the network over one (of a batch of 16)"
    import numpy as np
    from PIL import Image

    from skin_gradcam.inference import prepare
    from skin_gradcam.phantoms import draw_phantom
    from skin_gradcam.scale import worker_explainer
    ex, drawn = worker_explainer(), Image.fromarray(draw_phantom('mel', seed=0).image)
    out: dict = {}
    for name, size in dict(small=(600, 450), large=(4000, 3000)).items():
        drawn.resize(size).save(tmp / f'{name}.jpg', quality=90)
        took = []
        for _ in range(times):
            start = time.perf_counter()
            p = prepare((tmp / f'{name}.jpg').read_bytes(), name, ex.bundle, 0)
            took.append(time.perf_counter() - start)
        out[f'{name}_decode_s'] = round(min(took), 4)
    x, took = np.stack([p.x] * 16), []
    for _ in range(times):
        start = time.perf_counter()
        ex.backend(x)
        took.append((time.perf_counter() - start) / 16)
    return out | dict(network_s=round(min(took), 4), megapixels=dict(small=.27, large=12.))


PARTS = dict(size=(size, (50_000, 512), (50_000, 60)), picture=(picture, (50,), (12,)),
             speed=(speed, (2048, 7), (160, 1)), kills=(kills, (480, 10), (96, 2)),
             memory=(memory, ([2000, 50000],), ([512, 2048],)))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true')
    p.add_argument('--only', nargs='+', choices=[*PARTS], default=[*PARTS])
    p.add_argument('--out', type=Path)
    a = p.parse_args(argv)
    out = a.out or (None if a.quick else ROOT / 'results' / 'scale.json')
    figures: dict = json.loads(out.read_text()) if out and out.exists() else {}
    for name in a.only:
        f, full, quick = PARTS[name]
        with tempfile.TemporaryDirectory() as d: told = f(Path(d), *(quick if a.quick else full))
        figures[name] = told | dict(quick=a.quick, load=round(os.getloadavg()[0], 1))
        print(name, json.dumps(figures[name]), flush=True)
        figures |= dict(limits=LIMITS, machine=dict(processor=platform.machine(), cores=os.cpu_count()))
        if out: out.write_text(json.dumps(figures, indent=1) + '\n')
    return 0


if __name__ == '__main__': sys.exit(main())
