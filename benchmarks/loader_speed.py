"""What the batches cost: `skin_gradcam.loaders` against fastai's `ImageDataLoaders`, and against a tensor in memory.

Two claims. (1) From the second epoch on, the training loader gives at least 3 times the pictures a second of
`ImageDataLoaders.from_df` with augmentations of the same kind and strength and the same number of workers. (2) A
training step of the default network costs, with the loader, at most 1.1 times the same step on a tensor in memory.

Every round runs each contender once, in an order that turns from round to round; a ratio is always taken within one
round, and the tables show its median and quartiles. Wall time; all cores for PyTorch. The 1,650 real pictures of
`results/ham10000_roles.csv`; where they are missing, as many phantoms as `--pictures` says.

    python benchmarks/loader_speed.py            # the full run, about ten minutes; writes results/loader_speed.json
    python benchmarks/loader_speed.py --quick    # about a minute, writes nothing unless --out is given
"""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from skin_gradcam.cache import cached_squares
from skin_gradcam.data import Manifest, draw_manifest, read_folder, real_data
from skin_gradcam.loaders import Augment, fastai_loaders
from skin_gradcam.models import create_model

ROOT = Path(__file__).resolve().parent.parent
SIZE, BS, HALF = 224, 32, (.5, .5, .5)
LIMIT_EPOCH, LIMIT_STEP = 3., 1.1
SAME = Augment(stretch=1., shift=0., cast=0.)  # flips, rotation, zoom, brightness, contrast, saturation, hue
RECIPE = ROOT / 'results' / 'ham10000_recipe.json'
FASTAI, MEMORY, MAPPED = 'fastai ImageDataLoaders.from_df', 'skin_gradcam, in memory', 'skin_gradcam, memory-mapped'
TENSOR = 'tensor in memory'


# ---------------------------------------------------------------- contenders


def all_for_training(folder: Path, pictures: int | None) -> tuple[Manifest, str]:
    "Every picture in the role train, and what they are"
    if (data := real_data()) is not None:
        what = 'HAM10000, the pictures of the study'
        m = Manifest.load(ROOT / 'results' / 'ham10000_roles.csv', data / 'ham10000')
    else:
        from skin_gradcam.phantoms import write_phantoms
        what = 'phantoms'
        root = write_phantoms(folder / 'phantoms', per_class=-(-(pictures or 240) // 3), seed=0)
        m = draw_manifest(read_folder(root)[0], root, per_class=None, shares=(4, 2, 1, 1), folds=2)
    df = m.df.sample(frac=1, random_state=0)[:pictures].assign(role='train', fold=-1)
    return Manifest(df, m.root, m.classes), what


def fastai_peer(m: Manifest, workers: int) -> Any:
    "fastai's loader as its documentation shows, squashed to the same size, with transforms equal in kind and strength"
    from fastai.vision import augment as A
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize
    a = SAME
    changes = [A.Flip(p=.5), A.Rotate(a.rotate, p=1., pad_mode='reflection'), A.Zoom(*a.zoom, p=1.),
               A.Brightness(a.brightness, p=1.), A.Contrast(a.contrast, p=1.), A.Saturation(a.saturation, p=1.),
               A.Hue(a.hue, p=1.), Normalize.from_stats(HALF, HALF, cuda=False)]
    return ImageDataLoaders.from_df(m.df, path=m.root, fn_col='path', label_col='dx', valid_pct=0., bs=BS,
                                    item_tfms=Resize(SIZE, method='squish'), batch_tfms=changes, num_workers=workers,
                                    device=torch.device('cpu')).train


def own(m: Manifest, workers: int, cache: Any, augment: Augment | None) -> Any:
    "The training loader, as `skin_gradcam.training` makes it"
    return fastai_loaders(m, SIZE, HALF, HALF, BS, augment, roles=('train',), workers=workers, device='cpu',
                          cache=cache).train


def endless(dl: Any) -> Iterator[Any]:
    while True: yield from dl


# ---------------------------------------------------------------- measuring


def turned(names: list[str], r: int) -> list[str]: return names[r % len(names):] + names[:r % len(names)]


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    v = sorted(values)
    return {k: round(x, digits) for k, x in dict(median=statistics.median(v), low=v[len(v) // 4],
                                                 high=v[-1 - len(v) // 4]).items()}


def one_epoch(dl: Any, batches: int | None) -> float:
    "Pictures a second"
    began, n = time.perf_counter(), 0
    for b in islice(dl, batches): n += len(b[0])
    return n / (time.perf_counter() - began)


def epochs(m: Manifest, squares: Any, recipe: Augment, workers: int, rounds: int, batches: int | None) -> list[dict]:
    "Pictures a second of each contender, from its second epoch on, and the ratio to fastai in the same round"
    made = {FASTAI: fastai_peer(m, workers), MEMORY: own(m, workers, 'memory', SAME),
            MAPPED: own(m, workers, squares, SAME), f'{MAPPED}, recipe of the study': own(m, workers, squares, recipe)}
    speed: dict[str, list[float]] = {k: [] for k in made}
    with tqdm(total=(rounds + 1) * len(made), desc=f'epochs, {workers} workers', disable=None, leave=False) as bar:
        for r in range(rounds + 1):
            for k in turned(list(made), r):
                v = one_epoch(made[k], batches)
                if r: speed[k].append(v)  # the first epoch starts workers and warms up
                bar.update()
    return [dict(name=k, workers=workers, images_per_second=spread(v, 1),
                 ratio=spread([a / b for a, b in zip(v, speed[FASTAI], strict=True)])) for k, v in speed.items()]


def trainer() -> Callable[[Any], None]:
    "A training step of the default network, as `skin_gradcam.training` makes it: channels last, AdamW"
    torch.manual_seed(0)
    net = create_model('tf_efficientnet_lite0', n_classes=3, pretrained=False).train()
    net.to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-4)
    def step(b: Any) -> None:
        loss = F.cross_entropy(net(b[0].contiguous(memory_format=torch.channels_last)), b[1], label_smoothing=.1)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return step


def steps(m: Manifest, squares: Any, recipe: Augment, rounds: int) -> list[dict]:
    "Seconds of a training step with each source of batches, and the ratio to a tensor in memory in the same round"
    def fast(augment: Augment) -> Iterator[Any]: return endless(own(m, 0, squares, augment))
    batch = next(fast(SAME))
    feeds: dict[str, Iterator[Any]] = {TENSOR: endless([batch]), 'loader, augmented as above': fast(SAME),
                                       'loader, default augmentation': fast(Augment()),
                                       'loader, recipe of the study': fast(recipe)}
    step = trainer()
    took: dict[str, list[float]] = {k: [] for k in feeds}
    for feed in feeds.values(): step(next(feed))
    with tqdm(total=rounds * len(feeds), desc='training steps', disable=None, leave=False) as bar:
        for r in range(rounds):
            for k in turned(list(feeds), r):
                began = time.perf_counter()
                step(next(feeds[k]))
                took[k].append(time.perf_counter() - began)
                bar.update()
    return [dict(name=k, seconds=spread(v), ratio=spread([a / b for a, b in zip(v, took[TENSOR], strict=True)]))
            for k, v in took.items()]


def batch_cost(m: Manifest, squares: Any, recipe: Augment, n: int) -> dict[str, float]:
    "Milliseconds to make one batch, apart from any training"
    out = {}
    for name, a in (('plain', None), ('same', SAME), ('default', Augment()), ('recipe', recipe),
                    ('default, hair and vignette', Augment(hair=1., vignette=1.))):
        feed, times = endless(own(m, 0, squares, a)), []
        next(feed)
        for _ in range(n):
            began = time.perf_counter()
            next(feed)
            times.append((time.perf_counter() - began) * 1e3)
        out[name] = round(statistics.median(times), 2)
    return out


# ---------------------------------------------------------------- telling


def show(title: str, rows: list[dict], key: str, unit: str) -> None:
    print(f'\n{title}\n{"":50s}{unit:>10s}{"ratio":>9s}{"quartiles":>16s}')
    for r in rows:
        q = r['ratio']
        print(f'{r["name"]:50s}{r[key]["median"]:10.4g}{q["median"]:9.3f}{q["low"]:8.3f}{q["high"]:8.3f}')


def machine() -> dict:
    packages = ('torch', 'torchvision', 'fastai', 'timm', 'pillow', 'numpy')
    return dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), clock='perf_counter', load=round(os.getloadavg()[0], 1),
                versions={p: importlib.metadata.version(p) for p in packages})


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true', help='few pictures and rounds, nothing written')
    p.add_argument('--pictures', type=int, help='how many (default: all; with --quick 256)')
    p.add_argument('--out', type=Path, help='JSON file to write (default: results/loader_speed.json; --quick: none)')
    p.add_argument('--check', action='store_true', help='exit code 1 if a limit is passed')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    rounds, step_rounds = (2, 3) if a.quick else (5, 40)
    facts = machine()
    recipe = Augment(**json.loads(RECIPE.read_text())['augment'])
    with tempfile.TemporaryDirectory() as tmp:
        m, what = all_for_training(Path(tmp), a.pictures or (256 if a.quick else None))
        began = time.perf_counter()
        squares = cached_squares(m.paths(), SIZE, tmp, list(m.df.sha256), list(m.df.path))
        built = time.perf_counter() - began
        print(f'{len(m)} pictures ({what}), {SIZE} pixels, batches of {BS}; decoding them once took {built:.1f} s')
        rows = [r for w in (0, 2) for r in epochs(m, squares, recipe, w, rounds, None)]
        for w in (0, 2):
            mine = [r for r in rows if r['workers'] == w]
            show(f'epochs, {w} workers, {rounds} rounds', mine, 'images_per_second', 'images/s')
        stepped = steps(m, squares, recipe, step_rounds)
        show(f'training step, {step_rounds} rounds', stepped, 'seconds', 's')
        alone = batch_cost(m, squares, recipe, 4 if a.quick else 20)
        print('\none batch alone, ms: ' + ', '.join(f'{k} {v}' for k, v in alone.items()))
    slowest = min(r['ratio']['median'] for r in rows if r['name'] in (MEMORY, MAPPED))
    dearest = max(r['ratio']['median'] for r in stepped)
    good = slowest >= LIMIT_EPOCH and dearest <= LIMIT_STEP
    print(f'\nat least {slowest:.2f} times the pictures a second of fastai (limit {LIMIT_EPOCH:g}), a step at most '
          f'{dearest:.3f} times that on a tensor (limit {LIMIT_STEP:g}): {"held" if good else "NOT HELD"}')
    out = a.out or (None if a.quick else ROOT / 'results' / 'loader_speed.json')
    if out:
        limits = dict(epoch_ratio=LIMIT_EPOCH, step_ratio=LIMIT_STEP)
        report = dict(machine=facts, pictures=len(m), data=what, manifest=m.hash, size=SIZE, batch=BS,
                      summary=dict(least_epoch_ratio=slowest, most_step_ratio=dearest, held=good, limits=limits),
                      decode_once_seconds=round(built, 2), batch_milliseconds=alone, epochs=rows, steps=stepped)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + '\n')
        print(f'written: {out.name}')
    return int(a.check and not good)


if __name__ == '__main__': sys.exit(main())
