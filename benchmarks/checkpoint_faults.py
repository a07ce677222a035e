"""What becomes of damaged, forged and foreign files: refused by name, or a crash, or worse, executed?

The claim: of 200 damaged checkpoints of a real network, of the damaged records of a run and of damaged archives, every
one is refused with one line that names the file and says what to do; none crashes the process, none is executed; and a
checkpoint of 14 MB is checked in less than 0.2 s. Every case is made from a seed; a case that happens to leave the file
as it was is drawn again.

    python benchmarks/checkpoint_faults.py             # writes results/checkpoint_faults.json
    python benchmarks/checkpoint_faults.py --no-write  # only prints
    python benchmarks/checkpoint_faults.py --quick --out FILE    # a small network and fewer cases, for the tests
"""
from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import platform
import random
import statistics
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from skin_gradcam.checkpoints import CheckpointError, Run, check_checkpoint, load_checkpoint
from skin_gradcam.data import Manifest
from skin_gradcam.models import create_model
from skin_gradcam.runs import export_run, import_run, verify_run

ROOT = Path(__file__).resolve().parent.parent
LIMITS = dict(check_14mb_s=.2, refusal_s=5, message=400)
Damage = Callable[[bytes, random.Random], bytes]


# ---------------------------------------------------------------- kinds of damage


class Program:
    "Unpickled, it writes the file that must not appear"
    def __init__(self, canary: Path): self.canary = canary
    def __reduce__(self): return os.system, (f'touch {self.canary}',)


def flip(data: bytes, rng: random.Random) -> bytes:
    bit, out = rng.randrange(8 * len(data)), bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def flip_early(data: bytes, rng: random.Random) -> bytes:
    "In the first two thousand bytes, where the descriptions are"
    return flip(data[:2000], rng) + data[2000:]


def truncate(data: bytes, rng: random.Random) -> bytes: return data[:rng.randrange(len(data))]


def extend(data: bytes, rng: random.Random) -> bytes: return data + rng.randbytes(rng.randrange(1, 5000))


def zero_block(data: bytes, rng: random.Random) -> bytes:
    n = min(len(data), rng.choice([16, 512, 4096]))
    at = rng.randrange(0, len(data) - n + 1)
    return data[:at] + bytes(n) + data[at + n:]


def garbage(data: bytes, rng: random.Random) -> bytes: return rng.randbytes(rng.choice([1, 7, 8, 100, 5000]))


def empty(data: bytes, rng: random.Random) -> bytes: return b''


def header(data: bytes) -> tuple[dict, bytes]:
    n = int.from_bytes(data[:8], 'little')
    return json.loads(data[8:8 + n]), data[8 + n:]


def file_of(head: bytes, rest: bytes) -> bytes: return struct.pack('<Q', len(head)) + head + rest


def swap_tensors(data: bytes, rng: random.Random) -> bytes:
    "Two tensors of one shape change places: every number is there, none where it belongs"
    h, rest = header(data)
    shapes: dict = {}
    for k, v in h.items(): shapes.setdefault(str(v.get('shape')) + v.get('dtype', ''), []).append(k)
    a, b = rng.sample(rng.choice([v for k, v in shapes.items() if len(v) > 1 and k != 'None']), 2)
    h[a], h[b] = h[b], h[a]
    return file_of(json.dumps(h, separators=(',', ':')).encode(), rest)


def rename_tensor(data: bytes, rng: random.Random) -> bytes:
    h, rest = header(data)
    k = rng.choice([k for k in h if k != '__metadata__'])
    h[k + 'x'] = h.pop(k)
    return file_of(json.dumps(h).encode(), rest)


def double_key(data: bytes, rng: random.Random) -> bytes:
    h, rest = header(data)
    k = rng.choice([*h])
    text = json.dumps(h)[:-1] + f', {json.dumps(k)}: {json.dumps(h[k])}}}'
    return file_of(text.encode(), rest)


def huge_header(data: bytes, rng: random.Random) -> bytes:
    return struct.pack('<Q', rng.choice([2**63, 2**64 - 1, 2**32, 2**24 + 1, len(data), len(data) - 7])) + data[8:]


def json_bomb(data: bytes, rng: random.Random) -> bytes:
    deep, wide = rng.randrange(10_000, 200_000), rng.randrange(10**5, 10**6)
    text = rng.choice([b'[' * deep, b'{"a":' * deep, b'{"a":[' + b'[],' * wide + b'[]]}', b'{"a":NaN}',
                       b'{"a":' + b'9' * wide + b'}', b'{"a":1e' + b'9' * 100 + b'}', b'"' + b'x' * wide,
                       b'{"a":"' + b'\\u0041' * wide + b'"}'])
    return file_of(text, data[-1000:])


def foreign_safetensors(data: bytes, rng: random.Random) -> bytes:
    note = rng.choice([None, *({'skin_gradcam': s} for s in ('{}', '[1]', '')), dict(format='pt')])
    return save_tensors(dict(w=torch.rand(rng.randrange(1, 50))), note)


def pickled(canary: Path) -> Damage:
    def make(data: bytes, rng: random.Random) -> bytes:
        b, kind = io.BytesIO(), rng.randrange(3)
        if kind == 0: return pickle.dumps(Program(canary), protocol=rng.randrange(6))
        torch.save(dict(w=Program(canary)), b, _use_new_zipfile_serialization=kind == 1)
        return b.getvalue()
    return make


def archive(data: bytes, rng: random.Random) -> bytes:
    b = io.BytesIO()
    if rng.random() < .5:
        with zipfile.ZipFile(b, 'w') as z: z.writestr('../archive/data.pkl', b'cos\nsystem\n')
    else:
        with tarfile.open(fileobj=b, mode='w') as t:
            info = tarfile.TarInfo(rng.choice(['../x', '/x', 'run.json']))
            info.type, info.linkname = rng.choice([tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.REGTYPE]), '..'
            t.addfile(info)
    return b.getvalue()


def other_text(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b'{}', b'[]', b'null', b'{"schema": 1}', b'epoch\n', b'a,b\n1,2\n', b'\xff\xfe', b'"',
                       b'\0' * 64, b'{"digest": "\\ud800"}', b'{"schema": 1, "schema": 1}', b'GIF89a', b'<html>'])


def kinds(canary: Path) -> dict[str, tuple[int, Damage]]: # 200 of them
    return {'bit flipped': (50, flip), 'bit flipped in the header': (20, flip_early), 'truncated': (25, truncate),
            'extended': (5, extend), 'block of zeros': (20, zero_block), 'tensors swapped': (10, swap_tensors),
            'tensor renamed': (5, rename_tensor), 'key twice': (8, double_key), 'huge header': (8, huge_header),
            'JSON bomb': (12, json_bomb), 'foreign safetensors': (8, foreign_safetensors),
            'pickle': (12, pickled(canary)), 'tar or zip': (8, archive), 'random bytes': (8, garbage),
            'empty': (1, empty)}


def text_kinds(canary: Path) -> dict[str, tuple[int, Damage]]: # 60 of them, for records and archives
    return {'bit flipped': (20, flip), 'truncated': (10, truncate), 'block of zeros': (8, zero_block),
            'JSON bomb': (5, json_bomb), 'other text': (6, other_text), 'pickle': (5, pickled(canary)),
            'random bytes': (5, garbage), 'empty': (1, empty)}


# ---------------------------------------------------------------- the trial


def spoilt(good: bytes, damage: Damage, rng: random.Random) -> bytes:
    while (bad := damage(good, rng)) == good: pass
    return bad


def trial(file: Path, good: bytes, cases: dict, quick: bool, read: Callable[[], object], seed: int) -> Iterator[dict]:
    "Put each damage into the place of the file, and read it in a fork of this process, which may die of it"
    for kind, (n, damage) in cases.items():
        rng = random.Random(f'{seed} {kind}')
        for _ in range(max(1, n // 5) if quick else n):
            file.write_bytes(spoilt(good, damage, rng))
            yield dict(kind=kind, **in_fork(file, read))
    file.write_bytes(good)
    read()  # whole again, it is accepted


def in_fork(file: Path, read: Callable[[], object]) -> dict:
    "How one reading ended: refused (with its message and time), accepted, or crashed"
    r, w = os.pipe()
    if not (pid := os.fork()):
        os.close(r)
        start, said = time.perf_counter(), dict(end='accepted', said='')
        try: read()
        except CheckpointError as e: said = dict(end='refused', said=str(e))
        except BaseException as e: said = dict(end='crashed', said=f'{type(e).__name__}: {e}'[:500])
        with open(w, 'w') as out: json.dump(said | dict(seconds=time.perf_counter() - start), out)
        os._exit(0)
    os.close(w)
    with open(r) as f: text = f.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out = json.loads(text) if text else dict(end='crashed', said=f'ended with {status}', seconds=0.)
    if out['end'] == 'refused' and not is_clear(out['said'], file): out['end'] = 'unclear'
    return out


def is_clear(said: str, file: Path) -> bool:
    "One line of bearable length that names the file (or its run) and says what to do"
    named = file.name in said or file.parent.name in said
    return named and len(said) <= LIMITS['message'] and '\n' not in said and ('; ' in said or 'since the run' in said)


def tally(results: list[dict]) -> dict:
    ends = {e: sum(r['end'] == e for r in results) for e in ('refused', 'unclear', 'accepted', 'crashed')}
    by = {k: sum(r['kind'] == k for r in results) for k in dict.fromkeys(r['kind'] for r in results)}
    for r in results:
        if r['end'] != 'refused': print(f"{r['end']}: {r['kind']}: {r['said']}", file=sys.stderr)
    return dict(n=len(results), **ends, slowest_refusal_s=round(max(r['seconds'] for r in results), 3), by_kind=by)


# ---------------------------------------------------------------- what is damaged


def a_run(folder: Path, finished: bool) -> Run:
    rows = [dict(image_id=f'i{k}', path=f'i{k}.jpg', dx=d, lesion_id=f'l{k}', sha256=f'{k:064d}', role='train', fold=0)
            for k, d in enumerate(['nv', 'bkl', 'mel'] * 20)]
    manifest, model = Manifest(pd.DataFrame(rows), folder), nn.Linear(40, 40)
    run = Run.create(folder, dict(arch='linear', seed=1), manifest)
    for k in range(5):
        run.log_epoch(dict(phase='all', log_loss=1 - k / 10, auroc=.8))
        run.keep(model, k, dict(log_loss=1 - k / 10))
        tensors = {f'{p}{n}': v for p in ('w.', 'm.', 'v.') for n, v in model.state_dict().items()}
        run.save_state(tensors, k, dict(step=k))
    if finished:
        run.write_metrics(dict(valid=.9))
        run.finish()
    return run


def records(top: Path, canary: Path, quick: bool) -> dict[str, dict]:
    "Every file of a run but the weights, through what reads it"
    done, open_run = a_run(top / 'done', True), a_run(top / 'open', False)
    reads: dict[str, tuple[Run, Callable[[], object]]] = {
        'run.json': (done, lambda: Run.open(done.folder)), 'recipe.json': (done, lambda: done.recipe),
        'manifest.csv': (done, lambda: done.manifest), 'history.csv': (done, lambda: done.history),
        'metrics.json': (done, lambda: done.metrics),
        'checkpoints/state.safetensors': (open_run, lambda: open_run.load_state())}
    found = {}
    for k, (name, (run, read)) in enumerate(reads.items()):
        file = run.folder / name
        found[name] = tally(list(trial(file, file.read_bytes(), text_kinds(canary), quick, read, k)))
    assert not verify_run(done.folder) and not verify_run(open_run.folder)
    return found


def archives(top: Path, canary: Path, quick: bool) -> dict:
    "Exported runs; nothing may be left of a refused one"
    run, out = a_run(top / 'done', True), top / 'in'
    file = export_run(run.folder, top / 'run.tar')
    names = iter(range(10**6))
    def read() -> None:
        try: import_run(file, out, name=f'r{next(names)}')
        except CheckpointError:
            if out.exists() and list(out.iterdir()): raise RuntimeError('something was left behind') from None
            raise
    cases = text_kinds(canary) | {'tar or zip': (10, archive), 'extended': (5, extend)}
    return tally(list(trial(file, file.read_bytes(), cases, quick, read, 9)))


def checkpoints(top: Path, canary: Path, quick: bool) -> tuple[dict, dict]:
    "A real network's weights, and how long a good file takes"
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = small if quick else create_model('tf_efficientnet_lite0', pretrained=False)
    run = a_run(top / 'run', False)
    file = run.save(model, 'net', 5, dict(log_loss=.5))
    def read() -> None:
        said = {str(e) for e in map(refusal, (load_checkpoint, check_checkpoint), (file, file))}
        if len(said) > 1: raise RuntimeError(f'loading and checking disagree: {said}')
        if (one := said.pop()) != 'None': raise CheckpointError(one)
    found = tally(list(trial(file, file.read_bytes(), kinds(canary), quick, read, 7)))
    times = {f.__name__: statistics.median(timed(f, file) for _ in range(3 if quick else 15))
             for f in (check_checkpoint, load_checkpoint)}
    seconds = {f'{k}_s': round(v, 4) for k, v in times.items()}
    return found, dict(megabytes=round(file.stat().st_size / 1e6, 2), **seconds)


def refusal(f: Callable[[Path], object], file: Path) -> CheckpointError | None:
    try: f(file)
    except CheckpointError as e: return e
    return None


def timed(f: Callable[[Path], object], file: Path) -> float:
    start = time.perf_counter()
    f(file)
    return time.perf_counter() - start


def trap_works(canary: Path) -> bool:
    "Does a pickle of these trials show that it was executed, when it is?"
    pickle.loads(pickle.dumps(Program(canary)))
    return canary.exists()


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('--no-write', action='store_true')
    p.add_argument('--quick', action='store_true')
    p.add_argument('--out', type=Path, default=ROOT / 'results' / 'checkpoint_faults.json')
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        top = Path(d)
        canary = top / 'executed'
        found, whole = checkpoints(top / 'a', canary, args.quick)
        results = dict(checkpoints=found, records=records(top / 'b', canary, args.quick),
                       archives=archives(top / 'c', canary, args.quick), whole_file=whole)
        results |= dict(executed=int(canary.exists()), trap_works=trap_works(canary))
    groups = [results['checkpoints'], results['archives'], *results['records'].values()]
    fine = all(g['n'] == g['refused'] and g['slowest_refusal_s'] < LIMITS['refusal_s'] for g in groups)
    fine &= not results['executed'] and results['trap_works'] and whole['check_checkpoint_s'] < LIMITS['check_14mb_s']
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    text = json.dumps(dict(limits=LIMITS, versions=versions, **results), indent=1)
    print(text)
    print(f"{sum(g['refused'] for g in groups)} of {sum(g['n'] for g in groups)} refused; {whole['megabytes']} MB "
          f"checked in {whole['check_checkpoint_s'] * 1000:.0f} ms, limit {LIMITS['check_14mb_s'] * 1000:.0f} ms")
    if not args.no_write: args.out.write_text(text + '\n', encoding='utf-8')
    return int(not fine)


if __name__ == '__main__': sys.exit(main())
