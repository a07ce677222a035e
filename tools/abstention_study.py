"""When not to answer: thresholds from out-of-fold answers, the gate and the notes on real pictures.

    python tools/abstention_study.py                      # everything; a few minutes of one core
    python tools/abstention_study.py --bundle FOLDER      # the gate of another network
    python tools/abstention_study.py --only thresholds    # from the committed answers, without a picture

Writes results/ham10000_abstention.json; parts that are not asked for keep their figures. The gate is fitted on the role
`train` and judged on `valid` and `calibration`, with mild changes as in add_gate.py; the role `test` takes no part. Far
strangers are the pictures that scikit-image, scikit-learn and matplotlib bring along, cut into crops, and what is drawn
here.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from add_gate import CHANGED, RANK, REFUSED, mildly_changed
from PIL import Image, ImageDraw, ImageFont

from skin_gradcam import abstention as A
from skin_gradcam.bundle import Bundle, default_bundle, load_bundle
from skin_gradcam.calibration import cross_fit_temperature
from skin_gradcam.checks import find_masks
from skin_gradcam.data import Manifest, real_data
from skin_gradcam.evaluation import Interval, auroc, lesion_bootstrap, lesion_draws
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.pictures import open_picture, squash, to_input
from skin_gradcam.stress import corrupted, read_mask

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
OUT = RESULTS / 'ham10000_abstention.json'
TRIALS = ('lite0', 'mobilenetv2')  # trials whose five folds are in results/trials
NEAR = ('akiec', 'bcc', 'df')
MOVED = ('closer', 'farther')
FAR = ('photographs', 'textures', 'medical', 'text', 'charts', 'noise', 'plain')
CROPS = 12  # of each photograph, beside the whole
DRAWN = 80  # pictures of each group that is drawn here
COVERAGE, ALPHA = .8, .1
HELD = ('valid', 'calibration')


def manifest(folder: Path | str = '.') -> Manifest: return Manifest.load(RESULTS / 'ham10000_roles.csv', folder)


def named(values: Any) -> dict[str, dict]: return dict(zip(A.SELECTIVE, [v.to_dict() for v in values]))


# ---------------------------------------------------------------- thresholds and sets, from committed answers

def conformal(p: np.ndarray, y: np.ndarray, folds: np.ndarray) -> dict[str, Any]:
    "Sets whose levels come from four folds, judged on the fifth"
    sets = np.zeros(p.shape, bool)
    for f in np.unique(folds):
        sets[folds == f] = A.prediction_sets(p[folds == f], A.conformal_levels(p[folds != f], y[folds != f], ALPHA))
    size, true = sets.sum(1), sets[np.arange(len(y)), y]
    return dict(alpha=ALPHA, levels=A.conformal_levels(p, y, ALPHA).tolist(),
                holds_truth=[float(true[y == c].mean()) for c in range(p.shape[1])],
                sizes={str(k): float((size == k).mean()) for k in range(p.shape[1] + 1)})


def one_trial(o: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    "Thresholds and sets of the first seed"
    p, ids = cross_fit_temperature(o.logits[0], o.y, o.fold)[0], o.lesion_id
    boot = lambda t: named(lesion_bootstrap(partial(A.selective_figures, threshold=t), o.y, p, ids, 1000))
    curve, limit = A.risk_coverage_curve(o.y, p, ids), A.coverage_threshold(p, COVERAGE)
    told = dict(n=len(o.y), aurc=lesion_bootstrap(A.aurc, o.y, p, ids, 1000).to_dict(), all=boot(0.),
                chosen=A.choose_threshold(p, o.y, COVERAGE, ids).to_dict(),
                cross_fitted=boot(A.cross_fit_threshold(p, o.fold, COVERAGE)),
                away_by_class=[float((p[o.y == c].max(1) < limit).mean()) for c in range(3)],
                table=A.threshold_table(o.y, p, ids).round(6).to_dict('records'), curve=curve.round(5).to_dict('list'))
    return told, conformal(p, o.y, o.fold)


def thresholds(views: int = 1) -> dict[str, Any]:
    "Of the pictures as they are; with eight views a picture beside it"
    from skin_gradcam.selection import read_plan, read_trial
    m, plan = manifest(), {t.name: t for t in read_plan(RESULTS / 'ham10000_plan.json')}
    single = {n: one_trial(read_trial(plan[n], m, RESULTS / 'trials', views=1)) for n in TRIALS}
    eight = {n: one_trial(read_trial(plan[n], m, RESULTS / 'trials', views=8))[0] for n in TRIALS}
    few = ('aurc', 'all', 'chosen', 'cross_fitted')
    return dict(trials={n: t for n, (t, _) in single.items()}, conformal={n: c for n, (_, c) in single.items()},
                eight_views={n: {k: t[k] for k in few} for n, t in eight.items()})


# ---------------------------------------------------------------- strangers

class Picture(NamedTuple):
    group: str
    source: str  # crops of one photograph share it
    image: Image.Image


def crops(im: Image.Image, n: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    "The whole and windows of 35 to 80 % of its shorter side, 4:3 like the real pictures"
    yield im
    for _ in range(n):
        h = int(min(im.height, im.width * .75) * rng.uniform(.35, .8))
        w = int(h * 4 / 3)
        x, y = int(rng.integers(0, im.width - w + 1)), int(rng.integers(0, im.height - h + 1))
        yield im.crop((x, y, x + w, y + h))


def shipped_files() -> dict[str, list[Path]]:
    "Pictures in the wheels of scikit-image, scikit-learn and matplotlib"
    import matplotlib
    import skimage
    import sklearn
    sk, learn = Path(skimage.__file__).parent / 'data', Path(sklearn.__file__).parent / 'datasets/images'
    plot = Path(matplotlib.get_data_path()) / 'sample_data'
    of = lambda folder, names: [folder / n for n in names.split()]
    return dict(
        photographs=of(sk, 'astronaut.png camera.png chelsea.png coffee.png rocket.jpg motorcycle_left.png '
                           'clock_motion.png') + of(learn, 'china.jpg flower.jpg') + of(plot, 'grace_hopper.jpg'),
        textures=of(sk, 'brick.png grass.png gravel.png coins.png moon.png hubble_deep_field.jpg color.png '
                        'chessboard_RGB.png'),
        medical=of(sk, 'ihc.png cell.png retina.jpg microaneurysms.png phantom.png'),
        text=of(sk, 'page.png text.png'))


def text_picture(rng: np.random.Generator) -> Image.Image:
    "Lines of words in the package's own font"
    ink, paper = (tuple(int(v) for v in rng.integers(a, b, 3)) for a, b in ((0, 90), (150, 256)))
    im = Image.new('RGB', (600, 450), paper)
    pen, font = ImageDraw.Draw(im), ImageFont.load_default(int(rng.integers(12, 60)))
    words = 'lesion skin the report of patient and dose date is page table 1874 total a'.split()
    for y in range(10, 450, int(font.size * 1.3)):
        pen.text((15, y), ' '.join(rng.choice(words, 14)), ink, font)
    return im


def chart_picture(rng: np.random.Generator) -> Image.Image:
    "A plot as people make them"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(6, 4.5), dpi=100)
    ax, n = fig.subplots(), int(rng.integers(5, 40))
    x, y, kind = np.arange(n), rng.normal(0, 1, n).cumsum(), int(rng.integers(4))
    if kind == 0: ax.plot(x, y, color=rng.random(3))
    elif kind == 1: ax.bar(x, y, color=rng.random((n, 3)))
    elif kind == 2: ax.scatter(y, rng.normal(0, 1, n), s=rng.uniform(5, 300, n), c=rng.random((n, 3)))
    else: ax.pie(rng.random(6) + .1)
    ax.set_title('figure')
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def noise_picture(rng: np.random.Generator) -> Image.Image:
    "Independent numbers, of pixels or of blotches"
    k = int(rng.choice([1, 1, 2, 4, 10, 30]))
    a = rng.integers(0, 256, (450 // k + 1, 600 // k + 1, int(rng.choice([1, 3]))), np.uint8)
    return Image.fromarray(np.broadcast_to(a, (*a.shape[:2], 3)).copy()).resize((600, 450), Image.Resampling.BICUBIC)


def plain_picture(rng: np.random.Generator) -> Image.Image:
    "One colour, or two that run into each other"
    a, b = rng.integers(0, 256, (2, 3))
    if rng.random() < .5: b = a
    t = np.linspace(0, 1, 600)[None, :, None] * np.ones((450, 1, 1))
    return Image.fromarray(np.rint(a + (b - a) * (t if rng.random() < .5 else t[:, ::-1])).astype(np.uint8))


def strangers(seed: int = 0) -> Iterator[Picture]:
    rng = np.random.default_rng(seed)
    for group, files in shipped_files().items():
        for f in files:
            for im in crops(open_picture(f), CROPS, rng): yield Picture(group, f.name, im)
    drawers = dict(text=text_picture, charts=chart_picture, noise=noise_picture, plain=plain_picture)
    for group, draw in drawers.items():
        for i in range(DRAWN): yield Picture(group, f'{group} {i}', draw(rng))
    for i in range(DRAWN): yield Picture('phantoms', f'phantom {i}', draw_phantom(CLASSES[i % 3], i).picture)


# ---------------------------------------------------------------- features

class Answers(NamedTuple):
    features: np.ndarray  # [N,K]
    logits: np.ndarray  # [N,C]
    group: np.ndarray
    source: np.ndarray
    y: np.ndarray  # -1 for strangers

    def of(self, *groups: str) -> Answers:
        k = np.isin(self.group, groups)
        return Answers(*(v[k] for v in self))


def moved(found: Path) -> Iterator[tuple[Picture, int]]:
    "Every second held-out picture from nearer (68 % of the side) and from farther away (68 % of the frame)"
    m = manifest(found / 'ham10000')
    d = m.df[m.df.role.isin(['valid', 'calibration'])].iloc[::2]
    for name in MOVED:
        for file, lesion, dx in zip(m.paths(d), d.lesion_id, d.dx):
            a = corrupted(np.asarray(open_picture(file)), name, 4)
            yield Picture(name, lesion, Image.fromarray(a)), CLASSES.index(dx)


def real_pictures(found: Path) -> Iterator[tuple[Picture, int]]:
    "Roles, near strangers, and the originals at full size"
    import pandas as pd
    folder = found / 'ham10000'
    m = manifest(folder)
    d = m.df[m.df.role.isin(['train', *HELD])]
    for file, lesion, role, dx in zip(m.paths(d), d.lesion_id, d.role, d.dx):
        im = open_picture(file)
        yield Picture(role, lesion, im), CLASSES.index(dx)
        for changed in mildly_changed(im, CHANGED[role], Path(file).stem):
            yield Picture(role + '+', lesion, changed), CLASSES.index(dx)
    yield from moved(found)
    at = {p.stem: p for p in folder.glob('HAM10000_images_part_*/*.jpg')}
    table = pd.read_csv(folder / 'HAM10000_metadata.csv')
    for i, lesion, dx in table[table.dx.isin(NEAR)][['image_id', 'lesion_id', 'dx']].itertuples(index=False):
        yield Picture(dx, lesion, open_picture(at[i])), -1
    rows = table.set_index('image_id')
    for f in sorted((found / 'originals_600x450').rglob('*.jpg')):
        yield Picture('originals', rows.lesion_id[f.stem], open_picture(f)), CLASSES.index(rows.dx[f.stem])


def answers(bundle: Bundle, pictures: Iterator[tuple[Picture, int]], batch: int = 32) -> Answers:
    "What the gate looks at, and the logits, of every picture"
    import torch

    from skin_gradcam.models import model_from_bundle
    from skin_gradcam.steps import keep_memory
    torch.set_num_threads(1)
    keep_memory()
    net, prep, rows, waiting = model_from_bundle(bundle), bundle.info, [], []

    def run() -> None:
        with torch.inference_mode():
            _, pooled, f = net.described(torch.from_numpy(np.stack([w[0] for w in waiting])))
            z = net.head(pooled)
        rows.extend((a, b, *w[1:]) for a, b, w in zip(f.numpy(), z.numpy(), waiting))
        waiting.clear()

    for p, y in pictures:
        square = squash(p.image, prep.size, prep.resize)[0]
        waiting.append((to_input(square, prep.mean, prep.std), p.group, p.source, y))
        if len(waiting) == batch: run()
    if waiting: run()
    return Answers(*(np.array(v) for v in zip(*rows)))


# ---------------------------------------------------------------- the gate

def with_changed(*roles: str) -> tuple[str, ...]: return (*roles, *(r + '+' for r in roles))


def references(a: Answers) -> dict[str, Callable[[Answers], np.ndarray]]:
    "What the gate's economies cost: the whole covariance, Ledoit-Wolf shrinkage; features as they are"
    from sklearn.covariance import LedoitWolf
    t = a.of(*with_changed('train'))
    out = {}
    for name, scale in (('whole covariance', A.unit_length), ('whole covariance, features as they are', np.asarray)):
        f = scale(t.features)
        means = np.stack([f[t.y == c].mean(0) for c in range(3)])
        fit = LedoitWolf(assume_centered=True).fit(f - means[t.y])
        out[name] = lambda b, fit=fit, means=means, scale=scale: np.min(
            [fit.mahalanobis(scale(b.features) - m) for m in means], 0)
    return out


def judge(a: Answers, score: Callable[[Answers], np.ndarray]) -> dict[str, dict]:
    "AUROC of every group against valid and calibration"
    held = a.of('valid', 'calibration')
    inside = score(held)

    def against(groups: tuple[str, ...]) -> dict:
        o = a.of(*groups)
        return A.separation(inside, score(o), held.source, o.source).to_dict()
    return dict(far=against(FAR), near=against(NEAR)) | {g: against((g,)) for g in (*FAR, *NEAR, 'phantoms')}


def beyond_doubt(a: Answers, g: A.Gate, groups: tuple[str, ...]) -> dict:
    "AUROC of a score minus that of the maximum probability, on the same draws of sources"
    held, o = a.of('valid', 'calibration'), a.of(*groups)
    w = np.concatenate([lesion_draws(held.source, 1000, 0), lesion_draws(o.source, 1000, 1)], 1)
    out = np.r_[np.zeros(len(held.y), bool), np.ones(len(o.y), bool)]
    ours = np.r_[g.score(held.features, held.logits), g.score(o.features, o.logits)]
    theirs = np.r_[A.doubt(held.logits), A.doubt(o.logits)]
    draws = auroc(out, ours, w) - auroc(out, theirs, w)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(auroc(out, ours) - auroc(out, theirs), float(low), float(high)).to_dict()


def gate_figures(a: Answers, rank: int = RANK, ships: str | None = None) -> tuple[dict[str, Any], dict[str, A.Gate]]:
    "Of every score; `ships` names the one of the bundle, without it the best on far strangers"
    t, held = a.of(*with_changed('train')), a.of(*with_changed(*HELD))
    space = A.fit_space(t.features, t.y, rank)
    fitted = {k: A.fit_gate(k, t.features, t.logits, t.y, space=space) for k in A.SCORES}
    gates = {k: A.calibrate_gate(g, held.features, held.logits, REFUSED) for k, g in fitted.items()}
    groups = dict(far=FAR, near=NEAR) | {g: (g,) for g in (*FAR, *NEAR, 'phantoms', 'originals', *MOVED)}
    groups |= dict(changed=tuple(r + '+' for r in HELD))
    refused = {k: {n: float(g.refuses(a.of(*gs).features, a.of(*gs).logits).mean()) for n, gs in groups.items()}
               for k, g in gates.items()}
    for k, g in fitted.items():  # the threshold of one role, tried on the other
        for role, other in (('valid', 'calibration'), ('calibration', 'valid')):
            b = a.of(other)
            refused[k][other] = float(A.calibrate_gate(g, *a.of(*with_changed(role))[:2], REFUSED)
                                      .refuses(b.features, b.logits).mean())
    found = {k: judge(a, lambda b, g=g: g.score(b.features, b.logits)) for k, g in gates.items()}
    ref = {k: {g: v['value'] for g, v in judge(a, s).items()} for k, s in references(a).items()}
    ships = ships or max(A.SCORES, key=lambda k: found[k]['far']['value'])
    beyond = {k: {n: beyond_doubt(a, g, gs) for n, gs in (('far', FAR), ('near', NEAR))} for k, g in gates.items()}
    far = a.of(*FAR)
    let_in = Counter(far.source[~gates[ships].refuses(far.features, far.logits)].tolist())
    counts = {n: int(np.isin(a.group, gs).sum()) for n, gs in groups.items()}
    return dict(rank=rank, asked_refused=REFUSED, far_groups=list(FAR), near_groups=list(NEAR), counts=counts,
                sources={n: len(set(a.of(*gs).source)) for n, gs in groups.items()}, auroc=found, beyond_doubt=beyond,
                refused=refused, reference=ref, ships=ships, far_let_in=dict(let_in.most_common()),
                threshold={k: g.threshold for k, g in gates.items()},
                nbytes={k: g.nbytes for k, g in gates.items()}), gates


def gate_answers(bundle: Bundle, cache: Path | None = None) -> Answers:
    if cache and cache.is_file():
        with np.load(cache) as f: return Answers(*(f[k] for k in Answers._fields))
    if (found := real_data()) is None:
        raise ValueError('no real pictures found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/')
    both = (p for source in (real_pictures(found), ((s, -1) for s in strangers())) for p in source)
    a = answers(bundle, both)
    if cache: np.savez(cache, **a._asdict())
    return a


# ---------------------------------------------------------------- notes about the picture

NOTED = ('blurred', 'very dark', 'very bright', 'hair covers part of it', 'the lesion may be cut by the frame')
SPOILT = (('gaussian_blur', 3), ('gaussian_blur', 5), ('darker', 5), ('brighter', 5), ('hair', 2), ('hair', 4),
          ('off_centre', 5))


def shares(told: list[tuple[str, ...]]) -> dict[str, float]:
    any_note = float(np.mean([bool(t) for t in told]))
    return {n: float(np.mean([n in t for t in told])) for n in NOTED} | dict(any=any_note)


def truly_cut(mask: np.ndarray) -> bool:
    rim = np.ones(mask.shape, bool)
    rim[4:-4, 4:-4] = False
    return bool(mask[rim].mean() > A.CUT)


def note_figures(every: int = 5) -> dict[str, Any]:
    "Held-out pictures as they are and, every fifth of them, spoilt; the frame against the masks"
    if (found := real_data()) is None: raise ValueError('no real pictures found: set SKIN_GRADCAM_DATA')
    folder, m = found / 'ham10000', manifest()
    at, masks = {p.stem: p for p in folder.glob('HAM10000_images_part_*/*.jpg')}, find_masks(folder)
    ids = [*m.role('valid').image_id, *m.role('calibration').image_id]
    pictures = [open_picture(at[i]) for i in ids]
    told = [A.picture_notes(p) for p in pictures]
    noted = {'as they are': shares(told)}
    for name, severity in SPOILT:
        some = [corrupted(np.asarray(p), name, severity, seed=n) for n, p in enumerate(pictures[::every])]
        noted[f'{name} {severity}'] = shares([A.picture_notes(Image.fromarray(a)) for a in some])
    true = np.array([truly_cut(read_mask(folder / masks[i])) for i in ids])
    said = np.array([NOTED[4] in t for t in told])
    hair = [A.hair_lines(open_picture(at[i])).mean() for i in m.role('train').image_id]
    return dict(n=len(ids), spoilt_n=len(pictures[::every]), noted=noted, cut_limit=A.CUT,
                cut=dict(noted=float(said.mean()), true=float(true.mean()), found=float(said[true].mean()),
                         right=float(true[said].mean())),
                hair_quantiles={str(q): float(np.quantile(hair, q)) for q in (.5, .9, .95, .99)})


PARTS = ('thresholds', 'gate', 'notes')


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--bundle', type=Path, help='whose features are used; default: the one that ships')
    p.add_argument('--only', nargs='+', choices=PARTS, default=PARTS, help='parts to compute; others stay as they are')
    p.add_argument('--features', type=Path, help='.npz to keep the features in, or to take them from')
    p.add_argument('--gate', type=Path, help='folder to write the chosen gate to, as gate.safetensors')
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args(argv)
    try:
        told = json.loads(a.out.read_text()) if a.out.is_file() else dict(schema=1)
        if 'thresholds' in a.only: told |= thresholds()
        if 'gate' in a.only:
            bundle = load_bundle(a.bundle) if a.bundle else default_bundle()
            has = bundle.info.gate or {}
            figures, gates = gate_figures(gate_answers(bundle, a.features), has.get('rank', RANK), has.get('kind'))
            told['gate'] = dict(bundle=bundle.name, weights=bundle.info.files['model.safetensors'], **figures)
            if a.gate:
                from safetensors.numpy import save_file
                save_file(gates[figures['ships']].to_arrays(), a.gate / 'gate.safetensors')
        if 'notes' in a.only: told['notes'] = note_figures()
        a.out.write_text(json.dumps(told, indent=1) + '\n')
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    print(f'written: {a.out.name}')
    return 0


if __name__ == '__main__': sys.exit(main())
