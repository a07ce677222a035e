"""Which of several bundles should ship? Each answers for the lesions of `valid` and `calibration`.

    python tools/compare_bundles.py runs/a/bundle runs/b/bundle      # beside the one that ships so far, the first row

None of the bundles may have trained on these 330 lesions. Each picture is changed in every way of the page of stress
at severity 3, and sharpened, and cut to the square in its middle; a bundle answers at its own temperature. The test
role takes no part. Each also gets the check of benchmarks/resize_parity.py, which a model has to pass before it ships.
Results go to results/ham10000_candidates.json.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from add_gate import HELD, sharper
from PIL import Image
from robust_trials import FIGURES, SEVERITY, logits
from study import COPIES, RESULTS, ROOT, manifest

from skin_gradcam.bundle import MODEL, Bundle, default_bundle, load_bundle
from skin_gradcam.data import real_data
from skin_gradcam.evaluation import balanced_accuracy, lesion_bootstrap, macro_auroc, paired_difference, softmax
from skin_gradcam.inference import Explainer
from skin_gradcam.models import model_from_bundle
from skin_gradcam.pictures import open_picture
from skin_gradcam.steps import keep_memory
from skin_gradcam.stress import CORRUPTIONS, corrupted

sys.path.insert(0, str(ROOT / 'benchmarks'))
from resize_parity import parity  # noqa: E402


def square(a: np.ndarray) -> np.ndarray:
    "The square in the middle of the 4:3 frame that a squashed copy shows"
    h, w = a.shape[:2]
    left = round(w / 8)
    return np.asarray(Image.fromarray(a[:, left:w - left]).resize((w, h), Image.Resampling.BICUBIC))


def versions(pictures: list[np.ndarray]) -> Iterator[tuple[str, list[np.ndarray]]]:
    "What is shown, by name: the pictures as they are, then one change after the other"
    yield 'clean', pictures
    yield 'sharper', [np.asarray(sharper(Image.fromarray(a))) for a in pictures]
    yield 'square', [square(a) for a in pictures]
    for name in CORRUPTIONS: yield name, [corrupted(a, name, SEVERITY, i) for i, a in enumerate(pictures)]


def told(bundles: list[Bundle], pictures: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    "Probabilities `[N,C]` of each bundle by change"
    nets = [model_from_bundle(b).to(memory_format=torch.channels_last).eval() for b in bundles]
    out: list[dict[str, np.ndarray]] = [{} for _ in bundles]
    for name, seen in versions(pictures):
        for b, net, p in zip(bundles, nets, out, strict=True):
            p[name] = softmax(logits(net, seen, b.info.size) / b.info.temperature)
        print(name, file=sys.stderr)
    return out


def figures(b: Bundle, y: np.ndarray, p: dict[str, np.ndarray], lesion: np.ndarray) -> dict[str, Any]:
    "A row a change, the mean of the changes, and the intervals of the pictures as they are"
    rows = {c: {f.__name__: round(float(f(y, q)), 5) for f in FIGURES} for c, q in p.items()}
    mean = {k: round(float(np.mean([r[k] for c, r in rows.items() if c != 'clean'])), 5) for k in rows['clean']}
    clean = {f.__name__: lesion_bootstrap(f, y, p['clean'], lesion).to_dict() for f in (balanced_accuracy, macro_auroc)}
    return dict(arch=b.info.arch, weights=b.info.files[MODEL], recipe=b.info.recipe,
                lesions=len(b.info.seen_lesions['train']), clean=clean, mean=mean, rows=rows)


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('bundles', type=Path, nargs='+', help='folders of bundles')
    ap.add_argument('--out', type=Path, default=RESULTS / 'ham10000_candidates.json')
    a = ap.parse_args(argv)
    if (found := real_data()) is None:
        print('no real pictures found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/', file=sys.stderr)
        return 2
    keep_memory()
    bundles = [default_bundle(), *(load_bundle(f, classes=None) for f in a.bundles)]
    m = manifest('roles', found / 'ham10000')
    df = m.df[m.df.role.isin(HELD)]
    held, lesion = set(df.lesion_id), df.lesion_id.to_numpy()
    for b in bundles:
        if seen := held & set(b.info.seen_lesions['train']):
            print(f'{b.folder}: was trained on {len(seen)} of these lesions, such as {min(seen)}', file=sys.stderr)
            return 2
    y = np.array([m.classes.index(c) for c in df.dx])
    p = told(bundles, [np.asarray(open_picture(f)) for f in m.paths(df)])
    names = [bundles[0].info.name, *(f.resolve().relative_to(ROOT / 'runs').parts[0] for f in a.bundles)]
    changed = [list(np.stack([q for c, q in one.items() if c != 'clean'])) for one in p]
    out = {}
    for name, b, one, many in zip(names, bundles, p, changed, strict=True):
        product = Explainer(replace(b, info=replace(b.info, resize=COPIES)), gate=False)
        out[name] = figures(b, y, one, lesion) | dict(parity=parity(product, found))
        for f in (balanced_accuracy, macro_auroc):
            out[name][f'{f.__name__}_over_first'] = dict(
                clean=paired_difference(f, y, [one['clean']], [p[0]['clean']], lesion).to_dict(),
                changed=paired_difference(f, y, many, changed[0], lesion).to_dict())
        c, mean = out[name]['rows']['clean'], out[name]['mean']
        same = out[name]['parity']['same_decision']
        print(f'{name}:', *(f'{k} {c[k]:.3f}, changed {mean[k]:.3f};' for k in c), f'same decision {same}')
    asked = dict(n=len(y), roles=list(HELD), severity=SEVERITY, manifest=m.hash)
    a.out.write_text(json.dumps(asked | dict(bundles=out), indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
