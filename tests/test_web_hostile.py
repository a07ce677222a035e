"What no honest visitor sends: a reduced run of tools/hostile_uploads.py, and the few worst pictures one by one"
import io
import json
import time

import numpy as np
import pytest
from conftest import ROOT, load_script
from PIL import Image
from test_inference import explainer_of

from skin_gradcam.webapp import Settings, create_app


@pytest.fixture(scope='module')
def explainer(tmp_path_factory):
    return explainer_of(tmp_path_factory.mktemp('bundle')/'tiny')


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_each_is_refused_in_time(explainer):
    hostile = load_script('tools/hostile_uploads.py')
    got = hostile.run(350, 50, explainer, seed=7)
    assert got['wrong'] == [] and got['faults'] == 0
    assert got['refused'] >= 350 and got['refused'] + got['answered'] == 400
    assert got['slowest']['seconds'] < hostile.SECONDS
    assert got['memory']['growth_mb'] < hostile.GROWTH_MB
    assert set(got['kinds']) == {k.__name__ for k in (*hostile.REFUSE, *hostile.MAY)}


def test_the_full_run_is_on_record():
    d = json.loads((ROOT/'results/web_hostile.json').read_text())
    assert d['passed'] and d['must_be_refused'] >= 5000 and d['faults'] == 0 and d['wrong'] == []
    assert d['slowest']['seconds'] < d['limits']['seconds'] and d['memory']['growth_mb'] < d['limits']['growth_mb']


def scans(n, side=5600):
    "A progressive JPEG of nearly as many pixels as are taken, one of whose passes comes `n` times"
    buf = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(buf, 'JPEG', progressive=True, quality=30)
    data = buf.getvalue()
    first = data.find(b'\xff\xda')
    second = data.find(b'\xff\xda', first + 2)
    head = data.rfind(b'\xff\xc4', first, second)  # the tables that the second pass needs stand before it
    end = head if head > 0 else second
    return data[:end] + data[first:end] * n + data[end:]


def largest(fmt):
    "A valid picture of as many pixels as are taken, in few bytes"
    buf = io.BytesIO()
    Image.new('1' if fmt == 'PNG' else 'L', (5656, 5656)).save(buf, fmt)
    return buf.getvalue()


@pytest.mark.alone
@pytest.mark.parametrize(
    'make',
    [lambda: scans(90), lambda: largest('PNG'), lambda: largest('GIF'), lambda: largest('WEBP')],
    ids=['90 passes', 'png', 'gif', 'webp'],
)
def test_the_dearest_pictures_that_are_still_taken(explainer, make):
    "They may be answered or refused; they may not hold the service for long"
    data = make()
    app = create_app(explainer, Settings(rate_limit=''))
    start = time.perf_counter()
    r = app.test_client().post(
        '/api/v1/explain', data={'picture': (io.BytesIO(data), 'a')}, content_type='multipart/form-data'
    )
    seconds = time.perf_counter() - start
    app.extensions['skin_gradcam'].batcher.close()
    print(len(data), r.status_code, round(seconds, 2), r.text[:150])
    assert r.status_code in (200, 422) and seconds < 15
