"""Feed damaged pictures and damaged bundles to the decoder, the bundle reader and the explainer.

    python tools/fuzz.py                     # 20,000 pictures and 6,000 bundles; writes results/fuzz.json
    python tools/fuzz.py --pictures 500 --bundles 500 --out /dev/null
    python tools/fuzz.py --case pictures 1234 --keep FOLDER      # one input again, written to a folder

Every input is made from its number, so that each can be made again. The seeds are small pictures of every format, and a
small bundle with all its files. They are cut, spliced, and their bits, bytes and numbers changed; what is changed in a
bundle is given its right hash again in two cases of three, as somebody with bad intent would do. Each input must be
answered or refused with a `PictureError` or `BundleError` (or another `ValueError` of ours) that says why. The work is
done in a process of its own: one that dies or is silent for 60 s is noticed, and its input counted as crash or hang. A
hang is also what takes more than 5 s of processor time.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from skin_gradcam.abstention import calibrate_gate, fit_gate
from skin_gradcam.bundle import (
    GATE,
    INFO,
    MODEL,
    ONNX,
    Bundle,
    BundleInfo,
    add_files,
    load_bundle,
    seal_json,
    write_bundle,
)
from skin_gradcam.files import write_atomic
from skin_gradcam.inference import Explainer, Explanation
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.pictures import PictureError

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / 'results' / 'fuzz.json'
SECONDS, WAIT = 5, 60  # processor time of one input; wall clock until its process is killed
SIZE, CELLS = 64, 4  # of the small bundle
MAGIC = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'RIFF', b'WEBPVP8 ', b'WEBPVP8L', b'BM', b'II*\0', b'MM\0*', b'GIF89a',
         b'Exif\0\0', b'IHDR', b'IDAT', b'acTL', b'\xff\xc0', b'\xff\xda', b'%PDF-1.4', b'<svg', b'8BPS', b'\0asm',
         b'PK\3\4')


# ---------------------------------------------------------------- seeds

def encoded(im: Image.Image, kind: str, **how: Any) -> bytes:
    buf = io.BytesIO()
    im.save(buf, kind, **how)
    return buf.getvalue()


@lru_cache
def picture_seeds() -> dict[str, bytes]:
    "Small pictures of every format and of many flavours"
    im = Image.fromarray(draw_phantom('mel', seed=1).image).resize((96, 72))
    other, turned = im.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.Exif()
    turned[0x0112], turned[0x010E] = 6, 'a drawing'
    rgba, deep = im.convert('RGBA'), Image.fromarray(np.asarray(im.convert('L'), np.uint16) * 257)
    seeds = {'jpeg': encoded(im, 'JPEG'), 'jpeg progressive': encoded(im, 'JPEG', progressive=True, optimize=True),
             'jpeg grey': encoded(im.convert('L'), 'JPEG'), 'jpeg cmyk': encoded(im.convert('CMYK'), 'JPEG'),
             'jpeg turned': encoded(im, 'JPEG', exif=turned, comment=b'note'), 'png': encoded(im, 'PNG'),
             'png alpha': encoded(rgba, 'PNG'), 'png palette': encoded(im.quantize(16), 'PNG'),
             'png 16 bit': encoded(deep, 'PNG'), 'png 1 bit': encoded(im.convert('1'), 'PNG'),
             'png animated': encoded(im, 'PNG', save_all=True, append_images=[other]), 'webp': encoded(im, 'WEBP'),
             'webp lossless': encoded(rgba, 'WEBP', lossless=True),
             'webp animated': encoded(im, 'WEBP', save_all=True, append_images=[other]), 'bmp': encoded(im, 'BMP'),
             'bmp palette': encoded(im.quantize(16), 'BMP'), 'gif': encoded(im.quantize(32), 'GIF'),
             'gif animated': encoded(im.quantize(32), 'GIF', save_all=True, append_images=[other.quantize(32)])}
    for c in ('raw', 'tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'jpeg'):
        seeds[f'tiff {c}'] = encoded(im, 'TIFF', compression=c)
    return seeds | {'tiff 16 bit': encoded(deep, 'TIFF'), 'tiff cmyk': encoded(im.convert('CMYK'), 'TIFF')}


def by_cells(bundle: Bundle) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    "A network of one linear layer on the mean colours of cells"
    w, b = bundle.head()

    def run(x: np.ndarray) -> tuple[np.ndarray, ...]:
        cells = x.reshape(len(x), 3, CELLS, x.shape[2] // CELLS, CELLS, -1).mean((3, 5))
        features = cells.mean((2, 3))
        return features @ w.T + b, np.einsum('ck,bkhw->bchw', w, cells) / CELLS**2, features
    return run


def small_bundle(folder: Path) -> Bundle:
    "Weights, gate, card, a few kB each"
    from safetensors.numpy import save
    rng = np.random.default_rng(0)
    weights = {'head.1.weight': rng.normal(size=(3, 3)).astype(np.float16), 'head.1.bias': np.zeros(3, np.float16),
               'stem.weight': rng.normal(size=(8, 3, 3, 3)).astype(np.float16)}
    features, y = rng.random((90, 3)), np.arange(90) % 3
    gate = fit_gate('mahalanobis', features, features, y, rank=2)
    gate = calibrate_gate(gate, features, features)
    info = BundleInfo('small', 'resnet18', list(CLASSES), SIZE, [.5] * 3, [.5] * 3, manifest_hash='0' * 64,
                      seen_lesions=dict(train=['HAM_1', 'HAM_2'], valid=[], calibration=[]), licence='CC BY-NC 4.0',
                      eight_views=dict(temperature=1.2, indeterminate=.5), thresholds=dict(indeterminate=.4))
    return write_bundle(folder, weights, info, {GATE: save(gate.to_arrays()), 'MODEL_CARD.md': b'# A card'})


# ---------------------------------------------------------------- damage

def numbers(rng: np.random.Generator) -> bytes:
    "A number of 1, 2, 4 or 8 bytes at the edge of something"
    n = int(rng.choice([1, 2, 4, 8]))
    v = int(rng.choice([0, 1, 2**(8*n) - 1, 2**(8*n - 1), 2**(8*n - 1) - 1, 10**(2*n)])) % 2**(8*n)
    return v.to_bytes(n, 'big' if rng.random() < .5 else 'little')


def damaged(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    "One to six changes, mostly one or two, more of them near the beginning, where the headers are"
    b = bytearray(data)
    for _ in range(min(6, int(rng.geometric(.6)))):
        n = max(1, len(b))
        at = int(n * rng.random()**(3 if rng.random() < .6 else 1))
        kind = int(rng.choice(9, p=(.22, .2, .06, .08, .08, .08, .08, .14, .06)))
        if kind == 0: b[at:at + 1] = bytes([(b[at] if at < len(b) else 0) ^ 1 << int(rng.integers(8))])
        elif kind == 1: b[at:at + 1] = rng.bytes(1)
        elif kind == 2: b = b[:at]
        elif kind == 3: del b[at:at + int(rng.integers(1, 64))]
        elif kind == 4: b[at:at] = b[at:at + int(rng.integers(1, 256))] * int(rng.integers(1, 4))
        elif kind == 5: b[at:at] = rng.bytes(int(rng.integers(1, 64)))
        elif kind == 6: b[at:at + int(rng.integers(1, 512))] = other[at:at + int(rng.integers(1, 512))]
        elif kind == 7:
            v = numbers(rng)
            b[at:at + len(v)] = v
        else:
            m = MAGIC[int(rng.integers(len(MAGIC)))]
            b[at:at + len(m)] = m
    return bytes(b)


def with_checksums(data: bytes) -> bytes:
    "A PNG whose chunks have their right checksums again, so that the damage gets past them"
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at:at + 4], 'big')
        if end + 4 > len(out): break
        out[end:end + 4] = zlib.crc32(out[at + 4:end]).to_bytes(4, 'big')
        at = end + 4
    return bytes(out)


def picture(i: int) -> tuple[str, bytes]:
    "Input number `i`: the name of its seed, and its bytes"
    rng, seeds = np.random.default_rng([1, i]), picture_seeds()
    name, other = rng.choice(list(seeds), 2).tolist()
    data = damaged(seeds[name], seeds[other], rng)
    return name, with_checksums(data) if name.startswith('png') and rng.random() < .7 else data


ODD: tuple[Any, ...] = (None, True, -1, 0, 1e308, 10**17, '', 'x' * 9999, [], [0], {}, {'a': []}, [None] * 3,
                        ['nv'] * 3, [1e-308] * 3)


def changed_field(info: dict, rng: np.random.Generator) -> dict:
    "A description with one field, or an entry of one, replaced, gone or new"
    key, value = str(rng.choice(list(info))), ODD[int(rng.integers(len(ODD)))]
    if isinstance(info[key], dict) and info[key] and rng.random() < .5:
        return info | {key: info[key] | {str(rng.choice(list(info[key]))): value}}
    if rng.random() < .1: return {k: v for k, v in info.items() if k != key}
    return info | ({f'{key}_': value} if rng.random() < .1 else {key: value})


def bundle_case(i: int, seed: Bundle) -> tuple[str, dict[str, bytes]]:
    "Input number `i`: what was done, and all files of the bundle"
    rng = np.random.default_rng([2, i])
    files = {n: (seed.folder / n).read_bytes() for n in (*seed.info.files, INFO)}
    what = int(rng.integers(3))
    if what == 0:
        name = str(rng.choice(list(files)))
        return f'{name} as it is', files | {name: damaged(files[name], files[MODEL], rng)}
    if what == 1:
        return 'a field, sealed', files | {INFO: seal_json(changed_field(asdict(seed.info), rng))}
    name = str(rng.choice([n for n in seed.info.files if n != 'MODEL_CARD.md']))
    data = damaged(files[name], files[MODEL], rng)
    info = replace(seed.info, files=seed.info.files | {name: hashlib.sha256(data).hexdigest()})
    return f'{name}, sealed', files | {name: data, INFO: seal_json(info.to_dict())}


# ---------------------------------------------------------------- what must happen

def say(e: Exception) -> str:
    "A refusal must be a sentence in one line"
    text = str(e)
    if len(text) < 12 or '\n' in text: raise AssertionError(f'a refusal that says nothing: {text!r}')
    return type(e).__name__


def try_picture(data: bytes, explainer: Explainer) -> str:
    "`answered` or the kind of refusal; raises what must not happen"
    try: e = explainer(data, name='picture')
    except PictureError as err:
        if not err.reason: raise AssertionError('a refusal without a reason') from None
        return say(err)
    assert isinstance(e, Explanation) and np.isfinite(e.p).all() and abs(e.p.sum() - 1) < 1e-9
    assert e.picture is not None and e.picture.mode == 'RGB' and e.picture.size == (e.geometry.width, e.geometry.height)
    json.dumps(e.to_dict(maps=True), allow_nan=False)
    return 'answered'


def try_bundle(files: dict[str, bytes], folder: Path, explained: Image.Image) -> str:
    "Load it, read all of it, explain a picture with it; `answered` or the kind of refusal"
    for f in folder.iterdir(): f.unlink()
    for n, data in files.items(): (folder / n).write_bytes(data)
    try:
        b = load_bundle(folder)
        views = 8 if b.info.eight_views else 1
        if ONNX in b.info.files: Explainer(b, 'runtime', views=views, gate=False)(explained)
        e = Explainer(b, by_cells(b), views=views)(explained)
    except ValueError as err: return say(err)
    assert np.isfinite(e.p).all()
    return 'answered'


# ---------------------------------------------------------------- the processes

def make_onnx(bundle: Bundle) -> bytes:
    "The ONNX file of a little network that says it is the bundle's"
    import onnx
    import torch

    from skin_gradcam.models import create_model
    from skin_gradcam.onnx_export import export_onnx
    torch.manual_seed(0)
    net = create_model('test_efficientnet', pretrained=False).eval()
    net.preprocessing = replace(net.preprocessing, size=SIZE)
    proto, info = onnx.load_from_string(export_onnx(net)), bundle.info
    onnx.helper.set_model_props(proto, dict(weights_sha256=info.files[MODEL], temperature=repr(float(info.temperature)),
                                            classes=', '.join(info.classes)))
    return proto.SerializeToString()


def cases(kind: str, folder: Path) -> Callable[[int], tuple[str, Callable[[], str]]]:
    "From a number to its name and to what tries it"
    seed = load_bundle(folder / 'seed')
    if kind == 'pictures':
        explainer = Explainer(seed, by_cells(seed))

        def of(i: int) -> tuple[str, Callable[[], str]]:
            name, data = picture(i)
            return name, lambda: try_picture(data, explainer)
        return of
    place, explained = Path(tempfile.mkdtemp(dir=folder)), Image.fromarray(draw_phantom('nv', seed=2).image)

    def other(i: int) -> tuple[str, Callable[[], str]]:
        name, files = bundle_case(i, seed)
        return name, lambda: try_bundle(files, place, explained)
    return other


def peak_mib() -> float:
    with open('/proc/self/status') as f: kib = next(line.split()[1] for line in f if line.startswith('VmHWM'))
    return int(kib) / 1024


def work(kind: str, folder: Path, first: int, last: int) -> Iterator[dict[str, Any]]:
    "One line before each input, one after it; the last one tells the memory"
    of = cases(kind, folder)
    before = peak_mib()
    for i in range(first, last):
        name, attempt = of(i)
        yield dict(i=i, name=name)
        began = time.process_time()
        try: said = attempt()
        except Exception as e: said = f'crash: {type(e).__name__}: {" ".join(str(e).split())[:200]}'
        yield dict(i=i, said=said, seconds=round(time.process_time() - began, 4))
    yield dict(peak_mib=round(peak_mib(), 1), before_mib=round(before, 1))


class Tally:
    "What was said, and what must not happen"
    def __init__(self) -> None:
        self.said: dict[str, Counter] = {}
        self.wrong: list[dict[str, Any]] = []
        self.slowest, self.peak, self.before, self.n = 0., 0., 0., 0

    def add(self, name: str, i: int, said: str, seconds: float) -> None:
        self.n += 1
        self.slowest = max(self.slowest, seconds)
        self.said.setdefault(name, Counter())[said.split(':')[0]] += 1
        if said.startswith(('crash', 'hang')): self.wrong.append(dict(i=i, name=name, said=said))
        elif seconds > SECONDS: self.wrong.append(dict(i=i, name=name, said=f'hang: {seconds:.1f} s'))

    def to_dict(self) -> dict[str, Any]:
        total = sum(self.said.values(), Counter())
        return dict(inputs=self.n, crashes=sum(w['said'].startswith('crash') for w in self.wrong),
                    hangs=sum(w['said'].startswith('hang') for w in self.wrong), said=dict(total.most_common()),
                    slowest_s=round(self.slowest, 3), peak_mib=self.peak, start_mib=self.before,
                    by_seed={k: dict(v.most_common()) for k, v in sorted(self.said.items())}, wrong=self.wrong[:50])


def read_lines(p: subprocess.Popen, tally: Tally, first: int) -> int:
    "Listen to a process until it ends; gives the number after its last input"
    import selectors
    now: dict[str, Any] = dict(i=first, name='start')
    done = first
    sel = selectors.DefaultSelector()
    assert p.stdout is not None
    sel.register(p.stdout, selectors.EVENT_READ)
    while True:
        line = p.stdout.readline() if sel.select(WAIT) else None
        if line is None:
            p.kill()
            tally.add(now['name'], now['i'], f'hang: over {WAIT} s', 0)
            return now['i'] + 1
        if not line: break
        d = json.loads(line)
        if 'peak_mib' in d: tally.peak, tally.before = max(tally.peak, d['peak_mib']), d['before_mib']
        elif 'said' in d:
            tally.add(now['name'], d['i'], d['said'], d['seconds'])
            done = d['i'] + 1
        else: now = d
    if p.wait() and now['i'] >= done:
        tally.add(now['name'], now['i'], f'crash: the process ended with {p.returncode}', 0)
        return now['i'] + 1
    return done


def run(kind: str, folder: Path, n: int, first: int = 0) -> dict[str, Any]:
    "So many inputs, in as many processes as it takes"
    tally, i = Tally(), first
    while i < first + n:
        command = [sys.executable, __file__, '--work', kind, str(i), str(first + n), '--folder', str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1) as p:
            i = max(i + 1, read_lines(p, tally, i)) if n else i
    return tally.to_dict()


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--pictures', type=int, default=20_000)
    ap.add_argument('--bundles', type=int, default=6_000)
    ap.add_argument('--first', type=int, default=0, help='number of the first input')
    ap.add_argument('--out', type=Path, default=OUT)
    ap.add_argument('--case', nargs=2, metavar=('KIND', 'NUMBER'), help='one input again')
    ap.add_argument('--keep', type=Path, help='folder for that input')
    ap.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    ap.add_argument('--work', nargs=3, metavar=('KIND', 'FIRST', 'LAST'), help=argparse.SUPPRESS)
    a = ap.parse_args(argv)
    if a.work:
        with os.fdopen(os.dup(1), 'w') as told:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some decoders print
            for line in work(a.work[0], a.folder, *map(int, a.work[1:])): print(json.dumps(line), file=told, flush=True)
        return 0
    with tempfile.TemporaryDirectory() as d:
        seed = small_bundle(Path(d) / 'seed')
        seed = add_files(seed, {ONNX: make_onnx(seed)})
        if a.case:
            kind, i = a.case[0], int(a.case[1])
            files = {'picture': picture(i)[1]} if kind == 'pictures' else bundle_case(i, seed)[1]
            if a.keep: a.keep.mkdir(parents=True, exist_ok=True)
            for n, data in files.items() if a.keep else (): (a.keep / n).write_bytes(data)
            print(json.dumps(run(kind, Path(d), 1, i), indent=1))
            return 0
        found = {k: run(k, Path(d), n, a.first) for k, n in (('pictures', a.pictures), ('bundles', a.bundles))}
    for k, f in found.items():
        print(f"{k}: {f['inputs']} inputs, {f['crashes']} crashes, {f['hangs']} hangs, slowest {f['slowest_s']} s, "
              f"at most {f['peak_mib']:.0f} MiB; {f['said']}")
    told = dict(limits=dict(seconds=SECONDS), **found,
                machine=dict(python=platform.python_version(), pillow=PIL.__version__))
    if a.out != Path(os.devnull): write_atomic(a.out, json.dumps(told, indent=1) + '\n')
    return int(any(f['crashes'] or f['hangs'] for f in found.values()))


if __name__ == '__main__': sys.exit(main())
