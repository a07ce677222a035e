"""The study of HAM10000 from the roles to the choice: runs what is missing, then writes results/ham10000_study.json.

    python tools/study.py --jobs 2          # trains what is missing (many hours; may be stopped and started at will)
    python tools/study.py --figures         # computes the figures from the answers in results/trials and results/leak

The answers of each fold are committed, so the figures need neither the pictures nor a training. The test role takes no
part in any of it.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from skin_gradcam.assessment import plain_rows
from skin_gradcam.calibration import calibration_intercept, calibration_slope, decision_curve, strata
from skin_gradcam.data import Manifest, real_data
from skin_gradcam.evaluation import balanced_accuracy, evaluate, lesion_bootstrap, macro_auroc, paired_difference
from skin_gradcam.selection import (NotRun, OutOfFold, Trial, TrialError, read_plan, read_trial, run_trials,
                                    study_figures, trial_interval)
from skin_gradcam.stress import metadata_floor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
PLAN, LEAK_PLAN = RESULTS / 'ham10000_plan.json', RESULTS / 'ham10000_leak_plan.json'
CURVE = {100: 'lite0-100', 250: 'lite0-250', 440: 'lite0'}  # pictures a class; four fifths of them train a fold
LEAK = ('lesions', 'pictures')
COPIES = 'squash-bilinear-jpeg75'  # how the pictures in the archive were made out of the originals


def manifest(name: str, folder: Path | str = '.') -> Manifest:
    return Manifest.load(RESULTS / f'ham10000_{name}.csv', folder)


def run_all(folder: Path, jobs: int) -> None:
    "Train every fold whose answers are not there"
    work = ROOT / 'runs'
    run_trials(read_plan(PLAN), manifest('roles', folder), RESULTS / 'trials', work / 'trials', jobs)
    for split in LEAK:
        run_trials(read_plan(LEAK_PLAN), manifest(f'leak_{split}', folder), RESULTS / 'leak' / split,
                   work / 'leak' / split, jobs)


def whole(trial: Trial, m: Manifest, out: Path) -> OutOfFold | None:
    "The answers of a trial, or None while a fold is missing"
    try: return read_trial(trial, m, out)
    except NotRun: return None


def curve(trials: dict[str, Trial], m: Manifest) -> list[dict[str, Any]]:
    "Balanced accuracy and AUROC over the number of pictures a class"
    rows = []
    for n, name in CURVE.items():
        if name not in trials or (o := whole(trials[name], m, RESULTS / 'trials')) is None: continue
        rows.append(dict(n=n, train_a_fold=trials[name].per_class or round(.8 * n), trial=name,
                         **{f.__name__: trial_interval(f, o).to_dict() for f in (balanced_accuracy, macro_auroc)}))
    return rows


def leak() -> dict[str, Any]:
    "What a split of pictures reports, what a split of lesions does, and the difference; on the same pictures"
    trial, = read_plan(LEAK_PLAN)
    read = {s: whole(trial, manifest(f'leak_{s}'), RESULTS / 'leak' / s) for s in LEAK}
    if any(o is None for o in read.values()): return {}
    by_lesion, by_picture = read['lesions'], read['pictures']
    told: dict[str, Any] = {s: {f.__name__: trial_interval(f, o).to_dict() for f in (balanced_accuracy, macro_auroc)}
                            for s, o in read.items()}
    order = [list(by_picture.image_id).index(i) for i in by_lesion.image_id]
    p = by_picture.probabilities[:, order]
    for f in (balanced_accuracy, macro_auroc):
        told[f'too_good_{f.__name__}'] = paired_difference(f, by_lesion.y, list(p), list(by_lesion.probabilities),
                                                           by_lesion.lesion_id).to_dict()
    return told


def floor(m: Manifest) -> dict[str, Any]:
    "What age, sex and site reach"
    d = m.df[m.df.fold >= 0]
    y = np.array([m.classes.index(c) for c in d.dx])
    p = metadata_floor(d, y, d.fold.to_numpy())
    return evaluate(y, p, d.lesion_id.to_numpy(), classes=m.classes).to_dict()


def chosen_figures(o: OutOfFold, m: Manifest) -> dict[str, Any]:
    "Slope, decision curve and strata of the chosen trial, on its first seed"
    d, p = m.df.set_index('image_id').loc[o.image_id].reset_index(), o.probabilities[0]
    slopes = {f.__name__: [v.to_dict() for v in lesion_bootstrap(f, o.y, p, o.lesion_id, 1000)]
              for f in (calibration_slope, calibration_intercept)}
    return dict(**slopes, decision_curve=decision_curve(o.y, p, o.lesion_id).round(5).to_dict('list'),
                strata=plain_rows(strata(o.y, p, o.lesion_id, d, n_boot=1000)))


def figures() -> dict[str, Any]:
    m, trials = manifest('roles'), {t.name: t for t in read_plan(PLAN)}
    told = study_figures(list(trials.values()), m, RESULTS / 'trials')
    o = read_trial(trials[told['chosen']], m, RESULTS / 'trials')
    return told | dict(chosen_figures=chosen_figures(o, m), learning_curve=curve(trials, m), leak=leak(),
                       floor=floor(m))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--figures', action='store_true', help='train nothing')
    p.add_argument('--jobs', type=int, default=1, help='processes, of one thread each when there are several')
    p.add_argument('--out', type=Path, default=RESULTS / 'ham10000_study.json')
    a = p.parse_args(argv)
    try:
        if not a.figures:
            if (found := real_data()) is None:
                raise TrialError('no real pictures found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/')
            run_all(found / 'ham10000', a.jobs)
        a.out.write_text(json.dumps(figures(), indent=1) + '\n')
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    print(f'written: {a.out.name}')
    return 0


if __name__ == '__main__': sys.exit(main())
