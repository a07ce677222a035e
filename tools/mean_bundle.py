"""The mean weights of runs that followed each other, as a bundle: Wortsman et al. 2022, arXiv:2109.01903.

    python tools/mean_bundle.py runs/a runs/b --out runs/mean/bundle

A run that goes on from another one with stronger changes of the pictures (`start` in its recipe) gains what it was
trained for and loses some of what it knew; half way between both ends lies a network that keeps most of either. All
must be of one architecture, classes, size and manifest. The bundle says of itself what the last run's bundle says, its
recipe has the key `mean_of`; temperature and figures are those of the last run, until `tools/ship_model.py` measures
its own.
"""
from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from skin_gradcam.bundle import Bundle, load_bundle, write_bundle
from skin_gradcam.checkpoints import Run

SAME = ("arch", "classes", "size", "mean", "std", "manifest_hash", "dtype")


def mean_bundle(bundles: list[Bundle], out: Path) -> Bundle:
    "Mean of every tensor of floats, calculated in single precision and stored as it was; the rest must be equal"
    last = bundles[-1]
    for b in bundles[:-1]:
        if differ := [k for k in SAME if getattr(b.info, k) != getattr(last.info, k)]:
            raise SystemExit(f"{b.folder} and {last.folder} differ in {', '.join(differ)}: there is no mean of them")
    sides, tensors = [b.tensors() for b in bundles], {}
    for k, v in last.tensors().items():
        if v.dtype.kind == "f":
            tensors[k] = np.mean([s[k].astype(np.float32) for s in sides], axis=0).astype(v.dtype)
        else:
            tensors[k] = v
    recipe = dict(last.info.recipe, mean_of=[b.folder.parent.name for b in bundles])
    return write_bundle(out, tensors, replace(last.info, recipe=recipe))


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", type=Path, nargs="+", help="finished run folders")
    ap.add_argument("--out", type=Path, required=True, help="folder for the bundle")
    args = ap.parse_args()
    made = mean_bundle([load_bundle(Run.open(r).bundle_path) for r in args.runs], args.out)
    print(f"{made.folder}: {made.info.arch}, {made.hash[:12]}")
