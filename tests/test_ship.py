"""The model that ships: taken from candidates without a look at the role `test`, its card made of stored figures."""
from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script

from skin_gradcam.assessment import Assessment
from skin_gradcam.bundle import MODEL, ONNX, add_files, default_bundle, load_bundle
from skin_gradcam.data import Manifest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
SHIP, COMPARE = load_script("tools/ship_model.py"), load_script("tools/compare_bundles.py")


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(default_bundle().folder, tmp_path / "default"))


# ---------------------------------------------------------------- the choice

def test_the_one_that_ships_is_one_of_the_candidates():
    "The stored comparison names its weights, was made on the roles of the study, and its rows give its means"
    told, mine = result("ham10000_candidates.json"), default_bundle().info
    assert told["n"] == 330 and told["roles"] == ["valid", "calibration"]
    assert told["manifest"] == Manifest.load(RESULTS / "ham10000_roles.csv", ".").hash
    found = [b for b in told["bundles"].values() if b["weights"] == mine.files[MODEL]]
    assert len(found) == 1 and found[0]["lesions"] == len(mine.seen_lesions["train"])
    for b in told["bundles"].values():
        assert b["recipe"]["arch"] == b["arch"]  # each can be trained again
        assert set(b["rows"]) == {"clean", "sharper", "square", *COMPARE.CORRUPTIONS}
        for k, v in b["mean"].items():
            assert v == pytest.approx(np.mean([r[k] for c, r in b["rows"].items() if c != "clean"]), abs=2e-5)
        clean = b["clean"]["balanced_accuracy"]
        assert clean["low"] < clean["value"] < clean["high"] and clean["value"] == pytest.approx(
            b["rows"]["clean"]["balanced_accuracy"], abs=1e-5)


def test_what_candidates_are_shown():
    "Every change changes the picture and keeps its size; the square is what is left of a 4:3 frame"
    a = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    a[:, :8] = 0
    shown = dict(COMPARE.versions([a]))
    assert np.array_equal(shown.pop("clean")[0], a)
    for name, (b,) in shown.items():
        assert b.shape == a.shape and not np.array_equal(a, b), name
    assert COMPARE.square(a)[:, :4].mean() > 60  # the black rim is outside


def test_candidates_need_the_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(COMPARE, "real_data", lambda: None)
    assert COMPARE.main([str(tmp_path), "--out", str(tmp_path / "o.json")]) == 2
    assert "SKIN_GRADCAM_DATA" in capsys.readouterr().err and not (tmp_path / "o.json").exists()


@pytest.mark.data
def test_a_candidate_that_trained_on_these_lesions_is_refused(copy, tmp_path, capsys):
    info = load_bundle(copy).info
    mine = dict(info.seen_lesions)
    moved = mine["valid"][0]
    seen = dict(mine, train=[*mine["train"], moved], valid=mine["valid"][1:])
    add_files(load_bundle(copy), {}, seen_lesions=seen)
    assert COMPARE.main([str(copy), "--out", str(tmp_path / "o.json")]) == 2
    assert f"was trained on 1 of these lesions, such as {moved}" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


# ---------------------------------------------------------------- what may ship

def test_what_may_not_ship(copy, monkeypatch):
    "A lesion of the role test, an architecture without a name, a network that is too large"
    good = load_bundle(copy)
    SHIP.check(good)
    held = Manifest.load(RESULTS / "ham10000_roles.csv", ".").role("test").lesion_id.iloc[0]
    seen = dict(good.info.seen_lesions, train=[*good.info.seen_lesions["train"], held])
    with pytest.raises(SystemExit, match=f"saw 1 lesions of the role test, as {held}"):
        SHIP.check(replace(good, info=replace(good.info, seen_lesions=seen)))
    with pytest.raises(SystemExit, match="resnet18 has no name"):
        SHIP.check(replace(good, info=replace(good.info, arch="resnet18")))
    size = max(len(good.read(f)) for f in (MODEL, ONNX))
    monkeypatch.setattr(SHIP, "LIMIT", size - 1)
    with pytest.raises(SystemExit, match=f"{size} bytes, more than {size - 1}"):
        SHIP.check(good)


# ---------------------------------------------------------------- the card

def test_the_card_is_what_the_stored_figures_give():
    "Every figure of the shipped card, written once more from results/; the leaderboard may have grown since"
    bundle = default_bundle()
    new = SHIP.card_text(bundle, Assessment.load(RESULTS / "ham10000_assessment.json"), result("ham10000_study.json"),
                         result("resize_parity.json"))
    old = bundle.read(SHIP.CARD).decode()
    parts = [re.split(r"(?m)^## (?=How it was chosen|How to get it again)", t) for t in (old, new)]
    assert [len(p) for p in parts] == [3, 3]
    assert parts[0][0] == parts[1][0] and parts[0][2] == parts[1][2]
    for word in ("In whom the figures hold", "What can be had without the lesion", "Limits", "not a medical device",
                 "decisions", "CC BY-NC 4.0"):
        assert word.lower() in old.lower(), word


def test_the_assessment_is_of_the_shipped_model():
    a, mine, test = result("ham10000_assessment.json"), default_bundle().info, result("ham10000_test.json")
    assert a["bundle"]["weights"] == mine.files[MODEL] and a["bundle"]["temperature"] == mine.temperature
    assert a["data"]["role"] == "test" and a["evaluation"]["n"] == 330
    assert a["evaluation"]["macro_auroc"]["value"] == pytest.approx(test["macro_auroc"]["value"], abs=1e-9)
    floors = {o["shown"] for o in a["floors"]["masks"]["rows"]}
    assert len(floors) >= 2 and a["floors"]["people"]["balanced_accuracy"]["high"] < \
        a["evaluation"]["balanced_accuracy"]["low"]


def test_figures_of_another_model_leave_the_shipped_one_alone(copy, monkeypatch, tmp_path):
    assessment = Assessment.load(RESULTS / "ham10000_assessment.json")
    for f in ("ham10000_test.json", "resize_parity.json", "ham10000_study.json"):
        shutil.copy(RESULTS / f, tmp_path)
    monkeypatch.setattr(SHIP, "RESULTS", tmp_path)
    before = load_bundle(copy).hash
    for name, change, said in (("ham10000_test.json", dict(balanced_accuracy=dict(value=.5)), "differ"),
                               ("resize_parity.json", dict(bundle="other (x)"), "is of other")):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(json.dumps(json.loads(kept) | change))
        with pytest.raises(SystemExit, match=said):
            SHIP.write_card(assessment, copy)
        (tmp_path / name).write_text(kept)
        assert load_bundle(copy).hash == before and not (tmp_path / "ham10000_assessment.json").exists()
    SHIP.write_card(assessment, copy)
    assert Assessment.load(tmp_path / "ham10000_assessment.json") == assessment
    assert load_bundle(copy).read(MODEL) == default_bundle().read(MODEL)
