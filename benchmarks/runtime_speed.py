"""What onnxruntime saves against eager torch: latency, start, bytes; and whether both give the same.

Claims, for the bundle that ships, logits and the maps of all classes together:

- one picture on two threads takes at most 0.45 times what eager torch (`inference_mode`, closed form) takes;
- a new process has its first answer, picture decoded and drawn, at most 1.5 s after it was started;
- probabilities and maps agree to 1e-3 with weights in half precision, to 1e-4 in single precision;
- the file is at most 0.55 times as large as in single precision.

Each engine runs in a process of its own, since the threads of one go on spinning for a while and would slow down the
other. The processes take turns: in each round every contender answers a few times, in changing order, and the median of
its times is divided by torch's of the same round. The figure is the median of these ratios over the rounds, with the
95 % interval of the median. Wall clock. Where other jobs hold the cores, the threads of one call wait for each other,
and torch's suffer from it far more than onnxruntime's: the load is written down, and only a ratio measured on a quiet
machine is worth quoting.

The loss of eight-bit weights is measured on the roles valid and calibration of the study (330 pictures), with 96
pictures of the role train to calibrate; without the real pictures that part is left out, and phantoms show agreement.

    python benchmarks/runtime_speed.py            # two minutes; writes results/runtime_speed.json
    python benchmarks/runtime_speed.py --quick    # single pictures only, no real ones; writes nothing without --out
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np
from medians import interval

ROOT = Path(__file__).resolve().parent.parent
LIMITS = dict(ratio=.45, start_s=1.5, half=1e-3, single=1e-4, bytes_ratio=.55)
ROUNDS, TIMES, STARTS, N_INT8 = {1: 40, 8: 12, 16: 8}, {1: 5, 8: 2, 16: 1}, 5, 96
QUICK = {1: 40}

WORKER = '''
import sys, time
import numpy as np
kind, file, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
from skin_gradcam.bundle import default_bundle
if kind == 'torch':
    import torch
    torch.set_num_threads(threads)
    from skin_gradcam.inference import torch_backend
    run = torch_backend(default_bundle())
else:
    from skin_gradcam.runtime import Runtime, open_session
    run = Runtime(open_session(open(file, 'rb').read(), threads), default_bundle().info.size)
for line in sys.stdin:
    batch, times = map(int, line.split())
    x = np.random.default_rng(batch).standard_normal((batch, 3, run.size if kind != 'torch' else 224, 224), np.float32)
    run(x)
    took = []
    for _ in range(times):
        began = time.perf_counter()
        run(x)
        took.append((time.perf_counter() - began)*1e3)
    print(*took, flush=True)
'''
START = '''
import sys
from skin_gradcam.inference import Explainer
e = Explainer.load(backend=sys.argv[2])(sys.argv[1])
assert e.maps.shape[0] == 3
'''


class Engine:
    "A contender in a process of its own"
    def __init__(self, kind: str, file: Path | str, threads: int):
        command = [sys.executable, '-c', WORKER, kind, str(file), str(threads)]
        env = os.environ | dict(OMP_NUM_THREADS=str(threads))
        self.p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def __call__(self, batch: int, times: int) -> float:
        "Median milliseconds of one call"
        self.p.stdin.write(f'{batch} {times}\n')
        self.p.stdin.flush()
        line = self.p.stdout.readline()
        if not line: raise SystemExit(f'an engine ended with code {self.p.wait()}')
        return statistics.median(map(float, line.split()))

    def __enter__(self) -> Engine: return self
    def __exit__(self, *_) -> None:
        self.p.stdin.close()
        self.p.wait()


def latency(engines: dict[str, Engine], batch: int, rounds: int) -> list[dict]:
    "Each engine in each round, as a ratio to torch in that round"
    took: dict[str, list[float]] = {n: [] for n in engines}
    dice = random.Random(0)
    for _ in range(rounds):
        for n in dice.sample(list(engines), len(engines)): took[n].append(engines[n](batch, TIMES[batch]))
    rows = []
    for n, t in took.items():
        ratios = [a / b for a, b in zip(t, took['torch'], strict=True)]
        low, high = interval(ratios)
        rows.append(dict(name=n, batch=batch, ms_per_picture=round(statistics.median(t) / batch, 2), rounds=rounds,
                         ratio=round(statistics.median(ratios), 3), ratio_low=round(low, 3), ratio_high=round(high, 3)))
    return rows


def start(backend: str, picture: Path, times: int) -> dict:
    "Seconds from starting Python to its end, one picture explained in between; the first one is not counted"
    took = []
    for _ in range(times + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, '-c', START, picture, backend], check=True)
        took.append(time.perf_counter() - began)
    return dict(backend=backend, times=times, median_s=round(statistics.median(took[1:]), 2),
                most_s=round(max(took[1:]), 2), first_s=round(took[0], 2))


def batches(files: list[Path], size: int, mean: list, std: list, bs: int = 16) -> Iterator[np.ndarray]:
    from skin_gradcam.pictures import open_picture, squash, to_input
    for i in range(0, len(files), bs):
        yield np.stack([to_input(squash(open_picture(f), size)[0], mean, std) for f in files[i:i + bs]])


def answers(run, files: list[Path], bundle) -> tuple[np.ndarray, np.ndarray]:
    "Logits and maps of all files"
    i = bundle.info
    parts = [run(x) for x in batches(files, i.size, i.mean, i.std)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def agreement(a: tuple, b: tuple, temperature: float) -> dict:
    "Largest differences in plain units (logits, probabilities, maps), and decisions that changed"
    from skin_gradcam.evaluation import softmax
    p, q = softmax(a[0], temperature), softmax(b[0], temperature)
    return dict(n=len(p), logits=float(np.abs(a[0] - b[0]).max()), probabilities=float(np.abs(p - q).max()),
                maps=float(np.abs(a[1] - b[1]).max()), decisions_changed=int((p.argmax(1) != q.argmax(1)).sum()))


def loss(a: tuple, b: tuple, y: np.ndarray, temperature: float) -> dict:
    "What the second costs against the first: balanced accuracy, probabilities, likeness of the winner's map"
    from skin_gradcam.evaluation import softmax
    def balanced(z): return float(np.mean([(z.argmax(1)[y == c] == c).mean() for c in range(3)]))
    p, q, top = softmax(a[0], temperature), softmax(b[0], temperature), a[0].argmax(1)
    r = [np.corrcoef(m[c].ravel(), k[c].ravel())[0, 1] for m, k, c in zip(a[1], b[1], top, strict=True)]
    median, low = (round(float(q), 4) for q in np.quantile(r, [.5, .05]))
    return agreement(a, b, temperature) | dict(
        balanced_accuracy=[round(balanced(a[0]), 4), round(balanced(b[0]), 4)],
        mean_change_of_probability=round(float(np.abs(p - q).max(1).mean()), 4),
        map_correlation_median=median, map_correlation_5_percent=low)


def study_files(roles: tuple[str, ...]) -> tuple[list[Path], np.ndarray] | None:
    "Pictures and classes of roles of the study, where the real pictures are"
    from skin_gradcam.data import Manifest, real_data
    from skin_gradcam.lesions import CLASSES
    if (root := real_data()) is None: return None
    m = Manifest.load(ROOT / 'results' / 'ham10000_roles.csv', root / 'ham10000')
    df = m.df[m.df.role.isin(roles)]
    return m.paths(df), np.array([CLASSES.index(c) for c in df.dx])


def phantom_files(folder: Path, per_class: int) -> list[Path]:
    from skin_gradcam.phantoms import write_phantoms
    write_phantoms(folder, per_class=per_class)
    return sorted(folder.rglob('PHANTOM_*.jpg'))


def measure(a: argparse.Namespace, tmp: Path) -> dict:
    import torch

    from skin_gradcam.bundle import ONNX, default_bundle
    from skin_gradcam.inference import torch_backend
    from skin_gradcam.onnx_export import export_onnx, quantize_onnx
    from skin_gradcam.runtime import Runtime, open_session
    torch.set_num_threads(a.threads)
    b, load = default_bundle(), [os.getloadavg()[0]]
    i, drawn = b.info, phantom_files(tmp / 'drawn', 2 if a.quick else 8)
    real = None if a.quick else study_files(('valid', 'calibration'))
    train = None if a.quick else study_files(('train',))
    files, y = real or (drawn, np.zeros(len(drawn), int))
    forms = {'half': b.read(ONNX), 'single': export_onnx(b, half=False)}
    learn = random.Random(0).sample(train[0], N_INT8) if train else drawn
    forms['int8'] = quantize_onnx(forms['half'], batches(learn, i.size, i.mean, i.std))
    for n, data in forms.items(): (tmp / f'{n}.onnx').write_bytes(data)
    want = answers(torch_backend(b), files, b)
    got = {n: answers(Runtime(open_session(d, a.threads), i.size), files, b) for n, d in forms.items()}
    same = {n: agreement(want, got[n], i.temperature) for n in ('half', 'single')}
    with ExitStack() as stack:
        engines = {n: stack.enter_context(Engine(n, tmp / f'{n}.onnx', a.threads)) for n in ('torch', *forms)}
        rows = []
        for batch, rounds in (QUICK if a.quick else ROUNDS).items():
            rows += latency(engines, batch, rounds)
            load.append(os.getloadavg()[0])
    starts = [start(k, drawn[0], 1 if a.quick else STARTS) for k in (('runtime',) if a.quick else ('runtime', 'torch'))]
    return dict(bundle=b.hash, pictures=('valid and calibration' if real else 'phantoms'), latency=rows, starts=starts,
                bytes={n: len(d) for n, d in forms.items()}, agreement=same,
                int8=loss(want, got['int8'], y, i.temperature) if real else None,
                machine=dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count(),
                             threads=a.threads, load=[round(min(load), 1), round(max(load), 1)],
                             versions={p: version(p) for p in ('torch', 'onnxruntime', 'onnx', 'numpy')}))


def summary(r: dict) -> dict:
    one = next(x for x in r['latency'] if x['name'] == 'half' and x['batch'] == 1)
    found = dict(ratio=one['ratio'], start_s=r['starts'][0]['median_s'],
                 half=max(r['agreement']['half'][k] for k in ('probabilities', 'maps')),
                 single=max(r['agreement']['single'][k] for k in ('probabilities', 'maps')),
                 bytes_ratio=round(r['bytes']['half'] / r['bytes']['single'], 3))
    return dict(found=found, limits=LIMITS, held={k: found[k] <= v for k, v in LIMITS.items()})


def show(r: dict) -> None:
    print(f'{"":10s}{"batch":>7s}{"ms/picture":>12s}{"ratio":>8s}{"95 % interval":>16s}{"rounds":>8s}')
    for x in r['latency']:
        print(f'{x["name"]:10s}{x["batch"]:7d}{x["ms_per_picture"]:12.2f}{x["ratio"]:8.3f}{x["ratio_low"]:8.3f}'
              f'{x["ratio_high"]:8.3f}{x["rounds"]:8d}')
    for s in r['starts']: print(f'first answer, {s["backend"]}: {s["median_s"]:.2f} s (at most {s["most_s"]:.2f})')
    print('bytes', r['bytes'])
    for k, v in r['agreement'].items(): print(f'agreement, {k}: {v}')
    print(f'eight bits: {r["int8"]}')
    for k, v in r['summary']['found'].items():
        print(f'{k}: {v:.3g}, limit {LIMITS[k]:g}: {"held" if r["summary"]["held"][k] else "NOT HELD"}')
    print('load of the machine', r['machine']['load'])


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true', help='one picture, few rounds, phantoms, nothing written')
    p.add_argument('--threads', type=int, default=2, help='of each engine (default 2)')
    p.add_argument('--out', type=Path, help='JSON file to write (default: results/runtime_speed.json; --quick: none)')
    p.add_argument('--check', action='store_true', help='exit code 1 if a limit is passed')
    a = p.parse_args()
    out = a.out or (None if a.quick else ROOT / 'results' / 'runtime_speed.json')
    with tempfile.TemporaryDirectory() as tmp: r = measure(a, Path(tmp))
    r = dict(summary=summary(r), **r)
    show(r)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(r, indent=1) + '\n')
        print(f'written: {out.name}')
    return int(a.check and not all(r['summary']['held'].values()))


if __name__ == '__main__': sys.exit(main())
