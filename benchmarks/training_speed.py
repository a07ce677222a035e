"""What training costs: `skin_gradcam.training` against fastai's plain loop, with the same network, pictures and batch.

Two claims. (1) A training step, from the pictures' loader to the updated weights, handles at least twice the pictures a
second of fastai's plain loop at the same size (`ImageDataLoaders.from_df`, `Learner`, no further settings).
(2) The validation balanced accuracy at which the plain loop ends is reached in at most a third of its time, and the
final figure lies within the paired 95 % interval of the plain loop's. The recipe is the one that the study's trials
start from, nothing chosen for this comparison.

Each side runs in a process of its own, one after the other, in rounds whose order turns; a ratio is taken within one
round. Wall time, all cores for PyTorch, a quiet machine. Claim 2 needs the real pictures (train role of
`results/ham10000_roles.csv` to train on, valid and calibration roles, 330 lesions, to measure on; test is not touched).

    python benchmarks/training_speed.py               # steps: about five minutes; writes results/training_speed.json
    python benchmarks/training_speed.py --accuracy    # claim 2 as well: twenty minutes more
    python benchmarks/training_speed.py --quick       # small pictures, phantoms; writes nothing without --out
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT_STEP, LIMIT_TIME = 2., 3.
SIDES = ('fastai', 'skin_gradcam')
PLAIN = dict(epochs=10, freeze_epochs=1, lr=2e-3)  # fastai's `fine_tune(10)` at its default rate
PLAN = ROOT / 'results' / 'ham10000_plan.json'  # the recipe of claim 2 is the one that the study's trials start from


# ---------------------------------------------------------------- the two sides, each in a process of its own


def pictures(folder: Path, real: bool) -> Any:
    "A manifest with the roles train and valid"
    import numpy as np

    from skin_gradcam.data import Manifest, draw_manifest, read_folder
    from skin_gradcam.data import real_data as find
    if real:
        m = Manifest.load(ROOT / 'results' / 'ham10000_roles.csv', find() / 'ham10000')
        df = m.df[m.df.role != 'test']
        return Manifest(df.assign(role=np.where(df.role == 'train', 'train', 'valid'), fold=-1), m.root, m.classes)
    return draw_manifest(read_folder(folder)[0], folder, per_class=None, shares=(3, 1, 1, 1), folds=2)


def plain_learner(m: Any, arch: str, size: int, bs: int) -> Any:
    "fastai's loop as its documentation shows it: loaders from a table, a Learner, its own augmentation"
    import torch
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import BalancedAccuracy
    from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, aug_transforms

    from skin_gradcam.models import create_model, splitter
    torch.manual_seed(0)
    net = create_model(arch, pretrained=True)
    p, df = net.preprocessing, m.df[m.df.role.isin(['train', 'valid'])]
    dls = ImageDataLoaders.from_df(
        df.assign(held=df.role == 'valid'), path=m.root, fn_col='path', label_col='dx', valid_col='held', bs=bs,
        item_tfms=Resize(size, method='squish'), num_workers=0, seed=0, device=torch.device('cpu'),
        batch_tfms=[*aug_transforms(flip_vert=True, max_rotate=180, max_warp=0), Normalize.from_stats(p.mean, p.std,
                                                                                                     cuda=False)])
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(label_smoothing=.1), splitter=splitter,
                   metrics=BalancedAccuracy())


def own_learner(m: Any, recipe: dict) -> Any:
    "The library's learner"
    from skin_gradcam.steps import keep_memory
    from skin_gradcam.training import make_learner, recipe_from
    keep_memory()
    return make_learner(recipe_from(recipe), m)


def time_steps(learn: Any, steps: int) -> list[float]:
    "Seconds of each training step, loading included, the first three left out"
    from fastai.callback.core import Callback, CancelFitException
    marks: list[float] = []

    class Marks(Callback):
        order = 90
        def after_batch(self) -> None:
            if not self.training: return
            marks.append(time.perf_counter())
            if len(marks) > steps + 3: raise CancelFitException()
    with learn.no_bar(), learn.no_logging(): learn.fit(9999, lr=1e-4, cbs=Marks())
    return [b - a for a, b in zip(marks[2:-1], marks[3:], strict=True)]


def time_epochs(learn: Any, fit: Any) -> list[dict[str, float]]:
    "Elapsed seconds and balanced accuracy after each epoch"
    from fastai.callback.core import Callback
    rows: list[dict[str, float]] = []
    began = time.perf_counter()

    class Rows(Callback):
        order = 90
        def after_epoch(self) -> None:
            names = list(self.recorder.metric_names[1:])
            value = next(v for n, v in zip(names, self.recorder.values[-1], strict=False) if n.startswith('balanced'))
            rows.append(dict(seconds=round(time.perf_counter() - began, 1), balanced_accuracy=round(float(value), 4)))
    noted = Rows()
    learn.add_cb(noted)
    with learn.no_bar(), learn.no_logging(): fit(learn)
    learn.remove_cb(noted)                       # `get_preds` ends an epoch, too, and one without metrics
    return rows


def answers(learn: Any) -> dict[str, list]:
    "Class and probabilities of the validation pictures, in the classes' alphabetical order on both sides"
    import torch
    vocab = [str(c) for c in learn.dls.vocab]
    order = [vocab.index(c) for c in sorted(vocab)]
    p, y = learn.get_preds(dl=learn.dls.valid)
    if abs(float(p.sum(1).mean()) - 1) > 1e-3: p = torch.softmax(p, 1)
    rank = {o: i for i, o in enumerate(order)}
    return dict(p=p[:, order].double().numpy().round(6).tolist(), y=[rank[int(v)] for v in y])


def child(a: argparse.Namespace) -> None:
    "One side; prints JSON on its last line"
    warnings.filterwarnings('ignore')
    began = time.perf_counter()
    m, recipe = pictures(a.folder, a.real), json.loads(a.recipe)
    size, bs = recipe.get('size', 224), recipe.get('bs', 32)
    told: dict[str, Any] = {}
    if a.steps:
        if a.child == 'fastai': learn = plain_learner(m, recipe['arch'], size, bs)
        else: learn = own_learner(m, {**recipe, 'progressive': []})
        told['steps'] = time_steps(learn, a.steps)
    elif a.child == 'fastai':
        learn = plain_learner(m, recipe['arch'], size, bs)
        told['epochs'] = time_epochs(learn, lambda x: x.fine_tune(PLAIN['epochs'], PLAIN['lr'],
                                                                 freeze_epochs=PLAIN['freeze_epochs']))
        told |= answers(learn)
    else:
        from skin_gradcam.training import fit, recipe_from
        learn = own_learner(m, recipe)
        told['made'] = round(time.perf_counter() - began, 1)
        told['epochs'] = time_epochs(learn, lambda x: fit(x, recipe_from(recipe)))
        if 'averaged_weights' in dir(learn): learn.model.load_state_dict(learn.averaged_weights.state)
        told |= answers(learn)
    print(json.dumps(told))


def run_side(side: str, *options: str) -> dict:
    done = subprocess.run([sys.executable, __file__, '--child', side, *options], capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'{side}: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- measuring


def spread(values: list[float]) -> dict[str, float]:
    v = sorted(values)
    return dict(median=round(statistics.median(v), 4), low=round(v[0], 4), high=round(v[-1], 4))


def measure_steps(rounds: int, steps: int, recipe: dict, common: list[str]) -> dict:
    "Images a second of each side, and the ratio within each round"
    speed: dict[str, list[float]] = {s: [] for s in SIDES}
    for r in range(rounds):
        for s in SIDES[::1 if r % 2 else -1]:
            took = run_side(s, '--steps', str(steps), '--recipe', json.dumps(recipe), *common)['steps']
            speed[s].append(recipe.get('bs', 32) / statistics.median(took))
            print(f'round {r + 1}: {s:14s}{speed[s][-1]:8.1f} images/s', flush=True)
    ratio = [b / a for a, b in zip(speed['fastai'], speed['skin_gradcam'], strict=True)]
    return dict(images_per_second={s: spread(v) for s, v in speed.items()}, ratio=spread(ratio))


def first_reached(rows: list[dict], target: float) -> float | None:
    "Seconds until the balanced accuracy was there for the first time"
    return next((r['seconds'] for r in rows if r['balanced_accuracy'] >= target), None)


def measure_accuracy(recipe: dict, common: list[str]) -> dict:
    "Curves of both sides, the time to the plain loop's final figure, and the paired difference of the final answers"
    import numpy as np

    from skin_gradcam.evaluation import balanced_accuracy, paired_difference
    told = {s: run_side(s, '--recipe', json.dumps(recipe), *common) for s in SIDES}
    target = told['fastai']['epochs'][-1]['balanced_accuracy']
    whole, ours = told['fastai']['epochs'][-1]['seconds'], told['skin_gradcam']['epochs']
    reached = first_reached(ours, target)
    y = np.array(told['fastai']['y'])
    assert told['skin_gradcam']['y'] == told['fastai']['y'], 'the two sides answered for different pictures'
    p = [np.array(told[s]['p']) for s in SIDES]
    p = [v / v.sum(1, keepdims=True) for v in p]
    apart = paired_difference(balanced_accuracy, y, p[1], p[0], np.arange(len(y)))
    first = first_reached(told['fastai']['epochs'], target)
    return dict(n=len(y), target=target, seconds=dict(fastai=whole, fastai_first=first, skin_gradcam=reached),
                ratio=None if reached is None else round(whole / reached, 2), made=told['skin_gradcam']['made'],
                ratio_first=None if reached is None or first is None else round(first / reached, 2),
                epochs={s: told[s]['epochs'] for s in SIDES}, difference=apart.to_dict())


def machine() -> dict:
    import importlib.metadata

    import torch
    packages = ('torch', 'torchvision', 'fastai', 'timm')
    return dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count(),
                load=round(os.getloadavg()[0], 1), threads=torch.get_num_threads(),
                versions={p: importlib.metadata.version(p) for p in packages})


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true', help='small pictures, two rounds, phantoms')
    p.add_argument('--accuracy', action='store_true', help='also the time to the same validation accuracy (real data)')
    p.add_argument('--no-steps', action='store_true', help='keep the stored figures of claim 1')
    p.add_argument('--out', type=Path, help='JSON to write or to complete (default: results/training_speed.json)')
    p.add_argument('--check', action='store_true', help='exit code 1 if a limit is passed')
    p.add_argument('--recipe', help='JSON fields of the recipe of claim 2')
    p.add_argument('--child', choices=SIDES, help=argparse.SUPPRESS)
    p.add_argument('--steps', type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    p.add_argument('--real', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        child(a)
        return 0
    from skin_gradcam.data import real_data
    from skin_gradcam.phantoms import write_phantoms
    with tempfile.TemporaryDirectory() as d:
        real = real_data() is not None and not a.quick
        if not real: write_phantoms(Path(d), per_class=48, seed=0)
        common = ['--folder', d, *(['--real'] if real else [])]
        facts = machine() | dict(pictures='HAM10000, train role' if real else 'phantoms')
        arch = dict(arch='tf_efficientnet_lite0')
        size = 96 if a.quick else 224
        told: dict[str, Any] = dict(facts, limits=dict(step_ratio=LIMIT_STEP, time_ratio=LIMIT_TIME))
        out = a.out or (None if a.quick else ROOT / 'results' / 'training_speed.json')
        if out and out.exists(): told = json.loads(out.read_text()) | told
        rounds, steps = (1, 4) if a.quick else (4, 12)
        if not a.no_steps:
            told['step'] = dict(size=size, bs=32, **measure_steps(rounds, steps, arch | dict(size=size), common))
        if a.accuracy:
            if not real: raise SystemExit('--accuracy needs the real pictures: set SKIN_GRADCAM_DATA')
            recipe = arch | (json.loads(a.recipe) if a.recipe else json.loads(PLAN.read_text())['base'])
            told['accuracy'] = dict(recipe=recipe, **measure_accuracy(recipe, common))
    print(json.dumps({k: told[k] for k in ('step', 'accuracy') if k in told}, indent=1))
    if out: out.write_text(json.dumps(told, indent=1) + '\n')
    ok = 'step' in told and told['step']['ratio']['median'] >= LIMIT_STEP
    if a.accuracy: ok &= (told['accuracy']['ratio'] or 0) >= LIMIT_TIME
    return int(a.check and not ok)


if __name__ == '__main__': sys.exit(main())
