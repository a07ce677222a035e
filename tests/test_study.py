"""The committed study agrees with itself, with the shipped model, and, where the pictures are here, with reality.

The role `test` is not measured again: its figures are looked at once a release. What is checked on real pictures is
resize parity, the contract of `skin-gradcam explain`, and one figure of the validation role.
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import load_script

from skin_gradcam.bundle import default_bundle
from skin_gradcam.cli import evaluate_bundle
from skin_gradcam.data import Manifest
from skin_gradcam.lesions import CLASSES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


@pytest.fixture(scope="module")
def roles() -> Manifest:
    return Manifest.load(RESULTS / "ham10000_roles.csv", ".")


def test_roles(roles):
    "550 lesions a class in the shares of the design, one picture each, five folds over what is not test"
    counts = {r: dict(g.dx.value_counts()) for r, g in roles.df.groupby("role")}
    want = dict(train=330, valid=55, calibration=55, test=110)
    assert counts == {r: dict.fromkeys(CLASSES, n) for r, n in want.items()}
    assert roles.df.lesion_id.is_unique and roles.df.sha256.is_unique
    folds = roles.df[roles.df.role != "test"].groupby(["fold", "dx"]).size()
    assert set(folds) == {88} and len(folds) == 15


def test_shipped_bundle(roles):
    "Half precision, either form of the network at most 10 MB, licence, card, no lesion of another role trained on"
    bundle = default_bundle()
    sizes = {f.name: f.stat().st_size for f in bundle.folder.iterdir()}
    assert sizes['model.safetensors'] <= 10_000_000 and sizes['model.onnx'] <= 10_000_000
    assert sum(sizes.values()) <= 15_000_000
    assert bundle.info.dtype == "float16" and bundle.info.licence == "CC BY-NC 4.0"
    assert "Tschandl" in bundle.info.attribution
    card = bundle.read("MODEL_CARD.md").decode()
    assert "CC BY-NC 4.0" in card and "not a medical device" in card.lower()
    seen = {k: set(v) for k, v in bundle.info.seen_lesions.items()}
    for role in ("valid", "calibration"):
        assert seen[role] == set(roles.role(role).lesion_id)
    assert seen["train"] >= set(roles.role("train").lesion_id)
    held = set(roles.df[roles.df.role != "train"].lesion_id)
    assert not seen["train"] & held


def test_figures_are_of_the_shipped_model():
    "The figures in the bundle are those in results/, and the history ends where the run says"
    metrics = default_bundle().info.metrics
    test, run = result("ham10000_test.json"), result("ham10000_metrics.json")
    assert metrics["test"]["balanced_accuracy"]["value"] == test["balanced_accuracy"]["value"]
    assert metrics["valid"]["macro_auroc"]["value"] == run["valid"]["macro_auroc"]["value"]
    assert test["n"] == test["n_lesions"] == 330 and sum(test["dropped"].values()) == 0
    assert sum(map(sum, test["confusion"])) == 330
    right = [row[i] for i, row in enumerate(test["confusion"])]
    assert abs(np.mean(right) / 110 - test["balanced_accuracy"]["value"]) < 1e-9
    history = pd.read_csv(RESULTS / "ham10000_history.csv")
    recipe = default_bundle().info.recipe
    assert recipe == result("ham10000_recipe.json")
    stages = [result("ham10000_recipe_base.json"), recipe]
    assert history.groupby("stage").size().tolist() == [r["epochs"] + r["freeze_epochs"] for r in stages]


@pytest.mark.data
def test_valid_role_again(real_data):
    "The validation figures come out again from the shipped bundle and the pictures"
    df = Manifest.load(RESULTS / "ham10000_roles.csv", real_data / "ham10000").role("valid")
    from skin_gradcam.inference import Explainer

    ex = Explainer.load()
    answers = list(ex.explain_many([real_data / "ham10000" / p for p in df.path], keep_side=0))
    y = np.array([CLASSES.index(c) for c in df.dx])
    top = np.array([CLASSES.index(a.top) for a in answers])
    again = np.mean([(top[y == c] == c).mean() for c in range(3)])
    assert abs(again - result("ham10000_metrics.json")["valid"]["balanced_accuracy"]["value"]) < 0.013  # two pictures
    gap = max(np.abs(a.maps.sum((1, 2)) + a.bias - a.logits).max() for a in answers)
    assert gap < 1e-4


@pytest.mark.data
def test_evaluate_drops_what_was_seen(real_data, tmp_path):
    "On the roles that the bundle saw nothing is left, and the error says so"
    manifest = Manifest.load(RESULTS / "ham10000_roles.csv", real_data / "ham10000")
    with pytest.raises(ValueError, match="has seen"):
        evaluate_bundle(None, manifest.root, RESULTS / "ham10000_roles.csv", "calibration")


@pytest.mark.data
def test_resize_parity(real_data):
    "36 originals and their squashed copies: the same decision in at least 34, median change at most 0.1"
    from skin_gradcam.inference import Explainer

    found = load_script("benchmarks/resize_parity.py").parity(Explainer.load(), real_data)
    assert found["n"] == 36
    assert found["same_decision"] >= 34 and found["median_change"] <= 0.1


@pytest.mark.data
def test_explain_originals(real_data, tmp_path):
    "`skin-gradcam explain` works out of the box on untouched originals, with the files and columns of the contract"
    out = tmp_path / "out"
    cmd = [sys.executable, "-m", "skin_gradcam.cli", "explain", str(real_data / "originals_600x450"), "--out", str(out)]
    done = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(out / "predictions.csv")
    assert list(rows.columns[:5]) == ["image", "decision", "p_nv", "p_bkl", "p_mel"]
    photos = rows[~rows.image.str.contains("segmentation")]
    assert len(photos) == 36
    assert np.allclose(photos[["p_nv", "p_bkl", "p_mel"]].sum(axis=1), 1, atol=1e-4)
    usable = ~rows.decision.isin(["not_dermoscopic", "unreadable"])  # the others have a row with the reason, no overlay
    assert usable.sum() >= 34 and len(list((out / "overlays").iterdir())) == usable.sum()
    assert (out / "report.html").stat().st_size > 10_000
    with np.load(out / "maps.npz") as maps:
        assert set(maps.files) == set(rows.image)
        assert maps[photos.image.iloc[0]].shape[0] == 3


def test_study_is_what_the_answers_give():
    "`results/ham10000_study.json`, calculated once more from the committed answers of each fold"
    study, stored = load_script("tools/study.py"), result("ham10000_study.json")
    told = study.study_figures(study.read_plan(study.PLAN), study.manifest("roles"), RESULTS / "trials")
    for key in ("manifest", "n", "missing", "chosen", "why"):
        assert told[key] == stored[key]
    for new, old in zip(told["board"], stored["board"], strict=True):
        assert new["trial"] == old["trial"]
        for k in ("balanced_accuracy", "macro_auroc", "ece"):
            assert new[k] == pytest.approx(old[k], abs=1e-9)


def test_robustness_of_the_trials():
    "Changed answers count at the temperature of the unchanged ones; the stored figures are of the trials' answers"
    from skin_gradcam.calibration import cross_fit_temperature
    from skin_gradcam.evaluation import balanced_accuracy

    study, tool = load_script("tools/study.py"), load_script("tools/robust_trials.py")
    stored, m = result("ham10000_robust.json"), study.manifest("roles")
    plan = {t.name: t for t in study.read_plan(study.PLAN)}
    assert stored["n"] == 1320 and stored["severity"] == tool.SEVERITY and len(stored["trials"]) >= 2
    for name, r in stored["trials"].items():
        o = tool.read_trial(tool.first_seed(plan[name]), m, RESULTS / "trials", views=1)
        assert set(r["rows"]) == {"clean", *tool.CORRUPTIONS}
        clean = balanced_accuracy(o.y, o.probabilities[0])
        assert r["rows"]["clean"]["balanced_accuracy"] == pytest.approx(clean, abs=2e-3)
        mean = np.mean([v["balanced_accuracy"] for k, v in r["rows"].items() if k != "clean"])
        assert mean == pytest.approx(r["mean"]["balanced_accuracy"], abs=1e-4)
        assert r["gain"]["low"] <= r["gain"]["value"] <= r["gain"]["high"]
        for floor in r["floors"].values():  # above chance: there is something to find beside the lesion, but not much
            assert 1 / 3 < floor["balanced_accuracy"]["value"] < r["rows"]["clean"]["balanced_accuracy"] - .1
    told = {c: o.logits[0] for c in ("clean", *tool.CORRUPTIONS, *tool.HIDDEN)} | dict(jpeg=o.logits[0][:, ::-1])
    told["background only"] = np.where(np.arange(len(o.y))[:, None] < 100, np.nan, o.logits[0])
    f = tool.figures(o, told)
    p = cross_fit_temperature(o.logits[0], o.y, o.fold)[0]
    assert f["rows"]["ink"] == f["rows"]["clean"]
    assert f["rows"]["clean"]["balanced_accuracy"] == pytest.approx(balanced_accuracy(o.y, p), abs=1e-5)
    assert f["floors"]["lesion occluded"]["n"] == 1320 and f["floors"]["background only"]["n"] == 1220
    assert f["floors"]["background only"]["balanced_accuracy"]["value"] == balanced_accuracy(o.y[100:], p[100:])
    lost = (balanced_accuracy(o.y, p[:, ::-1]) - balanced_accuracy(o.y, p)) / len(tool.CORRUPTIONS)
    assert f["gain"]["value"] == pytest.approx(lost) and lost < 0


def test_robustness_needs_the_networks(tmp_path, capsys, monkeypatch):
    "Without pictures, networks or a known name the tool says what to do, and writes nothing"
    tool, out = load_script("tools/robust_trials.py"), tmp_path / "r.json"
    assert tool.main(["lite9", "--out", str(out)]) == 2 and "no trial lite9 in the plan" in capsys.readouterr().err
    monkeypatch.setattr(tool, "real_data", lambda: tmp_path)
    assert tool.main(["lite0", "--work", str(tmp_path), "--out", str(out)]) == 2
    assert "its networks are not in" in capsys.readouterr().err
    monkeypatch.setattr(tool, "real_data", lambda: None)
    assert tool.main(["lite0", "--out", str(out)]) == 2 and "SKIN_GRADCAM_DATA" in capsys.readouterr().err
    assert not out.exists()
