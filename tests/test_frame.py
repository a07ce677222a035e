"The package as installed, and the rules of the test run itself"
from __future__ import annotations

import os
import re
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import check_repo
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ['pytester']


@pytest.fixture(scope='module')
def settings() -> dict[str, list[str]]:
    "settings.ini, each value split into its words"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return {k: v.split() for k, v in ini['DEFAULT'].items()}


def canonical(requirement: str) -> tuple[str, frozenset[str]]:
    "Name and version limits of a requirement, however it is written"
    name, limits = re.match(r'([\w.\[\]-]+)\s*\(?([^;)]*)', requirement).groups()
    return re.sub(r'[-_.]+', '-', name).lower(), frozenset(re.split(r'\s*,\s*', limits.strip()))


def test_metadata_comes_from_settings(settings) -> None:
    "What pip knows of the package is what settings.ini says: after editing it, run pip install -e . again"
    asked = {'': set(), 'dev': set(), 'export': set(), 'scale': set(), 'sweep': set(),
             'tensorboard': set(), 'web': set()}
    for r in distribution('skin_gradcam').requires:
        extra = re.search(r'extra == ["\'](\w+)["\']', r)
        asked[extra[1] if extra else ''].add(canonical(r))
    for extra, found in asked.items():
        assert found == {canonical(r) for r in settings[f'{extra}_requirements' if extra else 'requirements']}, extra


def test_entry_points(settings) -> None:
    points = {(p.group, p.name): p.value for p in distribution('skin_gradcam').entry_points}
    script, _, target = settings['console_scripts'][0].partition('=')
    assert points['console_scripts', script] == target == 'skin_gradcam.cli:main'
    assert points['nbdev', 'skin_gradcam'] == 'skin_gradcam._modidx:d'


def test_version() -> None:
    "The version stands in `__init__.py` alone, and pip knows it"
    import skin_gradcam
    assert distribution('skin_gradcam').version == skin_gradcam.__version__
    assert not list(check_repo.one_version())


def test_requirements_have_caps(settings) -> None:
    "A next major version is not taken unseen: every requirement of the package has a lower and an upper limit"
    for r in (r for k in settings if k.endswith('requirements') and k != 'dev_requirements' for r in settings[k]):
        assert '<' in r and '>=' in r, f'{r}: no cap'


def test_constraints_satisfy_settings(settings) -> None:
    "constraints.txt holds a version of each requirement, within its limits"
    from packaging.requirements import Requirement
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = {canonical(k)[0]: v for k, _, v in (s.partition('==') for s in lines if not s.startswith('#'))}
    for r in map(Requirement, settings['requirements'] + settings['dev_requirements']):
        assert canonical(r.name)[0] in pins, f'{r.name}: not in constraints.txt'
        assert r.specifier.contains(pins[canonical(r.name)[0]]), f'{r}: constraints.txt has another version'


def test_modules_without_torch() -> None:
    assert not list(check_repo.torch_free())


def test_readme_commands() -> None:
    "The two commands that README.md promises; .ci/run runs the second as it stands there"
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert re.search(r"^python -m pip install -e \. && skin-gradcam demo$", text, re.M)
    test = "python -m pip install -e '.[dev]' && nbdev-test --n-workers 2 && python -m pytest -n 2 --dist loadfile"
    assert re.search(f'^{re.escape(test)}$', text, re.M)


# ---------------------------------------------------------------- skips

TESTS = """
import pytest

@pytest.mark.data
def test_data(real_data): pass

@pytest.mark.browser
def test_browser(chromium): pass

@pytest.mark.peer
def test_peer(): pytest.importorskip('a_library_that_is_not_there')

@pytest.mark.skipif(True, reason='a condition that the machine fails')
def test_condition(): pass

@pytest.mark.xfail
def test_known(): assert False
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    "Run the tests above with our conftest, real pictures and Chromium being there or not"
    def go(there: bool, *options: str) -> dict[str, int]:
        conftest = Path(__file__).with_name('conftest.py').read_text(encoding='utf-8')
        found = "Path('.')" if there else 'None'
        pytester.makeconftest(f'{conftest}\ndef find_data(): return {found}\nfind_chromium = find_data\n')
        pytester.makepyfile(TESTS)
        return pytester.runpytest('-p', 'no:cacheprovider', *options).parseoutcomes()
    return go


def test_skips_are_refused(run) -> None:
    "With `--no-skips-allowed` a skip is a failure, unless the machine lacks what the test needs"
    counts = run(False)
    assert (counts['skipped'], counts['xfailed'], counts.get('failed', 0)) == (4, 1, 0)
    counts = run(False, '--no-skips-allowed')
    assert (counts['skipped'], counts['xfailed'], counts['failed']) == (3, 1, 1)
    counts = run(True, '--no-skips-allowed')
    assert (counts['passed'], counts['skipped'], counts['xfailed'], counts['failed']) == (2, 1, 1, 1)


def test_skipped_module_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name('conftest.py').read_text(encoding='utf-8'))
    pytester.makepyfile("import pytest\npytest.importorskip('a_library_that_is_not_there')\ndef test_x(): pass")
    assert 'errors' in pytester.runpytest('--no-skips-allowed').parseoutcomes()


TIMED = """
import time
from pathlib import Path
import pytest

def spend(alone=False):
    began = time.monotonic()
    time.sleep(.1)
    with open(Path(__file__).with_suffix('.times'), 'a') as f: f.write(f'{began} {time.monotonic()} {int(alone)}\\n')

@pytest.mark.parametrize('k', range(8))
def test_shared(k): spend()

@pytest.mark.alone
def test_alone(): spend(alone=True)

@pytest.mark.parametrize('k', range(8))
def test_later(k): spend()
"""


@pytest.mark.skipif(os.name != 'posix', reason='flock is of POSIX')
def test_a_test_marked_alone_has_no_other_beside_it(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name('conftest.py').read_text(encoding='utf-8'))
    pytester.makepyfile(test_a=TIMED, test_b=TIMED)
    outcome = pytester.runpytest_subprocess('-n', '2', '--dist', 'loadfile', '-p', 'no:cacheprovider')
    assert outcome.parseoutcomes()['passed'] == 34
    files = (Path(pytester.path, f'test_{n}.times').read_text().splitlines() for n in 'ab')
    spans = [[tuple(map(float, line.split())) for line in lines] for lines in files]
    beside = [x or y for a, b, x in spans[0] for c, d, y in spans[1] if a < d and c < b]
    assert len(beside) >= 5 and not any(beside)                    # the others do run side by side
