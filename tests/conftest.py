"""Fixtures and marks of the tests that have no place on a page.

`data` tests need the real pictures, `browser` tests need Chromium, `peer` tests need the other libraries of the `dev`
extra. Each is skipped with a line that says what to install. With `--no-skips-allowed` (CI) a skip is a failure unless
the machine truly lacks the pictures or the browser, or the test states its condition in `@pytest.mark.skipif`.

`pytest -n 2` runs the files on two workers. A test that measures time is marked `alone`: the other worker waits.
"""
from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
LOCKS = pytest.StashKey[str]()
os.environ.setdefault('MPLBACKEND', 'Agg')


def find_data() -> Path | None:
    from skin_gradcam.data import real_data
    return real_data()


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get('CHROMIUM'), *BROWSERS]))), None)


@pytest.fixture(scope='session')
def real_data() -> Path:
    "The folder that holds `ham10000/`"
    found = find_data()
    if found is None: pytest.skip('real pictures not found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/')
    return found


@pytest.fixture(scope='session')
def chromium() -> str:
    "The path of a Chromium"
    found = find_chromium()
    if found is None: pytest.skip('no Chromium found: apt-get install chromium, or set CHROMIUM to its path')
    return found


@pytest.fixture(scope='session')
def browser(chromium: str) -> Iterator:
    "A headless Chromium, driven by Playwright"
    from playwright.sync_api import sync_playwright
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync']
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=quiet)
        yield b
        b.close()


@pytest.fixture
def page(browser) -> Iterator:
    "A fresh page, 1280 pixels wide"
    context = browser.new_context(viewport={'width': 1280, 'height': 900})
    yield context.new_page()
    context.close()


def load_script(file: str) -> ModuleType:
    "A script of `tools/` or `benchmarks/`, by its path in the repository, as a module"
    path = ROOT / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                      # dataclasses and pickles look there
    sys.path.insert(0, str(path.parent))                 # as if it was run
    try: spec.loader.exec_module(module)
    finally: sys.path.remove(str(path.parent))
    return module


def visit(page, file: Path, width: int, scheme: str) -> tuple[list[str], list[str]]:
    "Open a page of ours in a window of this width; what it asked for, and what it said on its console"
    asked, said = [], []
    page.on('request', lambda r: asked.append(r.url))
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=width, height=800))
    page.goto(file.as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    return asked, said


@pytest.fixture(scope='module')
def one_thread() -> Iterator:
    "Nets as small as those of the tests are slower on two"
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The docs site: the folder SKIN_GRADCAM_SITE where one is built already, else built now"
    if given := os.environ.get('SKIN_GRADCAM_SITE'): return Path(given).resolve()
    out = tmp_path_factory.mktemp('site') / '_docs'
    subprocess.run([sys.executable, ROOT / 'tools/build_docs.py', '--site-only', '--out', out], check=True)
    return out


# ---------------------------------------------------------------- tests that run alone

try: import fcntl
except ImportError: fcntl = None                         # type: ignore[assignment]      # Windows: one worker


@contextlib.contextmanager
def locked(file: Path, how: int) -> Iterator[None]:
    with open(file, 'a') as f:
        fcntl.flock(f, how)
        try: yield
        finally: fcntl.flock(f, fcntl.LOCK_UN)           # also where a forked process still has the file open


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    "Tell a worker of pytest-xdist the folder of the locks"
    folder = node.config.stash.get(LOCKS, None)
    if folder is None:
        node.config.stash[LOCKS] = folder = tempfile.mkdtemp(prefix='skin_gradcam-tests-')
        node.config.add_cleanup(functools.partial(shutil.rmtree, folder))
    node.workerinput['locks'] = folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    "Among workers: tests share the room, one marked `alone` has it to itself; the door lets it in before later ones"
    told = getattr(item.config, 'workerinput', None)
    if fcntl is None or told is None: return (yield)
    how = fcntl.LOCK_EX if item.get_closest_marker('alone') else fcntl.LOCK_SH
    with contextlib.ExitStack() as inside:
        with locked(Path(told['locks'], 'door'), fcntl.LOCK_EX):
            inside.enter_context(locked(Path(told['locks'], 'room'), how))
        return (yield)


# ---------------------------------------------------------------- skips that are failures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--no-skips-allowed', action='store_true', help='fail a skipped test that this machine could run')


def excused(keywords) -> bool:
    "Whether the machine lacks what the test is marked to need; a peer is never lacking, the `dev` extra brings it"
    if 'data' in keywords and find_data() is None: return True
    if 'browser' in keywords and find_chromium() is None: return True
    return 'skipif' in keywords and 'peer' not in keywords


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    "Turn a skip into a failure that quotes its reason"
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = 'failed'
    report.longrepr = f'{report.nodeid} was skipped although this machine could run it: {reason}'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    skipped = report.skipped and not hasattr(report, 'wasxfail')
    if skipped and item.config.getoption('--no-skips-allowed') and not excused(item.keywords): refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if report.skipped and collector.config.getoption('--no-skips-allowed'): refuse_skip(report)
    return report
