"""Resize parity: does a 600x450 original get the answer of its squashed 224x224 copy?

Run: python benchmarks/resize_parity.py [--bundle DIR]    writes results/resize_parity.json
Needs the real pictures (SKIN_GRADCAM_DATA, or ../shared/data beside the repository): 36 originals, 12 a class, and
their copies in the Kaggle layout. Mark: the same decision in at least 34 of 36, median change of a probability at most
0.1. `other_class` counts decisions for two different classes; the rest of those that differ are a class on one side and
"indeterminate" on the other. `other_way` says what would be if larger pictures were saved once more as JPEG, as the
training pictures were, or, for a bundle that does so, if they were not.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from skin_gradcam.data import real_data
from skin_gradcam.inference import Explainer
from skin_gradcam.pictures import SQUASHES


def pairs(root: Path) -> list[tuple[Path, Path]]:
    "Original and squashed copy of each picture"
    copies = {p.stem: p for p in (root / "ham10000").glob("HAM10000_images_part_*/*.jpg")}
    return [(p, copies[p.stem]) for p in sorted((root / "originals_600x450").glob("*.jpg"))]


def parity(explainer: Explainer, root: Path) -> dict:
    "Agreement of decisions and probabilities over all pairs"
    both = pairs(root)
    a = list(explainer.explain_many([o for o, _ in both]))
    b = list(explainer.explain_many([c for _, c in both]))
    change = np.abs(np.stack([e.p for e in a]) - np.stack([e.p for e in b]))
    return dict(
        bundle=str(explainer.stamp),
        n=len(both),
        same_decision=sum(x.decision == y.decision for x, y in zip(a, b, strict=True)),
        other_class=sum(len({x.decision, y.decision} - {"indeterminate"}) > 1 for x, y in zip(a, b, strict=True)),
        same_top=sum(x.top == y.top for x, y in zip(a, b, strict=True)),
        median_change=round(float(np.median(change.max(1))), 4),
        mean_change=round(float(change.max(1).mean()), 4),
        max_change=round(float(change.max()), 4),
    )


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--bundle")
    args = ap.parse_args()
    root = real_data()
    if root is None:
        raise SystemExit("the real pictures are not here: set SKIN_GRADCAM_DATA to the folder that holds ham10000/")
    explainer = Explainer.load(args.bundle)
    result = parity(explainer, root)
    b = explainer.bundle
    way = next(w for w in SQUASHES if w != b.info.resize)
    other = parity(Explainer(replace(b, info=replace(b.info, resize=way))), root)
    result["other_way"] = dict(resize=way) | {k: v for k, v in other.items() if k not in ("bundle", "n")}
    text = json.dumps(result, indent=1) + "\n"
    (Path(__file__).parents[1] / "results" / "resize_parity.json").write_text(text)
    print(text)
