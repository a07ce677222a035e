"The main job as a user runs it: `skin-gradcam demo` in a process of its own, and the marks it must reach"
import json
import os
import subprocess
import sys

import pandas as pd
import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    # proxies that lead nowhere: whatever wanted the network would fail
    env = os.environ | dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    env["SKIN_GRADCAM_DATA"] = str(out / "nowhere")
    code = "from skin_gradcam.cli import main; main()"
    cmd = [sys.executable, "-c", code, "demo", "--out", "demo"]
    done = subprocess.run(cmd, cwd=out, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "demo", done.stdout


def test_marks(demo):
    "Held-out phantoms: balanced accuracy at least 0.95, maximum of the map in the known evidence in at least 0.9"
    figures = json.loads((demo[0] / "demo.json").read_text())
    assert figures["n"] >= 90
    assert figures["balanced_accuracy"]["value"] >= 0.95
    assert figures["pointing_game"] >= 0.9


def test_files(demo):
    "Every held-out picture has its row, its maps, and the page names no outside resource"
    out, said = demo
    table = pd.read_csv(out / "predictions.csv")
    assert list(table.columns[:5]) == ["image", "decision", "p_nv", "p_bkl", "p_mel"]
    assert len(table) == json.loads((out / "demo.json").read_text())["n"]
    assert table[["p_nv", "p_bkl", "p_mel"]].sum(axis=1).sub(1).abs().max() < 1e-4
    page = (out / "report.html").read_text()
    assert "not a medical device" in page
    assert 'src="http' not in page and 'href="http' not in page.replace('href="https://doi.org', "")
    assert "report.html" in said
