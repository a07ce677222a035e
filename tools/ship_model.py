"""Make a trained run the model that ships: bundle and card go to skin_gradcam/assets/default, the figures to results/.

    skin-gradcam train --data ../shared/data/ham10000 --manifest results/ham10000_roles.csv --extend 800 \\
        --recipe results/ham10000_recipe.json --out runs/ham10000
    skin-gradcam evaluate --bundle runs/ham10000/bundle --data ../shared/data/ham10000 \\
        --manifest results/ham10000_roles.csv --role test --out results/ham10000_test.json
    python tools/ship_model.py runs/ham10000

Of several runs, each of which went on where the one before it ended, the last one ships. The weights are not measured
again; the figures of the test role are read from results/ham10000_test.json, written once a release. The tool refuses a
bundle over 10 MB and one that saw a lesion of the test role.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd

from skin_gradcam.bundle import Bundle, load_bundle, write_bundle
from skin_gradcam.checkpoints import Run
from skin_gradcam.data import Manifest
from skin_gradcam.reports import model_card

ROOT = Path(__file__).parents[1]
RESULTS, ASSETS = ROOT / "results", ROOT / "skin_gradcam" / "assets" / "default"
LIMIT = 10_000_000  # bytes of everything in the bundle
NAME = "ham10000-lite0"
FIGURES = {"balanced_accuracy", "macro_auroc", "recall_nv", "recall_bkl", "recall_mel", "auroc_mel", "ece", "brier"}


def histories(runs: list[Run]) -> pd.DataFrame:
    "One history of runs that followed each other, with the column `stage`"
    table = pd.concat([r.history.assign(stage=i) for i, r in enumerate(runs, 1)], ignore_index=True)
    return table.assign(epoch=range(len(table)))


def card(draft: Bundle) -> str:
    "The model card without the hash of the bundle that it is to become part of, and with the check of resize parity"
    parity = json.loads((RESULTS / "resize_parity.json").read_text())
    limit = (
        "- Its training pictures are JPEG copies of one quality and size. Given the untouched original of such a copy, "
        f"it made the same decision in {parity['same_decision']} of {parity['n']} cases; the median change of a "
        f"probability was {parity['median_change']:.2f}.\n"
    )
    text = model_card(draft).replace(f"| bundle | `{draft.hash}` |\n", "")
    before, after = text.split("\n## Files")
    return f"{before.rstrip()}\n{limit}\n## Files{after}"


def ship(runs: list[Run], test: dict) -> None:
    "Write the shipped bundle and the figures of its run"
    run = runs[-1]
    bundle = load_bundle(run.bundle_path)
    held = set(Manifest.load(RESULTS / "ham10000_roles.csv", ".").role("test").lesion_id)
    if seen := held & {i for ids in bundle.info.seen_lesions.values() for i in ids}:
        raise SystemExit(f"{run.folder}: saw {len(seen)} lesions of the test role, such as {min(seen)}; it cannot ship")
    figures = {k: v for k, v in test.items() if k in FIGURES | {"n", "n_lesions", "n_boot"}}
    info = replace(bundle.info, name=NAME, metrics=bundle.info.metrics | {"test": figures})
    draft = write_bundle(ASSETS, bundle.tensors(), info)
    shipped = write_bundle(ASSETS, bundle.tensors(), info, {"MODEL_CARD.md": card(draft).encode()})
    size = sum(f.stat().st_size for f in shipped.folder.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{size} bytes: more than {LIMIT}")
    histories(runs).to_csv(RESULTS / "ham10000_history.csv", index=False)
    (RESULTS / "ham10000_metrics.json").write_text(json.dumps(run.metrics, indent=1) + "\n")
    print(f"{shipped.folder.relative_to(ROOT)}: {size / 1e6:.1f} MB, {shipped.hash[:12]}")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, nargs="+", help="finished run folders in their order")
    args = ap.parse_args()
    ship([Run.open(r) for r in args.run], json.loads((RESULTS / "ham10000_test.json").read_text()))
