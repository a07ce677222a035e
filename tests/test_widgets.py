"The demos by value: what has no place on their pages, such as faults, other processes and saved notebooks"
from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skin_gradcam import widgets
from skin_gradcam.demo_logic import (
    MAP_METHODS,
    Answers,
    Features,
    PictureSession,
    ReviewNotes,
    at_risk,
    draw_features,
    map_targets,
    read_answers,
    synthetic_answers,
    threshold_figures,
)
from skin_gradcam.inference import Explainer
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom

DEMOS = dict(explain_a_picture='explain_demo', explore_a_run='run_demo', draw_the_evidence='evidence_demo',
             find_your_threshold='threshold_demo', label_review='review_demo')


@pytest.fixture(scope='module')
def explainer() -> Explainer: return Explainer.load()


# ---------------------------------------------------------------- explain a picture


def test_offered_methods_exist() -> None:
    from skin_gradcam.gradcam import METHODS
    assert set(MAP_METHODS) <= set(METHODS)


def test_no_torch_until_a_method_needs_it() -> None:
    "Importing the demos, and explaining by the closed form, loads no PyTorch"
    code = """
import sys
from skin_gradcam.widgets import evidence_demo, explain_demo
assert 'onnxruntime' not in sys.modules, 'work at import'
p = explain_demo().parts
p.ask.value = 'why mel rather than nv'
evidence_demo().parts.veil.value = 1.
assert not p.said.value and 'add up' in p.numbers.value
print('torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['False']


@pytest.mark.usefixtures('one_thread')
def test_every_method_and_question_gives_numbers(explainer: Explainer) -> None:
    "Whatever is chosen, positive + negative + bias + what is left over make the logit"
    s = PictureSession(explainer)
    e = s.open(draw_phantom('mel', 0).picture, 'drawn', drawn=True)
    for method in [m for m in MAP_METHODS if m not in ('finercam', 'ablationcam')]:
        for question, (this, that) in list(map_targets().items())[1:5:3]:
            row = s.view(question, method).row
            logit = e.logits[CLASSES.index(this)] - (e.logits[CLASSES.index(that)] if that else 0)
            assert sum(row[k] for k in ('positive', 'negative', 'bias', 'gap')) == pytest.approx(float(logit), abs=1e-4)
    assert s.view('melanoma (mel)', 'gradcam').adds_up
    with pytest.raises(ValueError, match='Finer-CAM contrasts a class with its neighbours by itself'):
        s.view('why mel rather than nv', 'finercam')


def hostile() -> dict[str, bytes]:
    good = io.BytesIO()
    draw_phantom('nv', 0).picture.save(good, 'JPEG')
    wide = io.BytesIO()
    Image.new('L', (60_000, 3)).save(wide, 'PNG')
    return dict(empty=b'', text=b'hello', cut=good.getvalue()[:400], wide=wide.getvalue(), zip=b'PK\3\4' + bytes(100),
                svg=b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')


@pytest.mark.parametrize('kind', hostile())
def test_a_bad_upload_leaves_a_message_and_the_demo_goes_on(explainer: Explainer, kind: str) -> None:
    p = widgets.explain_demo(explainer).parts
    before = p.shown.value
    p.upload.value = [dict(name=f'<b>{kind}', type='image/png', size=1, last_modified=datetime(2026, 1, 1),
                           content=memoryview(hostile()[kind]))]
    assert 'role="status"' in p.said.value and '<b>' not in p.said.value and 'Error' not in p.said.value
    assert p.shown.value == before
    p.pick.value = list(widgets.drawn_choices())[2]
    assert p.shown.value != before and not p.said.value


def test_the_gate_refuses_an_uploaded_photograph_of_something_else(explainer: Explainer) -> None:
    "An uploaded picture that is no dermoscopy gets no map; a drawn one is spared"
    if explainer.rules.gate is None: pytest.skip('the shipped bundle has no gate')
    s = PictureSession(explainer)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    answer = s.open(Image.fromarray(noise), 'noise')
    assert answer.decision == 'not_dermoscopic'
    with pytest.raises(ValueError, match='take a picture made with a dermatoscope'): s.view('melanoma (mel)')


# ---------------------------------------------------------------- draw the evidence


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 50), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_drawing_depends_on_its_features_only(seed: int, asymmetry: float, border: float, veil: float,
                                                ink: bool) -> None:
    "The same features give the same picture, whatever was drawn before; a sign stays inside the lesion"
    f = Features(seed, asymmetry, border, veil=veil, ink=ink)
    one = draw_features(f, 120, 90)
    draw_features(Features(seed + 1), 120, 90)
    assert (one.image == draw_features(f, 120, 90).image).all()
    assert not (one.evidence & ~one.lesion_mask).any()
    assert one.artefact.any() == ink


# ---------------------------------------------------------------- find your threshold


@settings(max_examples=30, deadline=None)
@given(st.floats(.01, .9), st.floats(.01, .6))
def test_threshold_figures_by_counting(threshold: float, prevalence: float) -> None:
    "Sensitivity and specificity counted one by one; predictive values by weighing each picture"
    a = synthetic_answers(90)
    risk, mel = at_risk(a, prevalence), a.y == 2
    called = risk >= threshold
    got = {k: v.value for k, v in threshold_figures(a, threshold, prevalence, n=2).items()}
    assert got['sensitivity'] == pytest.approx(sum(called[mel]) / 30)
    assert got['specificity'] == pytest.approx(sum(~called[~mel]) / 60)
    weight = np.where(mel, prevalence / 30, (1 - prevalence) / 60)
    if called.any(): assert got['ppv'] == pytest.approx((weight * (called & mel)).sum() / (weight * called).sum())
    if (~called).any(): assert got['npv'] == pytest.approx((weight * (~called & ~mel)).sum() / (weight * ~called).sum())


def test_made_up_answers_are_calibrated() -> None:
    "Among answers that say about 0.3 for melanoma, about 0.3 are"
    a = synthetic_answers(60_000)
    near = (a.p[:, 2] > .25) & (a.p[:, 2] < .35)
    assert (a.y[near] == 2).mean() == pytest.approx(a.p[near, 2].mean(), abs=.02)


@pytest.mark.parametrize('text, said', [('{', 'cannot be read'), ('[]', 'not the answers of a trial'),
                                        ('{"y": [0]}', 'not the answers of a trial')])
def test_broken_answers_are_named(tmp_path: Path, text: str, said: str) -> None:
    for k in range(2): (tmp_path / f'seed0-fold{k}.json').write_text(text)
    with pytest.raises(ValueError, match=said): read_answers(tmp_path)


# ---------------------------------------------------------------- label review


TWO = Answers(np.array(['a', 'b']), np.array([0, 1]), np.array([[.1, .1, .8], [.6, .2, .2]]), 'two made-up answers')


def test_two_sessions_lose_nothing(tmp_path: Path) -> None:
    "Both write to one table: what the other noted meanwhile stays"
    one, two = (ReviewNotes(tmp_path / 'notes.csv') for _ in range(2))
    one.add(TWO, 0, 'cannot tell', 'commas, "quotes"\nand lines')
    two.add(TWO, 1, 'label looks wrong', '=SUM(A1)')
    read = ReviewNotes(tmp_path / 'notes.csv')
    assert (read.of('a')['note'], read.of('b')['verdict']) == ('commas, "quotes" and lines', 'label looks wrong')


def test_a_note_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    "The message stands where the user looks, the picture stays, and what was written before is still there"
    (tmp_path / 'file').write_text('no folder')
    p = widgets.review_demo(TWO, file=tmp_path / 'notes.csv').parts
    p.verdict.value = 'cannot tell'
    p.state.notes.file = tmp_path / 'file' / 'notes.csv'
    p.save.click()
    assert 'role="status"' in p.said.value and 'written to' not in p.said.value
    assert p.state.at == 0 and p.verdict.value == 'cannot tell'


# ---------------------------------------------------------------- explore a run


@pytest.mark.data
def test_cases_of_the_study_open_with_maps(real_data: Path) -> None:
    "The study in the repository, with its photographs: a melanoma taken for a nevus, with two maps; never saved"
    p = widgets.run_demo().parts
    assert 'lite0' in p.board.value and '<svg' in p.curves.value
    p.state.buttons[2, 0].click()
    assert p.case.value.count('<img') == 3 and 'is labelled mel; the answer was nv' in p.case.value
    assert widgets.PRIVATE in p.case._dom_classes


def test_a_run_is_answered_by_its_bundle(tmp_path: Path, explainer: Explainer) -> None:
    "`read_run` on phantoms: the pictures of the role, with their truth"
    from skin_gradcam import checkpoints
    from skin_gradcam.data import draw_manifest, read_folder
    from skin_gradcam.demo_logic import read_run
    from skin_gradcam.phantoms import write_phantoms
    folder = write_phantoms(tmp_path / 'phantoms', per_class=15)
    manifest = draw_manifest(read_folder(folder)[0], folder, per_class=None)
    run = checkpoints.Run.create(tmp_path / 'run', dict(arch='none'), manifest)
    run.log_epoch(dict(log_loss=1.))
    view = read_run(tmp_path / 'run', folder, 'train', explainer)
    a = view.answers['run']
    truth = manifest.role('train').set_index('image_id').dx
    assert [CLASSES[k] for k in a.y] == truth[a.image_id].tolist() and set(view.pictures) == set(a.image_id)
    with pytest.raises(ValueError, match='none of its train pictures lies in'):
        read_run(tmp_path / 'run', tmp_path / 'elsewhere', 'train', explainer)


# ---------------------------------------------------------------- notebooks and places without a kernel


@pytest.mark.parametrize('name', DEMOS)
def test_saved_notebooks(name: str) -> None:
    "One call each; the saved output is plain HTML that says how to run it, without widget state or photographs"
    book = json.loads((ROOT / f'nbs/demos/{name}.ipynb').read_text(encoding='utf-8'))
    assert 'widgets' not in book['metadata']
    last = book['cells'][-1]
    assert ''.join(last['source']) == f'{DEMOS[name]}()'
    data = last['outputs'][0]['data']
    assert set(data) == {'text/html', 'text/plain'}
    page = ''.join(data['text/html'])
    assert f'voila nbs/demos/{name}.ipynb' in page and 'not a medical device' in page
    if name in ('explore_a_run', 'label_review'): assert '<img' not in page
    assert len(page) < 120_000 and not re.search(r'src="(?!data:)', page)


def test_every_demo_has_its_notebook() -> None:
    assert {f.stem for f in (ROOT / 'nbs/demos').glob('*.ipynb')} == set(DEMOS)


def test_stored_latency() -> None:
    "The network is the largest part of a step; the step kept its limit unless the machine was busy"
    d = json.loads((ROOT / 'results/widget_latency.json').read_text())
    assert d['parts_ms']['network'] == max(d['parts_ms'].values())
    assert d['step_ms'] <= d['limit_ms'] or d['load_before'] > d['cores'] / 2
