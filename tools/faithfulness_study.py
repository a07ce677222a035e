"""Do the maps of a bundle tell the truth? The figures of the page Faithfulness, on real data and on phantoms.

    python tools/faithfulness_study.py                        # the shipped bundle -> results/ham10000_faithfulness.json
    python tools/faithfulness_study.py --bundle FOLDER        # another one
    python tools/faithfulness_study.py --only maps cascade    # some of the parts (--help lists them)

Pictures are those of the roles `valid` and `calibration`, which no weight was trained on; the role `test` is not looked
at. The target is the class that the model predicts. Each part is written when it is done, and a part that is there for
the same weights is not made again (`--again` makes it again). One thread; about twenty minutes for all of them.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from skin_gradcam import __version__
from skin_gradcam.bundle import Bundle, default_bundle, load_bundle
from skin_gradcam.data import Manifest, real_data
from skin_gradcam.faithfulness import (FILLINGS, PLANTED, cascade, class_score, crossed_interval, curve_area,
                                       early_net, fit_head, gaussian_map, localise, mean_difference, mean_interval,
                                       mean_mask, noise_map, perturbation_curve, planted, planted_hits, quotient,
                                       rank_correlation, ranking, road, stages, turned_agreement)
from skin_gradcam.files import locked, write_atomic
from skin_gradcam.gradcam import class_maps, completeness_gap, fuse, gradcam, record, smoothed
from skin_gradcam.lesions import CLASSES
from skin_gradcam.models import LesionNet, create_model, model_from_bundle
from skin_gradcam.pictures import open_picture, squash, to_input

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'results' / 'ham10000_faithfulness.json'
SIDE = 112  # pixels a side at which maps and masks are compared
SHOWN = ('hit', 'energy', 'auprc', 'iou', 'iou_evidence')
GRID = ('gradcam', 'hirescam', 'gradcam++', 'layercam', 'xgradcam', 'eigencam', 'finercam', 'random')
BASELINES = ('gaussian', 'narrow gaussian', 'mean mask', 'noise')


class Study:
    "The pictures, masks and model that all parts share"

    def __init__(self, bundle: Bundle, limit: int | None):
        found = real_data()
        if found is None: raise SystemExit('no real pictures: set SKIN_GRADCAM_DATA to the folder that holds ham10000/')
        self.root = found / 'ham10000'
        self.net = model_from_bundle(bundle)
        self.manifest = Manifest.load(ROOT / 'results' / 'ham10000_roles.csv', self.root)
        held = pd.concat([self.manifest.role('valid'), self.manifest.role('calibration')])
        seen = set(bundle.info.seen_lesions.get('train', ()))
        held = held[~held.lesion_id.isin(seen)].sort_values('image_id')
        # classes take turns, so that the first n pictures hold as many of each
        self.df = held.assign(turn=held.groupby('dx').cumcount()).sort_values(['turn', 'dx'])[:limit]
        self.ids, self.dx = self.df.lesion_id.to_numpy(), self.df.dx.to_numpy()
        self.x = self.pictures(self.df)
        self.masks = [self.mask(i) for i in self.df.image_id]
        with torch.inference_mode(): self.logits = torch.cat([self.net(b) for b in self.x.split(16)])
        self.target = self.logits.argmax(1)

    def pictures(self, df: pd.DataFrame) -> Tensor:
        "Prepared as the model wants them, `[n,3,S,S]`"
        prep = self.net.preprocessing
        def one(path): return to_input(squash(open_picture(path), prep.size)[0], prep.mean, prep.std)
        return torch.from_numpy(np.stack([one(p) for p in self.manifest.paths(df)]))

    def mask(self, image_id: str) -> np.ndarray:
        file = self.root / 'HAM10000_segmentations_lesion_tschandl' / f'{image_id}_segmentation.png'
        with Image.open(file) as im: return np.asarray(im.convert('L').resize((SIDE, SIDE), Image.Resampling.BOX)) > 127

    def blind(self) -> dict[str, list[np.ndarray]]:
        "Baselines that do not see the picture"
        usual, n = mean_mask([self.mask(i) for i in self.manifest.role('train').image_id]), len(self.df)
        return {'gaussian': [gaussian_map(SIDE)] * n, 'narrow gaussian': [gaussian_map(SIDE, 1 / 8)] * n,
                'mean mask': [usual] * n, 'noise': [noise_map(i) for i in range(n)]}


def shifted(s: Study, x: Tensor, c: Tensor, by: int = 8) -> Tensor:
    "Mean of the maps of four views, each shifted by a quarter of a cell both ways, on the grid of the pixels"
    wide, size, out = F.pad(x, [by] * 4, mode='reflect'), x.shape[-1], []
    for dy in (0, 2 * by):
        for dx in (0, 2 * by):
            m = gradcam(s.net, wide[..., dy:dy + size, dx:dx + size], c)
            up = F.pad(F.interpolate(m[:, None], (size, size), mode='bilinear'), [by] * 4, mode='replicate')
            out.append(up[:, 0, 2 * by - dy:2 * by - dy + size, 2 * by - dx:2 * by - dx + size])
    return torch.stack(out).mean(0)


def product(deep: Tensor, early: Tensor) -> Tensor:
    "What both a deep and an earlier map find, on the grid of the earlier one; a shape without a unit"
    return F.interpolate(deep[:, None], early.shape[-2:], mode='bilinear')[:, 0].relu() * early.relu()


def every_map(s: Study, x: Tensor, c: Tensor) -> dict[str, Tensor]:
    "Maps of a batch by all methods and layers"
    layers = [n for n, _ in s.net.named_modules() if n.endswith(('blocks.2', 'blocks.4'))]
    rec, last = record(s.net, x, [*layers, None]), record(s.net, x)
    names, out = ['early', 'middle', 'last'], {}
    for method in GRID:
        maps = class_maps(rec, c, method)
        out |= {f'{method} {n}': m for n, m in zip(names, maps)}
        if method in ('gradcam', 'layercam'):
            out |= {f'{method} fused 2': fuse(maps[1:]), f'{method} fused 3': fuse(maps)}
    for method in ('cam', 'ablationcam'): out[f'{method} last'] = class_maps(last, c, method)[0]
    flips, flipped = smoothed(s.net, x, c), smoothed(s.net, x, c, 'layercam', layers[-1])
    out |= {'gradcam flips': flips, 'layercam middle flips': flipped, 'product flips': product(flips, flipped)}
    out['product'] = product(out['gradcam last'], out['layercam middle'])
    for size in (320, 448):
        out[f'gradcam {size} px'] = gradcam(s.net, F.interpolate(x, (size, size), mode='bilinear', antialias=True), c)
    out['gradcam shifted'] = shifted(s, x, c)
    return out


def table(rows: dict[str, list[dict]], ids: np.ndarray) -> dict:
    "Means with intervals, quotient, maps without evidence, and paired differences to the baselines"
    cols = {name: pd.DataFrame(r) for name, r in rows.items()}
    out = {}
    for name, t in cols.items():
        out[name] = {k: mean_interval(t[k], ids).to_dict() for k in SHOWN}
        out[name]['quotient'] = quotient(t.background, t.lesion, ids).to_dict()
        out[name]['no_evidence'] = int((~t.evidence).sum())
        for base in ('gaussian', 'narrow gaussian', 'mean mask', 'random last'):
            if base in cols and base != name:
                out[name][f'minus {base}'] = {k: mean_difference(t[k], cols[base][k], ids).to_dict() for k in SHOWN}
    return out


def maps(s: Study) -> dict:
    "every method and layer against the lesion masks, beside the baselines"
    rows: dict[str, list[dict]] = {}
    for i in range(0, len(s.x), 16):
        for name, ms in every_map(s, s.x[i:i + 16], s.target[i:i + 16]).items():
            rows.setdefault(name, []).extend(localise(m, k) for m, k in zip(ms.numpy(), s.masks[i:i + 16]))
    rows |= {name: [localise(m, k) for m, k in zip(ms, s.masks)] for name, ms in s.blind().items()}
    asked = [bool(k.any() and not k.all()) for k in s.masks]
    with torch.inference_mode():
        bias = s.net.classifier.bias.detach()
        gap = torch.cat([completeness_gap(gradcam(s.net, b, 'all'), s.net(b), bias) for b in s.x.split(16)])
    plain = pd.DataFrame(rows['gradcam last'])
    right = (np.array(CLASSES)[s.target.numpy()] == s.dx)
    groups = {**{f'dx {d}': s.dx == d for d in CLASSES}, 'right': right, 'wrong': ~right}
    by = {}
    for g, k in groups.items():
        by[g] = {'n': int(k.sum())} | {m: mean_interval(plain[m][k], s.ids[k]).to_dict() for m in SHOWN}
        by[g]['quotient'] = quotient(plain.background[k], plain.lesion[k], s.ids[k]).to_dict()
    return dict(n=len(s.x), masks_without_question=len(asked) - sum(asked), lesion_share=float(np.mean(s.masks)),
                side=SIDE, grid=list(gradcam(s.net, s.x[:1]).shape[1:]), table=table(rows, s.ids), gradcam_by_group=by,
                completeness_gap=float(gap.abs().max()), largest_logit=float(s.logits.abs().max()))


def foreign(s: Study, per_class: int = 110) -> dict:
    "the quotient background over lesion for diagnoses that the model does not know, as published for these masks"
    df = pd.read_csv(s.root / 'HAM10000_metadata.csv').drop_duplicates('lesion_id').sort_values('image_id')
    files = {p.stem: p.relative_to(s.root) for p in s.root.glob('HAM10000_images_part_*/*.jpg')}
    out = {}
    for dx in ('akiec', 'bcc', 'df'):
        d = df[(df.dx == dx) & df.image_id.isin(files)].sample(frac=1, random_state=0)[:per_class]
        x = s.pictures(d.assign(path=d.image_id.map(files)))
        ms = torch.cat([gradcam(s.net, b) for b in x.split(16)]).numpy()
        r = pd.DataFrame([localise(m, s.mask(i)) for m, i in zip(ms, d.image_id)])
        out[dx] = {'n': len(d), 'quotient': quotient(r.background, r.lesion, d.lesion_id.to_numpy()).to_dict()}
    return out


def perturbation(s: Study, n: int = 24, steps: int = 8) -> dict:
    "deletion, insertion (three fillings) and ROAD for Grad-CAM, a random weighting and the blind baselines"
    n, rows = min(n, len(s.x)), []
    ids = s.ids[:n]
    blind, size = s.blind(), s.x.shape[-1]
    for i in range(n):
        x, c = s.x[i], int(s.target[i])
        ms = {m: gradcam(s.net, x[None], c, m)[0].numpy() for m in ('gradcam', 'random')}
        score = class_score(s.net, c)
        for name, m in (ms | {b: blind[b][i] for b in BASELINES if b != 'narrow gaussian'}).items():
            order, row = ranking(m, (size, size)), dict(i=i, name=name)
            for f in ('grey', 'skin', 'blur'):
                for way in ('deletion', 'insertion'):
                    curve = perturbation_curve(score, x, FILLINGS[f](x), order, steps, way == 'insertion')
                    row[f'{way} {f}'] = curve_area(curve)
            row['road'] = road(score, x, order, (.1, .3, .5), seed=i)
            rows.append(row)
    t = pd.DataFrame(rows).pivot(index='i', columns='name')
    out = {}
    for figure in t.columns.levels[0]:
        of = {name: t[figure][name].to_numpy() for name in t[figure]}
        out[figure] = {name: mean_interval(v, ids).to_dict() for name, v in of.items()}
        out[figure] |= {f'gradcam minus {b}': mean_difference(of['gradcam'], of[b], ids).to_dict()
                        for b in of if b != 'gradcam'}
    return dict(n=n, steps=steps, road_shares=[.1, .3, .5], figures=out)


def randomisation(s: Study, n: int = 102, seeds: int = 10) -> dict:
    "cascading weight randomisation: rank correlation of the maps before and after"
    x, c, ids, parts = s.x[:n], s.target[:n], s.ids[:n], stages(s.net)
    stop = [parts[0], *[p for p in parts if p.endswith(('blocks.6', 'blocks.4'))], parts[-1]]
    def ask(net): return torch.cat([gradcam(net, a, b) for a, b in zip(x.split(16), c.split(16))])
    before, found = ask(s.net), {p: [] for p in stop}
    for seed in range(seeds):
        for part, net in cascade(s.net, x[:32], seed, stop):
            found[part].append([rank_correlation(a, b) for a, b in zip(before, ask(net))])
    told = {p: crossed_interval(t, ids).to_dict() | dict(by_seed=np.mean(t, 1).round(3).tolist())
            for p, t in found.items()}
    return dict(n=len(x), seeds=seeds, parts=parts, remeasured_on=32, correlation=told)


def turns(s: Study, n: int = 110) -> dict:
    "agreement of the map with those of seven turned and mirrored views"
    a = np.concatenate([turned_agreement(lambda x, c=c: gradcam(s.net, x, c), b)
                        for b, c in zip(s.x[:n].split(16), s.target[:n].split(16))])
    flips, quarter = a[:, [1, 3, 5]], a[:, [0, 2, 4, 6]]      # turn(x, k): k = 2, 4, 6 keep the axes
    return dict(n=len(a), **{k: mean_interval(v.mean(1), s.ids[:n]).to_dict()
                        for k, v in dict(all=a, axes_kept=flips, axes_swapped=quarter).items()})


def fine_tune(what: str, n: int, size: int, epochs: int = 5) -> LesionNet:
    "The whole network, all weights trained on a planted set"
    torch.manual_seed(0)
    net = create_model('tf_efficientnet_lite0', n_classes=2, dropout=0.)
    x, y, _ = planted(what, n, net, size)
    labels = torch.from_numpy(y)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=epochs * (n // 20))
    net.train()
    for _ in range(epochs):
        for b in torch.randperm(n).split(20):
            F.cross_entropy(net(x[b]), labels[b]).backward()
            opt.step()
            opt.zero_grad()
            sched.step()
    return net.eval()


def shortcuts(s: Study | None = None, n: int = 120, shown: int = 100, size: int = 160) -> dict:
    "phantoms with planted evidence and planted shortcuts: does the map find what the model learned from?"
    out: dict[str, dict] = {}
    for kind in ('4 stages, head fitted', '7 stages, head fitted', 'whole network, trained'):
        for what in PLANTED:
            if kind.startswith('whole'): net = fine_tune(what, n, size)
            else:
                net = early_net(int(kind[0]))
                x, y, _ = planted(what, n, net, size)
                fit_head(net, x, y)
            ask = {kind: ('gradcam', None)}
            if kind.startswith('whole'): ask[f'{kind}; middle layer'] = ('hirescam', 'body.model.blocks.4')
            for name, (method, layer) in ask.items():
                found = planted_hits(net, what, 2 * shown, size, method=method, layer=layer)
                figures = {k: mean_interval(v, range(len(v))).to_dict() for k, v in found.items() if k != 'accuracy'}
                out.setdefault(name, {})[what] = {'accuracy': found['accuracy'], **figures}
                print(f'  {name}, {what}: accuracy {found["accuracy"]:.2f}, hit {figures["hit"]["value"]:.3f}, '
                      f'area {figures["area"]["value"]:.3f}', flush=True)
    return dict(trained_on=n, shown=shown, size=size, nets=out)


def scorecam(s: Study, n: int = 9) -> dict:
    "Score-CAM, which needs hundreds of passes a picture, on a few pictures beside the cheap methods"
    n = min(n, len(s.x))
    ids, masks = s.ids[:n], s.masks[:n]
    rows = {m: [localise(gradcam(s.net, s.x[i:i + 1], int(s.target[i]), m)[0].numpy(), masks[i]) for i in range(n)]
            for m in ('scorecam', 'gradcam')}
    rows |= {b: [localise(m, k) for m, k in zip(ms, masks)] for b, ms in s.blind().items()}
    return dict(n=n, table=table(rows, ids))


PARTS: dict[str, Callable] = dict(maps=maps, foreign=foreign, turns=turns, cascade=randomisation,
                                  perturbation=perturbation, planted=shortcuts, scorecam=scorecam)


def weights(bundle: Bundle) -> str:
    "What the figures belong to: the hash of the weights, not of the bundle, which may get further files"
    return bundle.info.files['model.safetensors']


def add(out: Path, bundle: Bundle, part: str, found: dict) -> None:
    "Put a part into the file of results; figures of other weights are thrown away"
    with locked(out):
        old = json.loads(out.read_text()) if out.exists() else {}
        if old.get('weights') != weights(bundle): old = {}
        new = old | dict(weights=weights(bundle), model=bundle.info.name, arch=bundle.info.arch, version=__version__,
                         roles=['valid', 'calibration'], target='predicted class') | {part: found}
        write_atomic(out, (json.dumps(rounded(new), indent=1) + '\n').encode())


def rounded(v):
    "Numbers with five digits behind the point"
    if isinstance(v, dict): return {k: rounded(o) for k, o in v.items()}
    if isinstance(v, list): return [rounded(o) for o in v]
    return float(f'{v:.3g}') if isinstance(v, float) and abs(v) < 1e-3 else round(v, 5) if isinstance(v, float) else v


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = 'parts:\n' + '\n'.join(f'  {n:14} {f.__doc__}' for n, f in PARTS.items())
    p.add_argument('--bundle', type=Path, help='folder of a bundle; the one that ships by default')
    p.add_argument('--out', type=Path, default=OUT, help='the JSON file')
    p.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART', help='some of the parts')
    p.add_argument('--again', action='store_true', help='make parts again that are there')
    p.add_argument('--limit', type=int, help='only the first pictures, for a try')
    args = p.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(args.bundle) if args.bundle else default_bundle()
    there = json.loads(args.out.read_text()) if args.out.exists() else {}
    todo = [n for n in args.only if args.again or there.get('weights') != weights(bundle) or n not in there]
    study = Study(bundle, args.limit) if set(todo) - {'planted'} else None
    for name in todo:
        start = time.time()
        add(args.out, bundle, name, PARTS[name](study))
        print(f'{name}: {time.time() - start:.0f} s', flush=True)


if __name__ == '__main__': main()
