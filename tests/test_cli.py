"The command line as a process: bad input ends with code 2 and one line, never with a traceback"
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from skin_gradcam.phantoms import draw_phantom, write_phantoms


def call(*args, cwd=None):
    "Exit code, standard output, standard error"
    cmd = [sys.executable, "-c", "from skin_gradcam.cli import main; main()", *map(str, args)]
    done = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", per_class=12, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, phantoms):
    "A run of one epoch through the command line"
    out = tmp_path_factory.mktemp("run")
    recipe = dict(arch="resnet18", pretrained=False, size=64, epochs=2, freeze_epochs=0, bs=6)
    (out / "recipe.json").write_text(json.dumps(recipe))
    args = ["--data", phantoms, "--out", out / "run", "--recipe", out / "recipe.json", "--per-class", 12, "--epochs", 1]
    code, said, err = call("train", *args, "--seed", 4)
    assert code == 0, err
    return out / "run"


def test_train_says_where_things_are(run):
    recipe = json.loads((run / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["seed"]) == (1, 4)
    assert (run / "bundle" / "bundle.json").exists() and (run / "report.html").exists()


def test_evaluate_leaves_out_what_was_seen(run, phantoms):
    code, out, err = call("evaluate", "--bundle", run / "bundle", "--data", phantoms)
    assert code == 0, err
    result = json.loads(out)
    table = pd.read_csv(run / "manifest.csv", comment="#")
    assert result["n"] == int((table.role == "test").sum())
    assert sum(result["dropped"].values()) == int((table.role != "test").sum())


def test_onnx_makes_a_bundle_that_can_be_served(run, tmp_path):
    "The bundle of a run has no model.onnx; with it the answers are the same, and the weights kept their bytes"
    import shutil

    from skin_gradcam.bundle import load_bundle
    from skin_gradcam.inference import Explainer
    from skin_gradcam.phantoms import draw_phantom
    from skin_gradcam.serving import make_explainer

    folder = tmp_path / "bundle"
    shutil.copytree(run / "bundle", folder)
    before = load_bundle(folder)
    with pytest.raises(ValueError, match="skin-gradcam onnx"):
        make_explainer(folder)
    code, said, err = call("onnx", folder)
    assert code == 0 and "checked against the weights" in said, err
    after = load_bundle(folder)
    assert after.info.files["model.safetensors"] == before.info.files["model.safetensors"] and after.has_onnx
    picture = draw_phantom("mel", seed=1).image
    a, b = Explainer.load(folder, backend="torch")(picture), make_explainer(folder)(picture)
    np.testing.assert_allclose(a.p, b.p, atol=2e-3)


def test_explain_mixed_folder(run, tmp_path):
    "A good picture, a truncated one, a text: three rows, two of them with a reason"
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(draw_phantom("nv", 0).image).save(folder / "good.png")
    Image.fromarray(draw_phantom("mel", 0).image).save(folder / "torn.jpg")
    (folder / "torn.jpg").write_bytes((folder / "torn.jpg").read_bytes()[:900])
    (folder / "text.jpg").write_text("no picture")
    code, out, err = call("explain", folder, "--bundle", run / "bundle", "--out", tmp_path / "out")
    assert code == 0, err
    rows = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("image")
    assert sorted(rows.index) == ["good.png", "text.jpg", "torn.jpg"]
    assert list(rows.decision[["text.jpg", "torn.jpg"]]) == ["unreadable"] * 2
    assert rows.reason.loc[["text.jpg", "torn.jpg"]].str.len().min() > 10
    assert abs(rows.loc["good.png", ["p_nv", "p_bkl", "p_mel"]].astype(float).sum() - 1) < 1e-4
    with np.load(tmp_path / "out" / "maps.npz") as maps:
        assert list(maps.files) == ["good.png"] and maps["good.png"].shape[0] == 3


@pytest.mark.parametrize(
    "args, says",
    [
        (["train"], "--data"),
        (["train", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["train", "--data", ".", "--out", "x"], "skin-gradcam:"),
        (["train", "--data", ".", "--out", "x", "--epochs", "0"], "epochs"),
        (["explain", "nowhere.jpg"], "nowhere.jpg"),
        (["explain", ".", "--overlays", "many"], "overlays"),
        (["evaluate", "--data", ".", "--role", "test"], "--manifest"),
        (["fly"], "fly"),
    ],
)
def test_one_line(args, says, tmp_path):
    code, _, err = call(*args, cwd=tmp_path)
    assert code == 2
    assert says in err and err.count("\n") == 1 and "Traceback" not in err


def test_nothing_readable_is_an_error(run, tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    code, _, err = call("explain", tmp_path / "a.jpg", "--bundle", run / "bundle", "--out", tmp_path / "out")
    assert code == 2 and "could be read" in err
    assert (tmp_path / "out" / "predictions.csv").exists()


def test_train_refuses_unknown_arch(phantoms, tmp_path):
    args = ["--data", phantoms, "--out", tmp_path / "r", "--arch", "resnet81", "--per-class", 12]
    code, _, err = call("train", *args)
    assert code == 2 and "resnet81" in err and "resnet18" in err
    assert not (tmp_path / "r").exists()


def test_train_keeps_an_older_run(run, phantoms):
    code, _, err = call("train", "--data", phantoms, "--out", run, "--per-class", 12)
    assert code == 2 and "overwrite" in err
    assert (run / "bundle" / "bundle.json").exists()


def test_assess_writes_json_and_page(run, phantoms, tmp_path):
    args = ["--data", phantoms, "--stress", "3", "--out", tmp_path / "a"]
    code, out, err = call("assess", "--bundle", run / "bundle", *args)
    assert code == 0, err
    told = json.loads((tmp_path / "a" / "assessment.json").read_text())
    table = pd.read_csv(run / "manifest.csv", comment="#")
    assert told["evaluation"]["n"] == int((table.role == "test").sum())
    assert "balanced accuracy" in out and (tmp_path / "a" / "assessment.html").stat().st_size > 10_000


def test_assess_bad_options(phantoms, tmp_path):
    code, _, err = call("assess", "--data", phantoms, "--role", "test")
    assert code == 2 and "--role needs --manifest" in err
    code, _, err = call("assess", "--data", phantoms, "--stress", "many", "--out", tmp_path / "a")
    assert code == 2 and "--stress 'many'" in err


def test_train_resumes(phantoms, tmp_path):
    "A finished run is opened; another recipe in its place is refused"
    recipe = dict(arch="resnet18", pretrained=False, size=48, epochs=1, freeze_epochs=0, bs=6)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    args = ["--data", phantoms, "--out", tmp_path / "run", "--recipe", tmp_path / "recipe.json", "--per-class", 12]
    assert call("train", *args, "--resume")[0] == 0
    code, out, err = call("train", *args, "--resume")
    assert code == 0 and "balanced accuracy" in out, err
    code, _, err = call("train", *args, "--resume", "--epochs", 2)
    assert code == 2 and "another epochs" in err and "Traceback" not in err
    code, out, _ = call("runs", "ls", tmp_path)
    assert code == 0 and "finished" in out
