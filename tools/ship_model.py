"""Make a trained run the model that ships: skin_gradcam/assets/default, with its figures in results/ and its card.

    skin-gradcam train --data ../shared/data/ham10000 --manifest results/ham10000_roles.csv --extend 7000 \\
        --recipe results/ham10000_recipe_base.json --out runs/mnv2_B
    skin-gradcam train --data ../shared/data/ham10000 --manifest results/ham10000_roles.csv --extend 7000 \\
        --recipe results/ham10000_recipe.json --out runs/mnv2_K1
    python tools/compare_bundles.py runs/mnv2_B/bundle runs/mnv2_K1/bundle  # and others: which of them should ship?
    python tools/ship_model.py runs/mnv2_B runs/mnv2_K1     # a few minutes
    python tools/abstention_study.py --only gate      # does its gate meet the marks?
    python benchmarks/resize_parity.py                # the last check before the test role is looked at
    skin-gradcam evaluate --data ../shared/data/ham10000 --manifest results/ham10000_roles.csv --role test \\
        --out results/ham10000_test.json
    skin-gradcam assess --data ../shared/data/ham10000 --manifest results/ham10000_roles.csv --role test \\
        --masks ../shared/data/ham10000/HAM10000_segmentations_lesion_tschandl --stress 60 --out runs/assessment
    python tools/ship_model.py --card runs/assessment # the card, of these figures and of the study
    python benchmarks/resize_parity.py                # its file names the bundle by the hash of everything in it

What ships is the bundle of the last run, or another that is named (`tools/mean_bundle.py`); of runs that followed each
other the history is kept whole. It gets its ONNX form, gate and eight views here. A run fits its temperature on the
role `calibration`; as its last epoch ships, `valid` chose no epoch, so both roles take part in the temperature and the
threshold that ship, as they are and mildly changed (another camera, light, size, compression). Larger pictures are
brought to size and saved as the training pictures were (`COPIES`), and the gate looks at the last two stages of the
network too. The tool refuses a network over 10 MB, one that saw a lesion of the test role, and figures of other
weights; whatever it refuses leaves the shipped model as it was.
"""
from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import add_gate
import add_onnx
import pandas as pd
from study import COPIES

from skin_gradcam.assessment import Assessment
from skin_gradcam.bundle import MODEL, ONNX, Bundle, BundleInfo, add_files, load_bundle, write_bundle
from skin_gradcam.checkpoints import Run
from skin_gradcam.data import Manifest, real_data
from skin_gradcam.evaluation import coverage_threshold, evaluate, fit_temperature, softmax
from skin_gradcam.inference import Explainer
from skin_gradcam.models import model_from_bundle
from skin_gradcam.reports import model_card
from skin_gradcam.steps import last_stages

ROOT = Path(__file__).resolve().parents[1]
RESULTS, ASSETS = ROOT / "results", ROOT / "skin_gradcam" / "assets" / "default"
LIMIT = 10_000_000  # bytes of either form of the network
GATE_LOOKS = 2  # stages of the network that the gate looks at beside the pooled maps
CARD = add_onnx.CARD
NAMES = dict(tf_efficientnet_lite0="ham10000-lite0", mobilenetv2_100="ham10000-mobilenetv2")
FIGURES = {"balanced_accuracy", "macro_auroc", "recall_nv", "recall_bkl", "recall_mel", "auroc_mel", "ece", "brier"}


def told(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def histories(runs: list[Run]) -> pd.DataFrame:
    "One history of runs that followed each other, with the column `stage`"
    table = pd.concat([r.history.assign(stage=i) for i, r in enumerate(runs, 1)], ignore_index=True)
    return table.assign(epoch=range(len(table)))


def check(bundle: Bundle) -> None:
    "Stop before anything is written, for a bundle that may not ship"
    held = set(Manifest.load(RESULTS / "ham10000_roles.csv", ".").role("test").lesion_id)
    if seen := held & {i for ids in bundle.info.seen_lesions.values() for i in ids}:
        raise SystemExit(f"{bundle.folder}: saw {len(seen)} lesions of the role test, as {min(seen)}: it cannot ship")
    if bundle.info.arch not in NAMES:
        raise SystemExit(f"{bundle.folder}: {bundle.info.arch} has no name to ship under; give it one in NAMES")
    for file in {MODEL, ONNX} & set(bundle.info.files):
        if (size := len(bundle.read(file))) > LIMIT:
            raise SystemExit(f"{bundle.folder / file}: {size} bytes, more than {LIMIT}; it cannot ship")


def recalibrated(bundle: Bundle, m: Manifest) -> BundleInfo:
    "Temperature and threshold of all 330 held lesions, and the figures of valid at them"
    held = add_gate.answers(Explainer(bundle, gate=False, backend="torch"), m, add_gate.HELD, eight=False)
    t = float(fit_temperature(held.logits, held.y))
    plain, valid = add_gate.of(held, *add_gate.HELD), add_gate.of(held, "valid")
    limit = float(coverage_threshold(softmax(plain.logits, t), bundle.info.recipe["coverage"]))
    figures = evaluate(valid.y, softmax(valid.logits, t), list(valid.lesion), classes=m.classes).to_dict()
    return replace(bundle.info, temperature=t, thresholds=dict(indeterminate=limit),
                   metrics=dict(valid=figures, temperature=t, indeterminate_below=limit))


def ship(bundle: Bundle, runs: list[Run], pictures: Path, draft: Path) -> None:
    "Complete a bundle in a folder of its own, then let it take the place of the shipped one"
    m = Manifest.load(RESULTS / "ham10000_roles.csv", pictures)
    check(bundle)
    info = recalibrated(bundle, m)
    looks_at = last_stages(model_from_bundle(bundle).body, GATE_LOOKS)
    write_bundle(draft, bundle.tensors(), replace(info, name=NAMES[info.arch], resize=COPIES, gate_stages=looks_at))
    add_onnx.add(load_bundle(draft))
    done, figures = add_gate.add(load_bundle(draft), m)
    check(done)
    extra = {n: done.read(n) for n in done.info.files if n != MODEL}
    shipped = write_bundle(ASSETS, done.tensors(), done.info, extra)
    (RESULTS / "ham10000_gate.json").write_text(json.dumps(figures, indent=1) + "\n")
    histories(runs).to_csv(RESULTS / "ham10000_history.csv", index=False)
    (RESULTS / "ham10000_metrics.json").write_text(json.dumps(done.info.metrics, indent=1) + "\n")
    sizes = ", ".join(f"{n} {len(shipped.read(n)) / 1e6:.1f} MB" for n in shipped.info.files)
    print(f"{shipped.folder.relative_to(ROOT)}: {sizes}; {shipped.hash[:12]}")


def card_text(bundle: Bundle, assessment: Assessment, study: dict, parity: dict) -> str:
    "The card without the hash of the bundle that it is part of, with the check of resize parity among the limits"
    limit = (
        "- Its training pictures are JPEG copies of one quality and size. Given the untouched original of such a copy, "
        f"it made the same decision in {parity['same_decision']} of {parity['n']} cases; the median change of a "
        f"probability was {parity['median_change']:.2f}.\n"
    )
    text = model_card(bundle, assessment, study).replace(f"| bundle | `{bundle.hash}` |\n", "")
    text = "".join(row for row in text.splitlines(keepends=True) if not row.startswith(f"| {CARD} |"))
    before, after = text.split("\n## Files")
    return f"{before.rstrip()}\n{limit}\n## Files{after}"


def write_card(assessment: Assessment, folder: Path = ASSETS) -> None:
    "Put the figures of the test role and the card into the shipped bundle; the assessment goes to results/"
    bundle, test, parity = load_bundle(folder), told("ham10000_test.json"), told("resize_parity.json")
    if not (name := parity["bundle"]).startswith(f"{bundle.info.name} ("):
        raise SystemExit(f"results/resize_parity.json: is of {name}, not of {bundle.info.name}; measure it again")
    if any(test[k]["value"] != assessment["evaluation"][k]["value"] for k in ("balanced_accuracy", "macro_auroc")):
        raise SystemExit("results/ham10000_test.json and the assessment differ: measure both again")
    figures = {k: v for k, v in test.items() if k in FIGURES | {"n", "n_lesions", "n_boot"}}
    bundle = replace(bundle, info=replace(bundle.info, metrics=bundle.info.metrics | {"test": figures}))
    text = card_text(bundle, assessment, told("ham10000_study.json"), parity)
    done = add_files(bundle, {CARD: text.encode()})
    assessment.save(RESULTS / "ham10000_assessment.json")
    print(f"{folder.name}: {CARD} of {len(text) / 1e3:.0f} kB; the bundle is now {done.hash[:12]}")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, nargs="*", help="finished run folders in their order")
    ap.add_argument("--bundle", type=Path, help="folder of the bundle that ships; default the one of the last run")
    ap.add_argument("--card", type=Path, metavar="FOLDER", help="of an assessment: write the card of what ships")
    args = ap.parse_args()
    if bool(args.card) == bool(args.run):
        ap.error("name the run that is to ship, or give --card")
    if args.card:
        write_card(Assessment.load(args.card / "assessment.json"))
    elif (found := real_data()) is None:
        raise SystemExit("no real pictures found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/")
    else:
        runs = [Run.open(r) for r in args.run]
        bundle = load_bundle(args.bundle or runs[-1].bundle_path)
        ship(bundle, runs, found / "ham10000", bundle.folder.parent / "shipped")


if __name__ == "__main__":
    main()
