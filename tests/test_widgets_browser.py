"The demos in a real JupyterLab and under Voila, operated with mouse and keyboard"
from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from playwright.sync_api import TimeoutError

from skin_gradcam.phantoms import draw_phantom

pytestmark = pytest.mark.browser
PROMPT = "(document.querySelector('.jp-CodeCell .jp-InputPrompt') || {}).textContent"
WAIT = 90_000  # milliseconds; a kernel starts slowly where the machine is busy

CASES = """
from pathlib import Path
import numpy as np, pandas as pd
from skin_gradcam.demo_logic import Answers, RunView
from skin_gradcam.phantoms import draw_phantom
files = {}
for k, dx in enumerate(('nv', 'bkl', 'mel')):
    files[f'phantom-{k}'] = Path(f'{k}.jpg'); draw_phantom(dx, 3).picture.save(files[f'phantom-{k}'])
p = np.array([[.1, .2, .7], [.2, .7, .1], [.6, .2, .2]])
answers = Answers(np.array(list(files)), np.arange(3), p, 'three drawn lesions')
curve = pd.DataFrame(dict(epoch=[0, 1], train_loss=[1., .7], balanced_accuracy=[.4, .6]))
view = RunView(pd.DataFrame([dict(trial='drawn')]), dict(drawn=[curve]), dict(drawn=answers), files)
"""


def code(source: str) -> dict:
    return dict(cell_type='code', id=f'c{abs(hash(source))}', metadata={}, execution_count=None, outputs=[],
                source=source)


def notebook(*sources: str) -> str:
    kernel = dict(display_name='Python 3', language='python', name='python3')
    return json.dumps(dict(cells=[code(s) for s in sources], metadata=dict(kernelspec=kernel), nbformat=4,
                           nbformat_minor=5))


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A notebook with three quick demos, one with the demos about cases, files to upload"
    here = tmp_path_factory.mktemp('demos')
    names = 'explain_demo evidence_demo threshold_demo'.split()
    (here / 'quick.ipynb').write_text(notebook(f"from skin_gradcam.widgets import {', '.join(names)}",
                                               *(f'{n}()' for n in names)))
    for name in ('cases', 'app'):
        calls = 'from skin_gradcam.widgets import run_demo, review_demo', 'run_demo(view)', f"""
import skin_gradcam.widgets as widgets
widgets._pictures_of = lambda manifest: files
review_demo(answers, file='{name}.csv')"""
        (here / f'{name}.ipynb').write_text(notebook(CASES, *calls))
    for name in ('draw_the_evidence', 'find_your_threshold'):
        (here / f'{name}.ipynb').write_bytes((ROOT / f'nbs/demos/{name}.ipynb').read_bytes())
    draw_phantom('nv', 1).picture.save(here / 'spot.png')
    (here / 'letter.png').write_text('no picture at all')
    return here


def serve(command: list[str], folder: Path, path: str) -> Iterator[str]:
    "A server on a free port in an environment of its own, until the end of the tests"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = {f'JUPYTER_{n}_DIR': str(folder / f'.jupyter/{n.lower()}') for n in ('CONFIG', 'DATA', 'RUNTIME')}
    own |= {f'JUPYTERLAB_{n}_DIR': str(folder / f'.jupyter/{n.lower()}') for n in ('SETTINGS', 'WORKSPACES')}
    env = {k: v for k, v in os.environ.items() if k != 'SKIN_GRADCAM_STATIC'} | own
    with open(folder / f'{command[0]}.log', 'wb') as log:
        server = subprocess.Popen([sys.executable, '-m', *command, f'--port={port}'], cwd=folder, env=env, stdout=log,
                                  stderr=log)
        try:
            address = f'http://127.0.0.1:{port}'
            for _ in range(600):
                assert server.poll() is None, Path(log.name).read_text()[-2000:]
                try:
                    urllib.request.urlopen(address + path, timeout=5).close()
                    break
                except (urllib.error.URLError, OSError): time.sleep(.2)
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope='module')
def lab(folder: Path) -> Iterator[str]:
    yield from serve(['jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--IdentityProvider.token=',
                      f'--ServerApp.root_dir={folder}'], folder, '/api')


@pytest.fixture(scope='module')
def voila(folder: Path) -> Iterator[str]:
    yield from serve(['voila', '--no-browser', '--Voila.ip=127.0.0.1', str(folder)], folder, '/')


def demo(page, title: str):
    "The demo with this title, once it is there"
    found = page.locator('.skin-gradcam-demo').filter(has=page.get_by_role('heading', name=title, exact=True))
    found.wait_for(timeout=WAIT)
    return found


def in_lab(page, address: str, name: str) -> None:
    "Open a notebook in JupyterLab and run all of it through the menu"
    page.goto(f'{address}/lab/tree/{name}.ipynb?reset')
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=WAIT)
    for _ in range(5):  # a click while the kernel connects is lost
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_text('Run All Cells', exact=True).first.click()
        try: return page.wait_for_function(f'/\\[[*1]\\]/.test({PROMPT})', timeout=5000)
        except TimeoutError: continue
    raise AssertionError('JupyterLab does not run the cells')


def upload(page, d, file: Path) -> None:
    "Choose a file as a person does"
    with page.expect_file_chooser(timeout=WAIT) as chooser: d.get_by_role('button', name='Upload a picture').click()
    chooser.value.set_files(file)


def press(page, d, label: str, key: str, times: int = 1) -> None:
    "Move a slider with the keyboard"
    handle = d.locator('.widget-slider', has_text=label).get_by_role('slider')
    handle.focus()
    for _ in range(times): page.keyboard.press(key)


def wait_text(page, d, pattern: str) -> str:
    "The text of the demo once it says what is awaited"
    until = time.monotonic() + WAIT / 1000
    while time.monotonic() < until:
        if re.search(pattern, text := d.inner_text()): return text
        page.wait_for_timeout(100)
    raise AssertionError(f'{pattern!r} did not come; the demo says {text!r}')


def new_picture(page, d, old: str) -> None:
    "Wait until another picture stands in the place of the first"
    other = '([e, s]) => e.querySelector("img").src != s'
    page.wait_for_function(other, arg=[d.element_handle(), old], timeout=WAIT)


def chance(text: str) -> float:
    "The probability of melanoma that a demo shows"
    return float(re.search(r'melanoma \(mel\)\s+(\d\.\d\d)', text)[1])


def evidence(page, d) -> None:
    "Move the veil by keyboard: the answer follows. Tick a box: the drawing changes"
    before = chance(wait_text(page, d, 'add up to the logit'))
    press(page, d, 'Blue-white veil', 'End')
    wait_text(page, d, r'Blue-white veil[^\n]*\s+1\.00')
    until = time.monotonic() + WAIT / 1000
    while chance(d.inner_text()) <= before + .1:
        assert time.monotonic() < until, d.inner_text()
        page.wait_for_timeout(100)
    picture = d.locator('img').first.get_attribute('src')
    d.get_by_label('Ink').check()
    new_picture(page, d, picture)


def threshold(page, d) -> None:
    "A higher threshold finds less"
    def sensitivity(text: str) -> float: return float(re.search(r'sensitivity\s+(\d\.\d+)', text)[1])
    before = sensitivity(wait_text(page, d, r'Of 1,000 such lesions 50 are melanoma'))
    press(page, d, 'Act from a risk of', 'ArrowRight', 3)
    wait_text(page, d, r'13%')
    gone = '([e, s]) => !e.innerText.includes(s)'
    page.wait_for_function(gone, arg=[d.element_handle(), f'{before:.3f}'], timeout=WAIT)
    assert sensitivity(d.inner_text()) < before
    press(page, d, 'Prevalence of melanoma', 'ArrowRight', 5)
    wait_text(page, d, r'Of 1,000 such lesions 100 are melanoma')
    assert d.locator('svg[aria-label^="Net benefit"]').count() == 1


def explain(page, d, folder: Path) -> None:
    "Ask another question, another method; upload a picture, then something that is none"
    wait_text(page, d, 'add up to the logit')
    d.get_by_label('What speaks for').select_option('why mel rather than nv')
    wait_text(page, d, 'mel rather than nv\n')
    d.get_by_label('Method').select_option('Eigen-CAM')
    wait_text(page, d, 'does not add up')
    layer = d.get_by_label('Layer')
    layer.select_option(layer.locator('option', has_text='14 x 14').inner_text())
    d.get_by_label('Method').select_option('closed form')
    wait_text(page, d, 'The cells and the bias add up')
    old = d.locator('img').first.get_attribute('src')
    upload(page, d, folder / 'letter.png')
    wait_text(page, d, 'letter.png: ')
    assert d.locator('img').first.get_attribute('src') == old
    upload(page, d, folder / 'spot.png')
    wait_text(page, d, r'spot\.png is open|look like the pictures')
    new_picture(page, d, old)


def test_lab_quick(page, lab: str, folder: Path) -> None:
    said = []
    page.on('pageerror', lambda e: said.append(str(e)))
    in_lab(page, lab, 'quick')
    explain(page, demo(page, 'Explain a picture'), folder)
    evidence(page, demo(page, 'Draw the evidence'))
    threshold(page, demo(page, 'Find your threshold'))
    for d in page.locator('.skin-gradcam-demo').all():
        unnamed = d.locator('img:not([alt])').count()
        assert unnamed == 0 and d.evaluate('e => e.scrollWidth <= e.clientWidth + 1')
    assert not said


def cases(page, file: Path) -> None:
    "A cell of the matrix opens its case with maps; a note is on the disk as soon as it is saved"
    d = demo(page, 'Explore a run')
    d.locator('button[title^="is mel, said nv"]').press('Enter')
    wait_text(page, d, 'phantom-2 is labelled mel; the answer was nv with 0.60')
    assert d.locator('figure img').count() == 3
    d.locator('button[title^="is nv, said bkl"]').click()
    wait_text(page, d, 'No picture is nv')
    d = demo(page, 'Label review')
    wait_text(page, d, 'phantom-0 is labelled nv; the answer was mel')
    d.get_by_role('button', name='Save and go on').click()
    wait_text(page, d, 'choose what you see first')
    d.get_by_label('label looks wrong').check()
    d.get_by_label('Note').fill('a veil, I think')
    d.get_by_label('Note').press('Tab')
    d.get_by_role('button', name='Save and go on').click()
    wait_text(page, d, rf'phantom-0: label looks wrong, written to {file.name}')
    rows = list(csv.DictReader(open(file, encoding='utf-8')))
    kept = [(r['image_id'], r['verdict'], r['note']) for r in rows]
    assert kept == [('phantom-0', 'label looks wrong', 'a veil, I think')]
    with page.expect_download(timeout=WAIT) as got: d.get_by_text('Download the notes').click()
    assert Path(got.value.path()).read_text() == file.read_text()


def test_lab_cases(page, lab: str, folder: Path) -> None:
    in_lab(page, lab, 'cases')
    cases(page, folder / 'cases.csv')


def test_voila_cases_and_a_picture(page, voila: str, folder: Path) -> None:
    "The demos about a run, about labels and about a picture of one's own, as apps"
    page.goto(f'{voila}/voila/render/app.ipynb', timeout=WAIT)
    cases(page, folder / 'app.csv')
    page.goto(f'{voila}/voila/render/quick.ipynb', timeout=WAIT)
    explain(page, demo(page, 'Explain a picture'), folder)


@pytest.mark.parametrize('name, title, operate', [('draw_the_evidence', 'Draw the evidence', evidence),
                                                  ('find_your_threshold', 'Find your threshold', threshold)])
def test_voila(page, voila: str, name: str, title: str, operate) -> None:
    "The notebooks as they are in the repository, as apps: no code is shown, and the page fits a phone"
    page.set_viewport_size(dict(width=390, height=844))
    page.goto(f'{voila}/voila/render/{name}.ipynb', timeout=WAIT)
    operate(page, demo(page, title))
    assert 'import' not in page.locator('body').inner_text()
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
