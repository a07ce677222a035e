"""The web page in Chromium: from the choice of a picture to the painted answer, and what the page weighs.

Two claims. (1) For a picture of 600x450 pixels the answer stands on the screen within 0.25 s at the median: from the
moment the browser hands the file to the page until the second frame after the answer with all its maps was put into
the page. The server is a process of its own on the same machine, behind waitress, with the shipped model; decoding,
network, maps, transport and painting are all in it. (2) The start page with everything it loads weighs less than 100
kB, before compression.

Real pictures are used where they are at hand (SKIN_GRADCAM_DATA), since the shipped model answers drawings without
maps; else drawings, with the gate left out. Each run also times the same pictures through `Explainer` alone.

    python benchmarks/web_page.py            # 60 pictures; writes results/web_page.json
    python benchmarks/web_page.py --quick    # 10 pictures, writes nothing unless --out is given
"""
from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from skin_gradcam.data import real_data
from skin_gradcam.inference import Explainer
from skin_gradcam.phantoms import draw_phantom

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS, LIMIT_BYTES = .25, 100_000
SERVER = """
import sys
from waitress import serve
from skin_gradcam.inference import Explainer
from skin_gradcam.webapp import Settings, create_app
explainer = Explainer.load(gate=sys.argv[2] == 'gate')
serve(create_app(explainer, Settings(rate_limit='')), host='127.0.0.1', port=int(sys.argv[1]), threads=4, _quiet=True)
"""
CLOCK = """
addEventListener('change', () => { window.times = {chosen: performance.now()} }, true)
new MutationObserver(() => {
  if (!window.times || window.times.answered || !document.querySelector('#answer .answer')) return
  window.times.inserted = performance.now()
  window.times.answered = -1
  requestAnimationFrame(() => requestAnimationFrame(() => { window.times.answered = performance.now() }))
}).observe(document.querySelector('#answer'), {childList: true})
"""


def pictures(n: int, explainer: Explainer) -> tuple[str, list[bytes]]:
    "Files of 600x450 pixels that are answered with maps"
    root = real_data()
    files = sorted((root / 'originals_600x450').rglob('*.jpg')) if root else []
    real = [f.read_bytes() for f in files if explainer(f).usable]
    if real: return 'photographs', [real[i % len(real)] for i in range(n)]
    drawn = []
    for i in range(n):
        buf = io.BytesIO()
        Image.fromarray(draw_phantom(('nv', 'bkl', 'mel')[i % 3], i, 600, 450).image).save(buf, 'JPEG', quality=90)
        drawn.append(buf.getvalue())
    return 'drawings', drawn


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_for(address: str, server: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try: return urlopen(address + '/readyz').close()
        except OSError: time.sleep(.1)
    raise SystemExit('the server did not start')


def measure(address: str, files: list[bytes]) -> dict:
    "Choose each picture in the page; times in seconds"
    chromium = (
        os.environ.get('CHROMIUM')
        or shutil.which('chromium')
        or shutil.which('chromium-browser')
        or shutil.which('google-chrome')
    )
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page(viewport=dict(width=1280, height=900))
        weights = {}
        page.on('response', lambda r: weights.__setitem__(r.url.removeprefix(address), len(r.body())))
        page.goto(address, wait_until='networkidle')
        start = dict(weights)
        painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null")
        page.evaluate(CLOCK)
        total, inserted = [], []
        for data in files:
            page.evaluate('document.querySelector("#answer").replaceChildren()')
            page.set_input_files('#picture', dict(name='a.jpg', mimeType='image/jpeg', buffer=data))
            for _ in range(400):
                times = page.evaluate('window.times || {}')
                if times.get('answered', -1) > 0: break
                time.sleep(.02)
            total.append((times['answered'] - times['chosen']) / 1000)
            inserted.append((times['inserted'] - times['chosen']) / 1000)
        panels = page.locator('.vw-panel').count()
        browser.close()
    return dict(total=total, inserted=inserted, weights=start, first_paint_ms=painted, panels=panels)


def spread(v: list[float]) -> dict[str, float]:
    return {f'p{q}': round(float(np.percentile(v, q)), 4) for q in (10, 50, 90, 99)}


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('--quick', action='store_true')
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    n, warm = (10, 3) if a.quick else (60, 5)
    explainer = Explainer.load()
    what, files = pictures(n + warm, explainer)
    port, gate = free_port(), 'gate' if what == 'photographs' else 'no gate'
    server = subprocess.Popen([sys.executable, '-c', SERVER, str(port), gate])
    try:
        wait_for(f'http://127.0.0.1:{port}', server)
        got = measure(f'http://127.0.0.1:{port}', files)
    finally:
        server.terminate()
        server.wait(10)
    alone = []
    for f in files[warm:]:
        start = time.perf_counter()
        explainer(f)
        alone.append(time.perf_counter() - start)
    total, weight = got['total'][warm:], sum(got['weights'].values())
    half = statistics.median(total)
    d = dict(
        what='the web page in Chromium',
        pictures=f'{n} {what} of 600x450 pixels, JPEG',
        cores=os.cpu_count(),
        load_before=round(os.getloadavg()[1], 1),
        machine=f'{platform.machine()}, Python {platform.python_version()}',
        limits=dict(median_seconds=LIMIT_SECONDS, page_bytes=LIMIT_BYTES),
        passed=half < LIMIT_SECONDS and weight < LIMIT_BYTES,
        chosen_to_painted_seconds=spread(total),
        chosen_to_inserted_seconds=spread(got['inserted'][warm:]),
        explainer_alone_seconds=spread(alone),
        times_the_explainer=round(half / statistics.median(alone), 1),
        maps_and_picture_on_the_page=got['panels'],
        page_bytes=weight,
        page_files=got['weights'],
    )
    print(json.dumps(d, indent=1))
    out = a.out or (None if a.quick else ROOT / 'results/web_page.json')
    if out: out.write_text(json.dumps(d, indent=1) + '\n')
    return int(not d['passed'])


if __name__ == '__main__': sys.exit(main())
