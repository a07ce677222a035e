"""Put into a bundle what it takes to refuse strangers and to average eight views; by default into the one that ships.

    python tools/add_gate.py                                                  # skin_gradcam/assets/default
    python tools/add_gate.py RUN/bundle --data FOLDER --manifest ROLES.csv    # any other

The gate (`gate.safetensors`) is fitted on the features of the role `train`; above its limit are at most 2.5 % of the
roles `valid` and `calibration`. Both count as they are and mildly changed (another camera, light, size, compression):
a picture is not another kind of picture because it was saved again. Temperature and threshold of eight views
(`eight_views` in bundle.json) are fitted on these two roles too; the role `test` takes no part. Run it after
add_onnx.py; it takes two minutes. The weights keep their bytes, the bundle's own hash changes, and with it what names
it: run `nbdev-test` and `python benchmarks/resize_parity.py` afterwards. For the bundle that ships the figures go to
results/ham10000_gate.json.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from add_onnx import card_with
from PIL import Image, ImageFilter
from safetensors.numpy import save

from skin_gradcam.abstention import GATE_BYTES, SCORES, Gate, calibrate_gate, fit_gate, selective_figures
from skin_gradcam.bundle import GATE, MODEL, Bundle, add_files, default_bundle, load_bundle
from skin_gradcam.data import Manifest, real_data
from skin_gradcam.evaluation import (
    balanced_accuracy,
    coverage_threshold,
    fit_temperature,
    lesion_bootstrap,
    paired_difference,
    softmax,
)
from skin_gradcam.inference import Explainer, Prepared, ahead, prepare, run_views
from skin_gradcam.lesions import CLASSES
from skin_gradcam.pictures import open_picture
from skin_gradcam.stress import CORRUPTIONS, corrupted

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
HELD = ("valid", "calibration")
RANK, REFUSED, COVERAGE, BATCH = 128, 0.025, 0.9, 16
MILD = ("sharper", *(k for k in CORRUPTIONS if k not in ("ruler", "ink")))  # at severity 1
CHANGED = dict(train=4, valid=6, calibration=6)  # how many changes of each picture of a role take part


def sharper(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.UnsharpMask(1, 150, 0))


def mildly_changed(picture: Image.Image, n: int, name_of_it: str) -> Iterator[Image.Image]:
    "The picture after `n` different mild changes, drawn by chance; its name is the seed"
    rng = np.random.default_rng(crc32(name_of_it.encode()))
    for name in rng.choice(MILD, n, replace=False):
        if name == "sharper":
            yield sharper(picture)
        else:
            yield Image.fromarray(corrupted(np.asarray(picture), name, 1))


class Answers(NamedTuple):
    "Of the pictures of some roles; those that were changed have a role of their own, `train+`"

    y: np.ndarray  # [N]
    lesion: np.ndarray  # [N]
    role: np.ndarray  # [N]
    features: np.ndarray  # [N,D], of the bundle's `gate_stages`, or pooled
    logits: np.ndarray  # [N,C]
    eight: np.ndarray  # [N,C], the mean of eight views


def answers(e: Explainer, m: Manifest, roles: tuple[str, ...], eight: bool) -> Answers:
    "What the network says about the pictures of some roles, as they are and mildly changed"
    df = m.df[m.df.role.isin(roles)]
    rows, waiting, named = [], list[Prepared](), list[tuple[int, str, str]]()

    def load(source: tuple[Any, str]) -> list[Prepared]:
        file, role = source
        im = open_picture(file)
        changed = mildly_changed(im, CHANGED[role], Path(file).stem)
        return [prepare(i, Path(file).name, e.bundle, keep_side=0) for i in (im, *changed)]

    def run() -> None:
        out = run_views(e.backend, np.stack([p.x for p in waiting]))
        if out.features is None:
            raise SystemExit(f"{e.bundle.name}: its model.onnx gives no features; export it again with add_onnx.py")
        # eight views only of the pictures as they are: the others do not ask for them
        plain = [k for k, (*_, role) in enumerate(named[-len(waiting):]) if eight and not role.endswith("+")]
        views = out.logits.copy()
        if plain:
            views[plain] = run_views(e.backend, np.stack([waiting[k].x for k in plain]), 8).logits
        rows.append((out.features, out.logits, views))
        waiting.clear()

    sources = zip(m.paths(df), df.role)
    for (dx, lesion, role), ready in zip(df[["dx", "lesion_id", "role"]].itertuples(index=False),
                                         ahead(load, sources, size=BATCH)):
        for k, one in enumerate(ready):
            waiting.append(one)
            named.append((CLASSES.index(dx), lesion, role + "+" * (k > 0)))
            if len(waiting) == BATCH:
                run()
    if waiting:
        run()
    return Answers(*(np.array(v) for v in zip(*named)), *(np.concatenate(v) for v in zip(*rows)))


def of(a: Answers, *roles: str) -> Answers:
    "The answers of some roles"
    return Answers(*(v[np.isin(a.role, roles)] for v in a))


def fitted_gate(kind: str, train: Answers, held: Answers, rank: int) -> tuple[Gate, dict[str, Any]]:
    "The gate, and how many real pictures the limit of one role refuses in the other"
    fitted = fit_gate(kind, train.features, train.logits, train.y, rank)
    gate, plain = calibrate_gate(fitted, held.features, held.logits, REFUSED), of(held, *HELD)
    if gate.nbytes > GATE_BYTES:
        raise SystemExit(f"the gate has {gate.nbytes} bytes, at most {GATE_BYTES} may ship: take a smaller --rank")
    crossed = {}
    for one, other in (HELD, HELD[::-1]):
        a, b = of(held, one, one + "+"), of(held, other)
        limit = calibrate_gate(fitted, a.features, a.logits, REFUSED)
        crossed[other] = round(float(limit.refuses(b.features, b.logits).mean()), 4)
    refused = round(float(gate.refuses(plain.features, plain.logits).mean()), 4)
    return gate, dict(kind=kind, rank=rank, limit=gate.threshold, asked_refused=REFUSED, trained_on=len(train.y),
                      limit_from=len(held.y), refused=refused,
                      refused_with_the_limit_of_the_other_role=crossed, nbytes=gate.nbytes)


def eight_views(held: Answers, temperature: float, threshold: float, coverage: float) -> tuple[dict, dict]:
    "Temperature and threshold of eight views, and both ways of answering side by side"
    t8 = float(fit_temperature(held.eight, held.y))
    p1, p8 = softmax(held.logits, temperature), softmax(held.eight, t8)
    fit = dict(temperature=t8, indeterminate=float(coverage_threshold(p8, coverage)))
    better = paired_difference(balanced_accuracy, held.y, p8, p1, held.lesion)
    told = {}
    for name, p, limit in (("one", p1, threshold), ("eight", p8, fit["indeterminate"])):
        figures = lesion_bootstrap(partial(selective_figures, threshold=limit), held.y, p, held.lesion, 2000)
        every = lesion_bootstrap(balanced_accuracy, held.y, p, held.lesion, 2000)
        told[name] = dict(threshold=limit, balanced_accuracy=every.to_dict(), answered=figures[0].to_dict(),
                          balanced_accuracy_answered=figures[1].to_dict())
    return fit, dict(n=len(held.y), **fit, coverage=coverage, views=told, eight_minus_one=better.to_dict(),
                     changed=float((p1.argmax(1) != p8.argmax(1)).mean()))


def add(bundle: Bundle, m: Manifest, kind: str = "mahalanobis", rank: int = RANK) -> tuple[Bundle, dict[str, Any]]:
    "The bundle with gate and eight views, and the figures"
    e = Explainer(bundle, gate=False)
    train, held = answers(e, m, ("train",), eight=False), answers(e, m, HELD, eight=True)
    gate, about = fitted_gate(kind, train, held, rank)
    i = bundle.info
    coverage = i.recipe.get("coverage", COVERAGE)
    fit, views = eight_views(of(held, *HELD), i.temperature, i.thresholds["indeterminate"], coverage)
    data = {GATE: save(gate.to_arrays())}
    done = add_files(bundle, data | card_with(bundle, data), gate=about, eight_views=fit)
    if done.info.files[MODEL] != bundle.info.files[MODEL]:
        raise SystemExit(f"{bundle.folder}: the weights changed")
    return done, dict(weights=bundle.info.files[MODEL], manifest=m.hash, gate=about, eight_views=views)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("bundle", type=Path, nargs="?", help="folder of a bundle; default the one that ships")
    ap.add_argument("--data", type=Path, help="folder of the pictures; default ham10000/ of the real data")
    ap.add_argument("--manifest", type=Path, default=RESULTS / "ham10000_roles.csv", help="roles of the pictures")
    ap.add_argument("--kind", choices=SCORES, default="mahalanobis", help="score of the gate")
    ap.add_argument("--rank", type=int, default=RANK, help="directions that the gate keeps")
    ap.add_argument("--out", type=Path, help="file for the figures; default results/ham10000_gate.json for the shipped")
    a = ap.parse_args()
    found = real_data()
    if a.data is None and found is None:
        raise SystemExit("no real pictures found: set SKIN_GRADCAM_DATA, or name a folder with --data")
    bundle = load_bundle(a.bundle, classes=None) if a.bundle else default_bundle()
    done, figures = add(bundle, Manifest.load(a.manifest, a.data or found / "ham10000"), a.kind, a.rank)
    out = a.out or (None if a.bundle else RESULTS / "ham10000_gate.json")
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    v = figures["eight_views"]["views"]
    print(f"{done.folder.name}: {GATE} of {figures['gate']['nbytes'] / 1e3:.0f} kB; the bundle is now {done.hash[:12]}")
    print("balanced accuracy of one view {:.3f}, of eight {:.3f}".format(
        *(v[k]["balanced_accuracy"]["value"] for k in ("one", "eight"))))


if __name__ == "__main__":
    main()
