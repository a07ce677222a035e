"""Two hundred thousand maps in one process: does anything stay behind?

The claim: after a warm-up the memory of the process stays flat within 1 %, no tensor, hook or remembered layer is
left, and every map is, bit for bit, what the first call of its kind gave. Meant to find what one call cannot show: a
hook that outlives its call, a graph kept by a cycle, a cache that grows with every model, state that one call leaves
for the next.

Small networks, so that the calls are many and the work is little: a convnet with dropout, BatchNorm (partly in training
mode) and an in-place ReLU, and a vision transformer of one block. Every method; classes, all classes, contrasts and
single targets; several layers; `no_grad`, `inference_mode`, autocast; two threads on the same models at once. One call
in ten is made to fail: by wrong arguments, NaN in the picture, an exception in the middle of the forward pass, and
Ctrl-C (`KeyboardInterrupt`) there. Now and then a model is made, asked once and dropped.

    python benchmarks/gradcam_soak.py               # 200,000 calls, five minutes or more; writes the JSON in results/
    python benchmarks/gradcam_soak.py --calls 500   # what CI runs; writes nothing unless --out is given
"""
from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from skin_gradcam import engine
from skin_gradcam.gradcam import METHODS, gradcam

ROOT = Path(__file__).resolve().parent.parent
CALLS, WORKERS, SAMPLES, FLAT = 200_000, 2, 40, .01
TRACED = 2000                                # calls between two looks at Python's own allocations
OBJECT = 32                                  # bytes; the smallest thing that a call could leave is larger
poison = threading.local()                   # what the next forward pass in this thread is to throw


# ---------------------------------------------------------------- the networks and the calls

class Throws(nn.Module):
    "The identity, unless this thread's next pass is to fail"
    def forward(self, x: Tensor) -> Tensor:
        error, poison.error = getattr(poison, 'error', None), None
        if error is not None: raise error
        return x


def convnet() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Throws(),
                        nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(inplace=True), Throws(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Dropout(.5), nn.Linear(12, 3))
    net.train()[2].eval()                    # most of it in training mode, one module not
    for p in net[0].parameters(): p.requires_grad_(False)
    return net


def transformer() -> nn.Module:
    torch.manual_seed(1)
    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    return vit.eval()


def contrast(l: Tensor) -> Tensor: return l[:, 2] - l[:, 0]


def cases(net: nn.Module, vit: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    "Calls that succeed, by name"
    def under(mode, *args, **kw):
        with mode(): return gradcam(net, x, *args, **kw)
    def amp(): return torch.autocast('cpu', torch.bfloat16)
    every: dict[str, Callable[[], object]] = {}
    for m in METHODS:
        model = vit if METHODS[m].needs == 'attention' else net
        for name, target in (('arg-max', None), ('all', 'all'), ('one a picture', [2, 0]), ('contrast', contrast)):
            every[f'{m}, {name}'] = lambda model=model, m=m, t=target: gradcam(model, x, t, m)
    every['two layers'] = lambda: gradcam(net, x, layer=['2', None])
    every['no_grad'] = lambda: under(torch.no_grad, 'all')
    every['inference_mode'] = lambda: under(torch.inference_mode, 'all')
    every['autocast'] = lambda: under(amp, 'all', 'hirescam')
    return {n: f for n, f in every.items() if works(f)}


def works(f: Callable[[], object]) -> bool:
    "Whether a method takes this kind of target at all; those that do not say so with a ValueError"
    try: f()
    except ValueError: return False
    return True


def faults(net: nn.Module, x: Tensor) -> dict[str, tuple[type[BaseException], Callable[[], object]]]:
    "Calls that fail, with what they must raise"
    def poisoned(error, *args):
        poison.error = error
        try: return gradcam(net, x, *args)
        finally: poison.error = None
    return {'class out of range': (IndexError, lambda: gradcam(net, x, 7)),
            'unknown method': (ValueError, lambda: gradcam(net, x, method='gradcan')),
            'no such layer': (ValueError, lambda: gradcam(net, x, layer='layer9')),
            'NaN in the picture': (ValueError, lambda: gradcam(net, x * torch.nan)),
            'exception in the forward pass': (RuntimeError, lambda: poisoned(RuntimeError('thrown on purpose'), 'all')),
            'Ctrl-C in the forward pass': (KeyboardInterrupt, lambda: poisoned(KeyboardInterrupt(), 'all'))}


# ---------------------------------------------------------------- what could stay behind

def rss() -> int:
    "Bytes of memory that the process holds, after giving back what it can"
    gc.collect()
    if sys.platform != 'linux':
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def count_hooks(*models: nn.Module) -> int:
    kinds = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return sum(len(getattr(m, k)) for model in models for m in model.modules() for k in kinds)


def state(*models: nn.Module) -> list:
    "What a call could disturb in a model"
    return [[(m.training, dict(m._buffers)) for m in model.modules()] for model in models] + \
           [[(p.requires_grad, p.grad, p) for p in model.parameters()] for model in models]


def snapshot(*models: nn.Module) -> list:
    return copy.deepcopy(state(*models))


def same(a: object, b: object) -> bool:
    "Equal to the bit, whatever the nesting"
    if isinstance(a, Tensor): return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def live_tensors() -> int: return sum(isinstance(o, Tensor) for o in gc.get_objects())


# ---------------------------------------------------------------- the soak

class Soak:
    "Makes the calls in an order of its own and keeps count"
    def __init__(self) -> None:
        self.net, self.vit, self.spare = convnet(), transformer(), convnet()      # nobody asks the spare one
        self.x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        self.before = snapshot(self.net, self.vit)
        self.cases, self.faults = cases(self.net, self.vit, self.x), faults(self.net, self.x)
        self.first = {n: f() for n, f in self.cases.items()}
        self.made, self.wrong = Counter[str](), list[str]()

    def good(self, name: str) -> None:
        try: fine = same(self.cases[name](), self.first[name])
        except Exception as e: self.wrong.append(f'{name}: {type(e).__name__}: {e}')     # a race shows here
        else:
            if not fine: self.wrong.append(f'{name}: not what the first call gave')
        self.made[name] += 1

    def bad(self, name: str) -> None:
        error, f = self.faults[name]
        try: f()
        except error: self.made[f'fault: {name}'] += 1
        except Exception as e: self.wrong.append(f'{name}: {type(e).__name__} instead of {error.__name__}: {e}')
        else: self.wrong.append(f'{name}: no {error.__name__}')

    def short_lived(self) -> None:
        "A model that is made, asked and dropped"
        if not same(gradcam(copy.deepcopy(self.spare), self.x, 'all'), self.first['gradcam, all']):
            self.wrong.append('short-lived model: not what the first call gave')
        self.made['short-lived model'] += 1

    def call(self, i: int) -> None:
        dice = random.Random(i)
        if (luck := dice.randrange(100)) < 10: self.bad(dice.choice(list(self.faults)))
        elif luck == 10: self.short_lived()
        else: self.good(dice.choice(list(self.cases)))

    def block(self, start: int, stop: int) -> None:
        "Calls `start` to `stop`, half of them in each of two threads at once"
        lock = threading.Barrier(WORKERS)
        def job(k):
            lock.wait()
            for i in range(start + k, stop, WORKERS): self.call(i)
        with ThreadPoolExecutor(WORKERS) as pool:
            for f in [pool.submit(job, k) for k in range(WORKERS)]: f.result()

    def look(self, calls: int) -> dict:
        return dict(calls=calls, rss=rss(), tensors=live_tensors(), hooks=count_hooks(self.net, self.vit),
                    layers_remembered=len(engine._found), threads=threading.active_count())


def traced_growth(soak: Soak, calls: int) -> float:
    "Bytes a call by which Python's own allocations grow"
    tracemalloc.start()
    try:
        for _ in range(2): soak.block(0, calls)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        soak.block(0, calls)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / calls
    finally: tracemalloc.stop()


def run(calls: int) -> dict:
    soak, step = Soak(), max(1, calls // SAMPLES)
    began, looks = time.process_time(), []
    soak.block(0, max(step, 400))                                 # warm-up: caches of PyTorch, the allocator's arenas
    for start in tqdm(range(0, calls, step), desc='calls', disable=None, leave=False):
        soak.block(start, min(start + step, calls))
        looks.append(soak.look(min(start + step, calls)))
    seconds = time.process_time() - began
    some = max(1, len(looks) // 4)
    early, late = (statistics.median(o['rss'] for o in part) for part in (looks[:some], looks[-some:]))
    found = dict(calls=sum(soak.made.values()), faults=sum(v for k, v in soak.made.items() if k.startswith('fault')),
                 cpu_seconds=round(seconds, 1), rss_mib=round(late / 2**20, 1), rss_growth=round(late / early - 1, 5),
                 rss_bytes_a_call=round((late - early) / (calls * .75), 1),
                 rss_range=round(max(o['rss'] for o in looks) / min(o['rss'] for o in looks) - 1, 5),
                 tensors_growth=looks[-1]['tensors'] - looks[0]['tensors'],
                 layers_growth=looks[-1]['layers_remembered'] - looks[0]['layers_remembered'],
                 hooks=max(o['hooks'] for o in looks), calls_wrong=len(soak.wrong),
                 model_changed=not same(state(soak.net, soak.vit), soak.before),
                 python_bytes_a_call=round(traced_growth(soak, min(TRACED, calls)), 1))
    return dict(found=found, wrong=soak.wrong[:20], made=dict(sorted(soak.made.items())), looks=looks)


def held(f: dict) -> dict[str, bool]:
    "The claim, point by point"
    return {'memory flat within 1 %': abs(f['rss_growth']) <= FLAT, 'no tensor left': f['tensors_growth'] <= 0,
            'no hook left': f['hooks'] == 0, 'no layer remembered for a model that is gone': f['layers_growth'] <= 0,
            'same bits every time, no error but those meant': f['calls_wrong'] == 0,
            'models as they were': not f['model_changed'],
            "Python's own memory flat (no object a call)": f['python_bytes_a_call'] < OBJECT}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--calls', type=int, default=CALLS, help=f'how many (default {CALLS:,})')
    p.add_argument('--out', type=Path, help='JSON file to write (default: results/gradcam_soak.json for a full run)')
    p.add_argument('--check', action='store_true', help='exit code 1 if the claim does not hold')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    r = run(a.calls)
    points = held(r['found'])
    for k, v in r['found'].items(): print(f'{k:24s}{v:>12,}' if isinstance(v, int) else f'{k:24s}{v:>12}')
    for k, v in points.items(): print(f'{"held    " if v else "NOT HELD"}  {k}')
    for w in r['wrong']: print(f'  {w}')
    out = a.out or (ROOT / 'results' / 'gradcam_soak.json' if a.calls >= CALLS else None)
    if out:
        where = dict(python=platform.python_version(), torch=torch.__version__, machine=platform.machine(),
                     threads=WORKERS)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(dict(machine=where, held=points, **r), indent=1) + '\n')
        print(f'written: {out.name}')
    return int(a.check and not all(points.values()))


if __name__ == '__main__': sys.exit(main())
