"""Put into a bundle what it takes to refuse strangers and to average eight views; by default into the one that ships.

    python tools/add_gate.py                                                  # skin_gradcam/assets/default
    python tools/add_gate.py RUN/bundle --data FOLDER --manifest ROLES.csv    # any other

The gate (`gate.safetensors`) is fitted on the features of the role `train`; above its limit are at most 5 % of the
roles `valid` and `calibration`. Temperature and threshold of eight views (`eight_views` in bundle.json) are fitted on
these two roles too; the role `test` takes no part. Run it after add_onnx.py; it takes about a minute. The weights keep
their bytes, the bundle's own hash changes, and with it what names it: run `nbdev-test` and
`python benchmarks/resize_parity.py` afterwards. For the bundle that ships the figures go to results/ham10000_gate.json.
"""
from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from add_onnx import card_with
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
HELD = ("valid", "calibration")
REFUSED, COVERAGE, BATCH = 0.05, 0.9, 16


class Answers(NamedTuple):
    "Of the pictures of some roles"

    y: np.ndarray  # [N]
    lesion: np.ndarray  # [N]
    role: np.ndarray  # [N]
    features: np.ndarray  # [N,K]
    logits: np.ndarray  # [N,C]
    eight: np.ndarray  # [N,C], the mean of eight views


def answers(e: Explainer, m: Manifest, roles: tuple[str, ...], eight: bool) -> Answers:
    "What the network says about the pictures of some roles"
    df = m.df[m.df.role.isin(roles)]

    def load(file: Any) -> Prepared:
        return prepare(file, Path(file).name, e.bundle, keep_side=0)

    rows, waiting = [], list[Prepared]()
    for i, ready in enumerate(ahead(load, m.paths(df), size=2 * BATCH), 1):
        waiting.append(ready)
        if len(waiting) == BATCH or i == len(df):
            x = np.stack([p.x for p in waiting])
            out = run_views(e.backend, x)
            if out.features is None:
                raise SystemExit(f"{e.bundle.name}: its model.onnx gives no features; export it again with add_onnx.py")
            rows.append((out.features, out.logits, run_views(e.backend, x, 8).logits if eight else out.logits))
            waiting.clear()
    y = np.array([CLASSES.index(c) for c in df.dx])
    return Answers(y, df.lesion_id.to_numpy(), df.role.to_numpy(), *(np.concatenate(v) for v in zip(*rows)))


def fitted_gate(kind: str, train: Answers, held: Answers, rank: int) -> tuple[Gate, dict[str, Any]]:
    "The gate, and how many real pictures the limit of one role refuses in the other"
    fitted = fit_gate(kind, train.features, train.logits, train.y, rank)
    gate = calibrate_gate(fitted, held.features, held.logits, REFUSED)
    if gate.nbytes > GATE_BYTES:
        raise SystemExit(f"the gate has {gate.nbytes} bytes, at most {GATE_BYTES} may ship: take a smaller --rank")
    crossed = {}
    for one, other in (HELD, HELD[::-1]):
        a, b = (Answers(*(v[held.role == r] for v in held)) for r in (one, other))
        limit = calibrate_gate(fitted, a.features, a.logits, REFUSED)
        crossed[other] = round(float(limit.refuses(b.features, b.logits).mean()), 4)
    return gate, dict(kind=kind, rank=rank, limit=gate.threshold, asked_refused=REFUSED, trained_on=len(train.y),
                      limit_from=len(held.y), refused=round(float(gate.refuses(held.features, held.logits).mean()), 4),
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


def add(bundle: Bundle, m: Manifest, kind: str = "mahalanobis", rank: int = 64) -> tuple[Bundle, dict[str, Any]]:
    "The bundle with gate and eight views, and the figures"
    e = Explainer(bundle, gate=False)
    train, held = answers(e, m, ("train",), eight=False), answers(e, m, HELD, eight=True)
    gate, about = fitted_gate(kind, train, held, rank)
    i = bundle.info
    fit, views = eight_views(held, i.temperature, i.thresholds["indeterminate"], i.recipe.get("coverage", COVERAGE))
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
    ap.add_argument("--rank", type=int, default=64, help="directions that the gate keeps")
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
