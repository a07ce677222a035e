"""What do another camera, light or framing cost a recipe, and what does it know without the lesion? Out of fold.

    python tools/robust_trials.py lite0-frozen lite0-frozen-robust     # adds them to results/ham10000_robust.json

Each picture outside the test role is changed in every way of the page of stress, at severity 3, and answered by the
network of its fold (one view, temperature from the other folds as they are). Then its lesion is painted over, and the
rectangle around it: what the network still gets right, it has from the surroundings. Needs pictures, masks and the
networks that the trials left in runs/trials; a recipe takes some minutes.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import PLAN, RESULTS, ROOT, manifest

from skin_gradcam.calibration import cross_fit_temperature
from skin_gradcam.checks import find_masks
from skin_gradcam.data import Manifest, real_data
from skin_gradcam.evaluation import balanced_accuracy, ece, lesion_bootstrap, macro_auroc, paired_difference, softmax
from skin_gradcam.models import LesionNet
from skin_gradcam.pictures import open_picture, squash, to_input
from skin_gradcam.selection import OutOfFold, Trial, TrialError, mean_model, read_plan, read_trial, weights_file
from skin_gradcam.steps import keep_memory
from skin_gradcam.stress import CORRUPTIONS, background_only, corrupted, leaves_skin, lesion_occluded, read_mask
from skin_gradcam.training import predict_logits

SEVERITY, BATCH = 3, 66
FIGURES = (balanced_accuracy, macro_auroc, ece)
HIDDEN = {'lesion occluded': lesion_occluded, 'background only': background_only}
Answers = dict[str, np.ndarray]  # logits `[N,C]` by what was done to the pictures; NaN where it could not be done


def first_seed(trial: Trial) -> Trial: return replace(trial, seeds=trial.seeds[:1])


def network(trial: Trial, fold: int, m: Manifest, work: Path) -> LesionNet:
    "The network of a fold, first seed"
    if not weights_file(work, trial.name, trial.seeds[0], fold).exists():
        raise TrialError(f'{trial.name}: its networks are not in {work}; delete its answers and run the trial again')
    return mean_model(replace(trial, mean_of=(trial.name, trial.seeds[:1])), fold, m, work)[0]


def logits(net: LesionNet, pictures: list[np.ndarray], size: int) -> np.ndarray:
    "Logits `[N,C]` of uint8 pictures, squashed as everywhere"
    mean, std = net.preprocessing.mean, net.preprocessing.std

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # with classes that nobody looks at
        for k in range(0, len(pictures), BATCH):
            x = np.stack([to_input(squash(open_picture(a), size)[0], mean, std) for a in pictures[k:k + BATCH]])
            yield torch.from_numpy(x), torch.zeros(len(x))

    return predict_logits(net, batches())[0]


def versions(pictures: list[np.ndarray], masks: list[np.ndarray], seeds: Iterable[int]
             ) -> Iterator[tuple[str, list[int], list[np.ndarray]]]:
    "What is asked of pictures: its name, of which of them, and what is shown; one at a time"
    every, seeds = list(range(len(pictures))), list(seeds)
    yield 'clean', every, pictures
    for name in CORRUPTIONS:
        yield name, every, [corrupted(a, name, SEVERITY, s) for a, s in zip(pictures, seeds, strict=True)]
    able = [i for i in every if leaves_skin(masks[i])]
    for name, hide in HIDDEN.items(): yield name, able, [hide(pictures[i], masks[i]) for i in able]


def answers(trials: list[Trial], m: Manifest, work: Path) -> dict[str, Answers]:
    "By trial, in the order of the table; each picture is changed once for all trials"
    df = m.df[m.df.fold >= 0].reset_index(drop=True)
    nets = {f: {t.name: network(t, f, m, work) for t in trials} for f in sorted(set(df.fold.astype(int)))}
    files = find_masks(m.root)
    out: dict[str, Answers] = {t.name: {k: np.full((len(df), len(m.classes)), np.nan)
                                        for k in ('clean', *CORRUPTIONS, *HIDDEN)} for t in trials}
    for fold, net in nets.items():
        at = np.where(df.fold == fold)[0]
        pictures = [np.asarray(open_picture(p)) for p in m.paths(df.iloc[at])]
        masks = [read_mask(Path(m.root) / files[i], a.shape[:2])
                 for i, a in zip(df.image_id.iloc[at], pictures, strict=True)]
        for name, of, seen in versions(pictures, masks, map(int, at)):
            for t in trials: out[t.name][name][at[of]] = logits(net[t.name], seen, t.recipe.size)
        print(f'fold {fold}', file=sys.stderr)
    return out


def figures(o: OutOfFold, told: Answers) -> dict[str, Any]:
    "A row a change, the mean of all changes with what it costs, and what is left without the lesion"
    T = cross_fit_temperature(o.logits[0], o.y, o.fold)[1]  # that the other folds give as they are
    t = np.array([T[int(f)] for f in o.fold])[:, None]
    p = {c: softmax(z / t) for c, z in told.items()}
    rows = {c: {f.__name__: round(float(f(o.y, p[c])), 5) for f in FIGURES} for c in ('clean', *CORRUPTIONS)}
    changed = np.stack([p[c] for c in CORRUPTIONS])
    mean = {f.__name__: float(np.mean([f(o.y, q) for q in changed])) for f in FIGURES}
    cost = paired_difference(balanced_accuracy, o.y, list(changed), [p['clean']], o.lesion_id)
    return dict(rows=rows, mean=mean, gain=cost.to_dict(), floors={name: floor(o, p[name]) for name in HIDDEN})


def floor(o: OutOfFold, p: np.ndarray) -> dict[str, Any]:
    "Figures over the pictures whose lesion could be hidden"
    ok = np.isfinite(p).all(1)
    return dict(n=int(ok.sum())) | {f.__name__: lesion_bootstrap(f, o.y[ok], p[ok], o.lesion_id[ok]).to_dict()
                                    for f in (balanced_accuracy, macro_auroc)}


def line(name: str, r: dict[str, Any]) -> str:
    "A trial in words"
    g, as_they_are, changed = r['gain'], r['rows']['clean'], r['mean']
    return (f"{name}: balanced accuracy {as_they_are['balanced_accuracy']:.3f}, changed "
            f"{changed['balanced_accuracy']:.3f} ({g['value']:+.3f}, {g['low']:+.3f} to {g['high']:+.3f}); "
            f"ECE {as_they_are['ece']:.3f}, changed {changed['ece']:.3f}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('trials', nargs='+', help='names in results/ham10000_plan.json')
    p.add_argument('--work', type=Path, default=ROOT / 'runs' / 'trials')
    p.add_argument('--out', type=Path, default=RESULTS / 'ham10000_robust.json')
    a = p.parse_args(argv)
    plan = {t.name: t for t in read_plan(PLAN)}
    try:
        if unknown := [n for n in a.trials if n not in plan]:
            raise TrialError(f"no trial {', '.join(unknown)} in the plan: it has {', '.join(plan)}")
        if (found := real_data()) is None:
            raise TrialError('no real pictures found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/')
        m, trials = manifest('roles', found / 'ham10000'), [first_seed(plan[n]) for n in a.trials]
        keep_memory()
        read = {t.name: read_trial(t, m, RESULTS / 'trials', views=1) for t in trials}
        told = answers(trials, m, a.work)
    except ValueError as e:  # all that the library raises about plan, answers, networks, pictures
        print(e, file=sys.stderr)
        return 2
    new = dict(severity=SEVERITY, n=int((m.df.fold >= 0).sum()), trials={n: figures(read[n], told[n]) for n in told})
    if a.out.exists(): new['trials'] = json.loads(a.out.read_text())['trials'] | new['trials']
    a.out.write_text(json.dumps(new, indent=1) + '\n')
    for n, r in new['trials'].items(): print(line(n, r))
    return 0


if __name__ == '__main__': sys.exit(main())
