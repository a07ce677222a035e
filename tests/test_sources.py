"""The real clients of every source against servers on this machine that break, lie, stall and change their minds"""
from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pandas as pd
import pytest
import requests
import servers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import GET, STORE, Fault, Server, isic_record, kaggle, zipped

from skin_gradcam import sources
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.readers import DataError, read_folder
from skin_gradcam.sources import DownloadError, Net, Patience, download, fetch, known_ids

QUICK = Patience(tries=4, first=.01, longest=60, connect=5, stall=1, slowest=2000, window=1)
DATA = hashlib.shake_256(b'archive').digest(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server():
    s = Server()
    s.files['/a.zip'] = DATA
    yield s
    s.close()


@pytest.fixture
def waits(monkeypatch):
    "The pauses between attempts, noted instead of waited"
    seen = []
    monkeypatch.setattr(Net, 'pause', lambda self, s: seen.append(s) if s != .1 else time.sleep(s))
    return seen


@pytest.fixture(scope='session')
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp('phantoms') / 'set', per_class=4, seed=2)


def get(server, path, **kw):
    "Download /a.zip; gives what was said"
    said = []
    download(f'{server.url}/a.zip', path, patience=QUICK, say=said.append, **kw)
    return said


def visible(folder: Path) -> list[str]:
    "The files that a user would take for results"
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith('.') and p.suffix != '.lock')


def wait_for(what, seconds=20):
    "Wait until it is true"
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'it did not happen in time'
        time.sleep(.01)


def start(code: str, **env) -> subprocess.Popen:
    "A Python process that has the sources"
    modules = 'from skin_gradcam.sources import *\nfrom skin_gradcam.downloads import *\n'
    code = f'{modules}from skin_gradcam import downloads, sources\n{code}'
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, **env}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


# ---------------------------------------------------------------- one file


def test_busy_server_is_left_alone_as_long_as_it_asks(server, tmp_path, waits):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    server.faults['/a.zip'] = [Fault(429, {'Retry-After': '7'}), Fault(503, {'Retry-After': soon}), Fault(500)]
    said = get(server, tmp_path / 'a.zip', sha256=SHA)
    assert (tmp_path / 'a.zip').read_bytes() == DATA
    assert waits[0] == 7 and 30 < waits[1] <= 40 and 0 < waits[2] <= .04
    assert said[0] == 'a.zip: 127.0.0.1 answers 429; again in 7.0 s'


def test_server_that_asks_for_too_much_ends_it(server, tmp_path, waits):
    server.faults['/a.zip'] = [Fault(cut=100_000), Fault(429, {'Retry-After': '3600'})]
    words = 'asks to come back in 3600 s, more than the 60 s that are waited; run this again'
    with pytest.raises(DownloadError, match=words):
        get(server, tmp_path / 'a.zip')
    assert visible(tmp_path) == []
    get(server, tmp_path / 'a.zip')  # later: goes on
    assert server.starts('/a.zip') == [0, 100_000, 100_000]
    assert (tmp_path / 'a.zip').read_bytes() == DATA


def test_server_that_stays_down_is_given_up(server, tmp_path, waits):
    server.faults['/a.zip'] = [Fault(503)] * 9
    with pytest.raises(DownloadError, match='a.zip: 127.0.0.1 answers 503; gave up after 4 attempts. Look at the'):
        get(server, tmp_path / 'a.zip')
    assert waits == sorted(waits) and len(waits) == 3


def test_truncated_body_goes_on_where_it_stopped(server, tmp_path):
    server.faults['/a.zip'] = [Fault(cut=120_000), Fault(cut=50_000), Fault(cut=0)]
    said = get(server, tmp_path / 'a.zip')
    assert (tmp_path / 'a.zip').read_bytes() == DATA
    assert server.starts('/a.zip') == [0, 120_000, 170_000, 170_000]
    assert server.asked[1].headers['If-Range'] == f'"{hashlib.md5(DATA).hexdigest()}"'
    assert said[0].startswith('a.zip: the connection broke off after 120,000 of 300,000 bytes; again in')
    assert visible(tmp_path) == ['a.zip'] and not list(tmp_path.glob('.a*'))


def test_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(DownloadError, match='its sha256 is .* was expected; it was removed'):
        get(server, tmp_path / 'a.zip', sha256='0' * 64)
    with pytest.raises(DownloadError, match='its md5 is'): get(server, tmp_path / 'a.zip', md5='0' * 32)
    assert visible(tmp_path) == [] and not list(tmp_path.glob('.a*'))
    assert server.starts('/a.zip') == [0, 0]  # a file that came in one piece is not asked for twice


def test_pieces_that_do_not_belong_together_are_fetched_anew_once(server, tmp_path):
    other = bytes(len(DATA))
    server.faults['/a.zip'] = [Fault(body=other, same_name=True, cut=90_000)]
    said = get(server, tmp_path / 'a.zip', sha256=SHA)
    assert (tmp_path / 'a.zip').read_bytes() == DATA
    assert server.starts('/a.zip') == [0, 90_000, 0] and 'do not belong together' in said[1]
    server.faults['/a.zip'] = [Fault(cut=9)] + 3 * [Fault(body=other)]
    with pytest.raises(DownloadError, match='it was removed'): get(server, tmp_path / 'b.zip', sha256=SHA)


def test_trickle_and_silence_do_not_hang(server, tmp_path):
    server.faults['/a.zip'] = [Fault(trickle=.05)] * 2 + [Fault(stall=9)] * 2
    with pytest.raises(DownloadError, match='nothing came for 1 s after .* bytes; gave up after 4 attempts'):
        said = []
        download(f'{server.url}/a.zip', tmp_path / 'a.zip', patience=QUICK, say=said.append)
    assert 'bytes a second came' in said[0]


def test_server_that_knows_no_ranges_starts_over(server, tmp_path):
    server.faults['/a.zip'] = [Fault(cut=80_000, no_range=True), Fault(no_range=True)]
    get(server, tmp_path / 'a.zip')
    assert (tmp_path / 'a.zip').read_bytes() == DATA


def test_file_that_changed_meanwhile_is_taken_whole(server, tmp_path):
    server.faults['/a.zip'] = [Fault(body=bytes(200_000), cut=80_000)]
    get(server, tmp_path / 'a.zip')
    assert (tmp_path / 'a.zip').read_bytes() == DATA
    server.files['/a.zip'] = DATA[:60_000]  # and one that became shorter than what is there
    part = tmp_path / '.b.zip.part'
    part.write_bytes(bytes(80_000))
    get(server, tmp_path / 'b.zip', sha256=hashlib.sha256(DATA[:60_000]).hexdigest())
    assert (tmp_path / 'b.zip').read_bytes() == DATA[:60_000]


def test_without_validator_and_hash_halves_are_not_joined(server, tmp_path):
    server.validators = False
    server.faults['/a.zip'] = [Fault(cut=80_000), Fault(cut=70_000)]
    get(server, tmp_path / 'a.zip')
    assert server.starts('/a.zip') == [0, 0, 0]
    server.faults['/a.zip'] = [Fault(cut=80_000)]
    get(server, tmp_path / 'b.zip', sha256=SHA)  # with a hash they may be
    assert server.starts('/a.zip')[3:] == [0, 80_000]


def test_part_that_is_complete_already(server, tmp_path):
    (tmp_path / '.a.zip.part').write_bytes(DATA)
    get(server, tmp_path / 'a.zip', sha256=SHA)
    assert (tmp_path / 'a.zip').read_bytes() == DATA and server.starts('/a.zip') == [len(DATA)]


def on_a_small_disk(code: str, size: int) -> str:
    "What a process says that may write no file larger than `size`; the system then refuses, as a full disk does"
    limit = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))'
    return start(f'{limit}\ntry: {code}\nexcept DownloadError as e: print("said:", e)').communicate(timeout=30)[0]


@pytest.mark.skipif(os.name != 'posix', reason='the limit on the size of files is a thing of Unix')
def test_full_disk(server, tmp_path):
    said = on_a_small_disk(f'download({server.url + "/a.zip"!r}, {str(tmp_path / "a.zip")!r})', 100_000)
    assert 'said: a.zip: the disk takes no more (File too large); free some space and run this again, what' in said
    assert visible(tmp_path) == []
    get(server, tmp_path / 'a.zip', sha256=SHA)  # with more room it goes on
    assert server.starts('/a.zip') == [0, 100_000] and (tmp_path / 'a.zip').read_bytes() == DATA


def test_disk_without_enough_room_is_not_even_begun(server, tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)._replace(free=250_000)
    monkeypatch.setattr(sources.shutil, 'disk_usage', lambda p: room)
    with pytest.raises(DownloadError, match='0 MB more are needed, 0 MB are free; free some space'):
        get(server, tmp_path / 'a.zip')
    assert not (tmp_path / '.a.zip.part').exists()


def test_redirects(server, tmp_path):
    server.faults['/a.zip'] = [Fault(302, {'Location': '/b.zip'})]
    server.files['/b.zip'] = DATA
    get(server, tmp_path / 'a.zip', sha256=SHA)
    server.faults['/a.zip'] = [Fault(302, {'Location': 'file:///etc/hostname'})]
    with pytest.raises(DownloadError, match='the address leads nowhere'): get(server, tmp_path / 'c.zip')
    server.faults['/a.zip'] = [Fault(302, {'Location': '/a.zip'})] * 40
    with pytest.raises(DownloadError, match='the address leads nowhere'): get(server, tmp_path / 'c.zip')
    assert visible(tmp_path) == ['a.zip']


def test_redirect_from_https_to_http_is_not_followed(tmp_path, monkeypatch):
    "No certificate is at hand here, so the answer that requests would give is put together by hand"
    hops = [requests.Response() for _ in range(3)]
    for hop, host in zip(hops, ('https://a', 'http://b', 'https://c')): hop.url = f'{host}.invalid/x'
    hops[2].history, hops[2].status_code, hops[2].raw = hops[:2], 200, io.BytesIO()
    monkeypatch.setattr(requests.Session, 'get', lambda *args, **kw: hops[2])
    with pytest.raises(DownloadError, match="leads from https to 'http://b.invalid/x'"):
        download('https://a.invalid/x', tmp_path / 'x', patience=QUICK)


@pytest.mark.parametrize('status, words', [(403, 'not allowed'), (404, 'look at the address'), (410, 'no longer')])
def test_refusals_are_not_repeated(server, tmp_path, status, words):
    server.faults['/a.zip'] = [Fault(status)]
    with pytest.raises(DownloadError, match=words) as e: get(server, tmp_path / 'a.zip')
    assert e.value.status == status and len(server.asked) == 1


def test_no_network(tmp_path):
    with pytest.raises(DownloadError, match='refuses the connection; gave up after 2 attempts'):
        download('http://127.0.0.1:9/a.zip', tmp_path / 'a.zip', patience=QUICK, say=len)
    with pytest.raises(DownloadError, match='no http or https address'):
        download('ftp://127.0.0.1/a.zip', tmp_path / 'a.zip', patience=QUICK)


def test_killed_download_leaves_no_file_and_goes_on(server, tmp_path):
    server.pace = 10_000, .05
    path = tmp_path / 'a.zip'
    child = start(f'download({server.url + "/a.zip"!r}, {str(path)!r})')
    wait_for(lambda: (tmp_path / '.a.zip.part').exists() and (tmp_path / '.a.zip.part').stat().st_size >= 50_000)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert visible(tmp_path) == []
    server.pace = None
    get(server, path, sha256=SHA)
    assert path.read_bytes() == DATA
    assert len(server.asked) == 2 and server.asked[1].first >= 50_000


def test_two_processes_fetch_once(server, tmp_path):
    server.pace = 30_000, .1
    code = f'download({server.url + "/a.zip"!r}, {str(tmp_path / "a.zip")!r}, sha256={SHA!r})'
    both = [start(code), start(code)]
    assert [c.communicate(timeout=30)[0] for c in both] == ['', ''] and [c.returncode for c in both] == [0, 0]
    assert server.starts('/a.zip') == [0]


faults = st.builds(Fault, status=st.sampled_from([0, 0, 0, 429, 503]), cut=st.none() | st.integers(0, 30_000),
                   no_range=st.booleans(), body=st.none() | st.just(bytes(20_000)))


@given(st.lists(faults, max_size=8), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_happens_it_is_the_file_or_nothing(tmp_path_factory, wrong, validators, hashed):
    s, folder, small = Server(), tmp_path_factory.mktemp('any'), DATA[:30_000]
    s.files['/a.zip'], s.faults['/a.zip'], s.validators = small, list(wrong), validators
    try:
        calm = Patience(tries=5, first=.001, stall=1, window=1)
        try: download(f'{s.url}/a.zip', folder / 'a.zip', sha256=hashlib.sha256(small).hexdigest() if hashed else None,
                      patience=calm, say=len)
        except DownloadError: assert visible(folder) == []
        else:
            got = (folder / 'a.zip').read_bytes()
            assert got == small or (not hashed and got == bytes(20_000))  # either file, never a mixture
    finally: s.close()


# ---------------------------------------------------------------- ISIC Archive


@pytest.fixture
def archive(server, phantoms):
    "Twelve pictures of HAM10000 and three of the official test, five a page"
    words = dict(nv='Nevus', bkl='Pigmented benign keratosis', mel='Melanoma, NOS')
    t = pd.read_csv(phantoms / 'HAM10000_metadata.csv')
    records = []
    for i, row in enumerate(t.itertuples()):
        data = (phantoms / 'HAM10000_images_part_1' / f'{row.image_id}.jpg').read_bytes()
        known = dict(diagnosis_1='Benign', diagnosis_3=words[row.dx], diagnosis_confirm_type='histopathology')
        known |= dict(lesion_id=f'IL_{i}', age_approx=40, sex='male')
        records.append(isic_record(server, f'ISIC_{24306 + 500 * i:07d}', data, **known))
    for i in (3, 8, 14): records.insert(i, isic_record(server, f'ISIC_{34524 + i:07d}', b'a test', diagnosis_3='Nevus'))
    server.api = servers.isic(server, records)
    return server


def get_isic(archive, folder, said=None, **kw):
    say = (said if said is not None else []).append
    return fetch('isic', folder, api=archive.api, patience=QUICK, say=say, **kw)


def pictures(archive) -> list[str]: return [a.path for a in archive.asked if a.path.startswith('/files/')]


def test_isic_takes_only_what_the_table_knows(archive, tmp_path):
    said = []
    folder = get_isic(archive, tmp_path / 'isic', said)
    assert 'CC BY-NC 4.0' in said[0] and 'Tschandl' in said[0]  # before anything was asked for
    df, report = read_folder(folder)
    assert report.n_kept == report.n_rows == 12 and report.kept == dict(nv=(4, 4), bkl=(4, 4), mel=(4, 4))
    assert set(df.dx_type) == {'histo'} and set(df.sex) == {'male'} and set(df.age) == {40.}
    assert not [p for p in pictures(archive) if '00345' in p]
    assert '3 pictures of the collection not in the table: passed over (the official tests are among them)' in said
    owed = pd.read_csv(folder / 'attribution.csv')
    assert len(owed) == 12 and set(owed.license) == {'CC-BY-NC'} and set(owed.attribution) == {'ViDIR Group, Vienna'}
    assert len(list(folder.glob('HAM10000_images_part_1/*.jpg'))) == 10  # below 29306, as Kaggle sorts them
    n = len(archive.asked)
    get_isic(archive, tmp_path / 'isic', said)
    assert len(archive.asked) == n and said[-1].startswith('Already there: 12 of 12')


def test_isic_with_the_users_table(archive, tmp_path):
    table = tmp_path / 'HAM10000_metadata.tab'
    ids = ['ISIC_0024306', 'ISIC_0024806', 'ISIC_0099999']
    t = pd.DataFrame(dict(lesion_id=['HAM_1', 'HAM_2', 'HAM_3'], image_id=ids, dx=['mel', 'nv', 'nv']))
    t.to_csv(table, sep='\t', index=False)
    said = []
    df, report = read_folder(get_isic(archive, tmp_path / 'isic', said, metadata=table))
    assert list(df.lesion_id) == ['HAM_1', 'HAM_2'] and list(df.dx) == ['mel', 'nv']
    assert report.missing_files == {'ISIC_0099999': 'nv'} and len(pictures(archive)) == 2
    assert '1 picture of the table not in the collection: ISIC_0099999' in said


def test_isic_first_look_and_then_the_rest(archive, tmp_path):
    said = []
    folder = get_isic(archive, tmp_path / 'isic', said, limit=7)
    assert read_folder(folder)[1].n_kept == 7 == len(pictures(archive)) and 'collection: ' not in ' '.join(said)
    assert read_folder(get_isic(archive, folder))[1].n_kept == 12 == len(pictures(archive))


def test_isic_table_of_something_else(archive, tmp_path):
    (tmp_path / 'other.csv').write_text('image_id,dx\nISIC_9999999,nv\n')
    with pytest.raises(DownloadError, match='no picture of collection 212 is in the table'):
        get_isic(archive, tmp_path / 'isic', metadata=tmp_path / 'other.csv')
    (tmp_path / 'other.csv').write_text('image_id,dx\n../../x,nv\n')
    with pytest.raises(DataError, match='no id like ISIC_0024306'):
        get_isic(archive, tmp_path / 'isic', metadata=tmp_path / 'other.csv')
    with pytest.raises(DataError, match='no such table'):
        get_isic(archive, tmp_path / 'isic', metadata=tmp_path / 'none.csv')


def test_isic_under_faults(archive, tmp_path, waits):
    page = '/api/v2/images/search/?collections=212&limit=100'
    archive.faults[page] = [Fault(429, {'Retry-After': '3'}), Fault(502), Fault(cut=50)]
    archive.faults['/files/ISIC_0024306.jpg'] = [Fault(cut=2000), Fault(503)]
    archive.faults['/files/ISIC_0024806.jpg'] = [Fault(403)]  # the signature has expired: the record is asked for anew
    archive.faults['/files/ISIC_0025306.jpg'] = [Fault(404)]  # gone for good
    said = []
    folder = get_isic(archive, tmp_path / 'isic', said, threads=2)
    df, report = read_folder(folder)
    assert report.n_kept == 11 and list(report.missing_files) == ['ISIC_0025306'] and waits[0] == 3
    assert '1 picture could not be had: ISIC_0025306 (404)' in said
    assert [a.path for a in archive.asked].count('/api/v2/images/ISIC_0024806/') == 1
    assert archive.starts('/files/ISIC_0024306.jpg') == [0, 2000, 2000]


def test_isic_picture_of_another_size_is_not_taken(archive, tmp_path):
    archive.files['/files/ISIC_0024306.jpg'] = b'<html>Please log in</html>'
    with pytest.raises(DownloadError, match='announces 26 bytes, .* were expected'):
        get_isic(archive, tmp_path / 'isic')
    assert not (tmp_path / 'isic' / 'HAM10000_metadata.csv').exists()
    with pytest.raises(DataError): read_folder(tmp_path / 'isic')


def test_isic_that_goes_down_stops_soon_and_goes_on_later(archive, tmp_path, waits):
    names = sorted(k for k in archive.files if k.startswith('/files/') and '00345' not in k)
    for k in names[6:]: archive.faults[k] = [Fault(503)] * 4
    with pytest.raises(DownloadError, match='answers 503; gave up after 4 attempts'):
        get_isic(archive, tmp_path / 'isic', threads=1)
    there = {p.stem for p in (tmp_path / 'isic').rglob('*.jpg')}
    assert 4 <= len(there) <= 6
    archive.asked.clear(), archive.faults.clear()
    assert read_folder(get_isic(archive, tmp_path / 'isic'))[1].n_kept == 12
    assert {Path(p).stem for p in pictures(archive)} == {Path(k).stem for k in names} - there


@pytest.mark.parametrize('after, words', [('http://elsewhere.invalid/x', 'elsewhere or'), ('same', 'read already')])
def test_isic_pages_that_lead_astray(archive, tmp_path, after, words):
    page = '/api/v2/images/search/?collections=212&limit=100'
    body = json.loads(archive.files[page])
    body['next'] = archive.url + page if after == 'same' else after
    archive.files[page] = json.dumps(body).encode()
    with pytest.raises(DownloadError, match=words): get_isic(archive, tmp_path / 'isic')


@pytest.mark.parametrize('body, words', [(b'<html>Welcome to the hotel', 'is no JSON'),
                                         (b'{"detail": "x"}', 'has no results'), (b'[1, 2]', 'has no results')])
def test_isic_that_is_something_else(archive, tmp_path, body, words):
    archive.files['/api/v2/images/search/?collections=212&limit=100'] = body
    with pytest.raises(DownloadError, match=words): get_isic(archive, tmp_path / 'isic')


def test_isic_list_that_ends_early(archive, tmp_path):
    page = '/api/v2/images/search/?collections=212&limit=100'
    archive.files[page] = json.dumps(json.loads(archive.files[page]) | dict(next=None)).encode()
    with pytest.raises(DownloadError, match='ended after 5 of 15 pictures'): get_isic(archive, tmp_path / 'isic')


def test_isic_killed_and_resumed(archive, tmp_path):
    archive.pace = 4000, .05
    folder = tmp_path / 'isic'
    child = start(f'fetch("isic", {str(folder)!r}, api={archive.api!r}, threads=2)')
    wait_for(lambda: len(list(folder.rglob('ISIC*.jpg'))) >= 3)
    os.kill(child.pid, signal.SIGKILL)
    assert 'Licence: CC BY-NC 4.0' in child.communicate()[0]
    with pytest.raises(DataError): read_folder(folder)  # half a set is no set
    there = {p.name for p in folder.rglob('ISIC*.jpg')}
    archive.pace = None
    archive.asked.clear()
    df, report = read_folder(get_isic(archive, folder))
    assert report.n_kept == 12 and not report.unreadable
    assert not there & {Path(p).name for p in pictures(archive)}
    assert not list(folder.rglob('*.part*'))


# ---------------------------------------------------------------- Kaggle


@pytest.fixture
def kaggle_server(server, phantoms, monkeypatch):
    "The phantoms as an archive of Kaggle, twice its folders, and with the tables that nobody asked for"
    images = {p.name: p.read_bytes() for p in phantoms.glob('HAM10000_images_part_1/*.jpg')}
    files = {f'{d}/{k}': v for d in ('HAM10000_images_part_1', 'ham10000_images_part_1') for k, v in images.items()}
    files |= {'HAM10000_metadata.csv': (phantoms / 'HAM10000_metadata.csv').read_bytes()}
    files |= {'hmnist_28_28_RGB.csv': hashlib.shake_256(b'csv').digest(4 << 20)}  # kagglehub writes megabytes
    for k, v in kaggle(server, zipped(files)).items(): monkeypatch.setenv(k, v)
    return server


PATIENT = Patience(tries=4, first=.01, longest=60, slowest=2000, window=8)


def get_kaggle(folder, said=None, patience=PATIENT, **kw):
    return fetch('kaggle', folder, patience=patience, say=(said if said is not None else []).append, **kw)


def test_kaggle_under_faults(kaggle_server, tmp_path, waits, monkeypatch):
    for k in ('KAGGLE_USERNAME', 'KAGGLE_KEY'): monkeypatch.setenv(k, 'someone')
    kaggle_server.extra[STORE]['X-Kaggle-HubVersion'] = '99.0.0'  # it then prints an open line about its age
    kaggle_server.pace = 1 << 20, .1
    totals = []
    class Bar(sources._Bar):
        def close(self): totals.append(self.total), super().close()
    monkeypatch.setattr(sources, '_Bar', Bar)
    kaggle_server.faults[GET] = [Fault(429, {'Retry-After': '5'})]
    kaggle_server.faults[STORE] = [Fault(503), Fault(cut=(2 << 20) + 99)]
    said = []
    folder = get_kaggle(tmp_path / 'kaggle', said)
    df, report = read_folder(folder)
    assert report.n_kept == report.n_rows == 12
    assert 'CC BY-NC 4.0' in said[0] and said[-1] == 'Fetched: 12 of 12 pictures that the table names, 0 masks'
    assert waits[0] == 5 and 'Kaggle answers 429; again in 5.0 s' in said[1] and 'Kaggle answers 503' in said[2]
    assert 2 << 20 in kaggle_server.starts(STORE)  # it went on where it stopped
    assert visible(folder) == ['HAM10000_images_part_1', 'HAM10000_metadata.csv', 'SOURCE-kaggle.txt',
                               'ham10000_images_part_1', 'hmnist_28_28_RGB.csv']
    assert len(kaggle_server.files[STORE]) in totals  # the bar knew how much there is to come
    n = len(kaggle_server.asked)
    get_kaggle(folder)
    assert len(kaggle_server.asked) == n and not (folder / '.kagglehub').exists()


@pytest.mark.parametrize('status, words', [(403, 'Kaggle answers 403; log in: put an API token'),
                                           (404, 'Kaggle answers 404; look at the name of the data set')])
def test_kaggle_refusals(kaggle_server, tmp_path, status, words):
    kaggle_server.faults[GET] = [Fault(status)]
    with pytest.raises(DownloadError, match=words): get_kaggle(tmp_path / 'kaggle')
    assert len(kaggle_server.asked) == 1


def test_kaggle_credentials_that_cannot_be_read(kaggle_server, tmp_path, monkeypatch):
    (tmp_path / 'kaggle.json').write_text('{broken')
    monkeypatch.setenv('KAGGLE_CONFIG_DIR', str(tmp_path))
    with pytest.raises(DownloadError, match='Invalid Kaggle credentials file'): get_kaggle(tmp_path / 'kaggle')


def test_kaggle_without_kagglehub(tmp_path, monkeypatch):
    (tmp_path / 'kagglehub.py').write_text('raise ImportError("No module named kagglehub")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    with pytest.raises(DownloadError, match='ImportError: No module named kagglehub'): get_kaggle(tmp_path / 'kaggle')


def test_kaggle_notebook_where_data_are_mounted(phantoms, tmp_path, monkeypatch):
    "Inside Kaggle and Colab the data stand in a folder that is not ours: it is linked and left as it is"
    before = {p: p.stat().st_mtime for p in phantoms.rglob('*')}
    monkeypatch.setattr(sources, '_kagglehub', lambda net, handle, hub: hub.mkdir() or phantoms)
    folder = get_kaggle(tmp_path / 'kaggle')
    assert read_folder(folder)[1].n_kept == 12 and (folder / 'HAM10000_images_part_1').is_symlink()
    get_kaggle(folder, again=True)
    assert {p: p.stat().st_mtime for p in phantoms.rglob('*')} == before


def test_kaggle_archive_that_is_damaged(kaggle_server, tmp_path):
    good = kaggle_server.files[STORE]
    bad = good[:5000] + b'damage' + good[5006:]
    kaggle_server.faults[STORE] = [Fault(body=bad)]  # not what its MD5 says: fetched once more
    assert read_folder(get_kaggle(tmp_path / 'kaggle'))[1].n_kept == 12
    kaggle_server.files[STORE], kaggle_server.extra[STORE] = bad, {}  # no MD5: the archive's own checksums find it
    with pytest.raises(DownloadError, match='the archive is damaged .* for the second time; it was removed'):
        get_kaggle(tmp_path / 'other')
    with pytest.raises(DataError): read_folder(tmp_path / 'other')
    assert not list((tmp_path / 'other').rglob('*.archive'))


def test_kaggle_without_room_for_it(kaggle_server, tmp_path, monkeypatch):
    "Room for the archive, but not for what comes out of it too"
    kaggle_server.pace = 1 << 18, .1
    room = shutil.disk_usage(tmp_path)._replace(free=len(kaggle_server.files[STORE]) + 1000)
    monkeypatch.setattr(sources.shutil, 'disk_usage', lambda p: room)
    with pytest.raises(DownloadError, match='what it unpacks to: 9 MB more are needed, 5 MB are free'):
        get_kaggle(tmp_path / 'kaggle')


def test_kaggle_whose_error_page_gets_into_the_archive(kaggle_server, tmp_path):
    "kagglehub adds whatever answers its request for the rest; the checksum finds it and the archive is fetched anew"
    kaggle_server.faults[STORE] = [Fault(cut=(2 << 20) + 99), Fault(), Fault(503)]
    said = []
    assert read_folder(get_kaggle(tmp_path / 'kaggle', said))[1].n_kept == 12
    assert kaggle_server.starts(STORE) == [0, 0, 2 << 20, 0] and 'the archive is damaged' in said[2]


def test_kaggle_that_hangs_is_ended(kaggle_server, tmp_path):
    kaggle_server.faults[STORE] = [Fault(stall=60), Fault(trickle=.05)]  # silence, then a byte now and then
    said = []
    folder = get_kaggle(tmp_path / 'kaggle', said, replace(PATIENT, tries=9, window=1.5))
    assert read_folder(folder)[1].n_kept == 12
    assert sum('nothing came from Kaggle for 2 s' in s for s in said) >= 2


def test_kaggle_killed_and_resumed(kaggle_server, tmp_path):
    kaggle_server.pace = 1 << 18, .1
    folder = tmp_path / 'kaggle'
    parent = start(f'fetch("kaggle", {str(folder)!r})')
    def came(): return sum(p.stat().st_size for p in folder.rglob('*.archive'))
    wait_for(lambda: came() >= 1 << 20)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    n = came()
    with pytest.raises(DataError): read_folder(folder)
    time.sleep(1)
    assert came() <= n + (1 << 20) < len(kaggle_server.files[STORE])  # kagglehub has ended with its parent
    kaggle_server.pace = None
    assert read_folder(get_kaggle(folder))[1].n_kept == 12
    assert kaggle_server.starts(STORE)[-1] >= 1 << 20


def test_kaggle_half_unpacked_is_unpacked_anew(kaggle_server, tmp_path):
    hub = tmp_path / 'kaggle' / '.kagglehub' / 'datasets' / 'kmader' / 'skin-cancer-mnist-ham10000'
    half = hub / 'versions' / '2' / 'HAM10000_images_part_1'
    half.mkdir(parents=True)
    (hub / '2.archive').write_bytes(kaggle_server.files[STORE])
    (half / 'half.jpg').write_bytes(b'half a picture')
    folder = get_kaggle(tmp_path / 'kaggle')
    assert read_folder(folder)[1].n_kept == 12 and not list(folder.rglob('half.jpg'))


def test_kaggle_killed_while_it_moves(kaggle_server, tmp_path):
    folder = tmp_path / 'kaggle'
    code = f'''
import os
real = os.replace
def replace(a, b):
    real(a, b)
    if str(b).endswith('HAM10000_images_part_1'): os._exit(9)
sources.os.replace = replace
fetch('kaggle', {str(folder)!r})'''
    child = start(code)
    child.communicate(timeout=60)
    assert child.returncode == 9 and (folder / 'HAM10000_images_part_1').is_dir()
    with pytest.raises(DataError): read_folder(folder)
    n = len(kaggle_server.asked)
    assert read_folder(get_kaggle(folder))[1].n_kept == 12
    assert len(kaggle_server.asked) == n  # nothing is asked for a second time


def test_kaggle_twice_at_once(kaggle_server, tmp_path):
    kaggle_server.pace = 1 << 20, .1
    code = f'fetch("kaggle", {str(tmp_path / "kaggle")!r})'
    both = [start(code), start(code)]
    said = [c.communicate(timeout=60)[0] for c in both]
    assert [c.returncode for c in both] == [0, 0]
    assert kaggle_server.starts(STORE).count(0) == 1 and sum('Already there' in s for s in said) == 1


def test_kaggle_masks(server, phantoms, tmp_path, monkeypatch):
    masks = {f'{p.parent.name}/{p.name}': p.read_bytes() for p in phantoms.glob('*tschandl/*.png')}
    masks |= {'x/ISIC_0000000_segmentation.png': b'of a picture that is not here'}
    for k, v in kaggle(server, zipped(masks), version=1).items(): monkeypatch.setenv(k, v)
    folder = shutil.copytree(phantoms, tmp_path / 'set')
    shutil.rmtree(folder / sources.MASKS)
    said = []
    fetch('masks', folder, patience=PATIENT, say=said.append)
    assert said[-2:] == ['12 masks; 1 other file left out', 'Fetched: 12 of 12 pictures that the table names, 12 masks']
    assert [p.name for p in folder.glob('.kaggle*')] == []


# ---------------------------------------------------------------- files that are here already


@pytest.fixture
def by_hand(tmp_path, phantoms):
    "What a browser saved from Dataverse"
    hand = tmp_path / 'hand'
    hand.mkdir()
    t = pd.read_csv(phantoms / 'HAM10000_metadata.csv').assign(dataset='rosendahl')
    t.to_csv(hand / 'HAM10000_metadata.tab', sep='\t', index=False)
    images = {p.name: p.read_bytes() for p in sorted(phantoms.glob('HAM10000_images_part_1/*.jpg'))}
    names = list(images)
    (hand / 'HAM10000_images_part_1.zip').write_bytes(zipped({k: images[k] for k in names[:6]}))
    (hand / 'HAM10000_images_part_2.zip').write_bytes(zipped({k: images[k] for k in names[6:]}))
    (hand / 'ISIC2018_Task3_Test_Images.zip').write_bytes(zipped({'ISIC_0034524.jpg': b'x'}))
    masks = {p.name: p.read_bytes() for p in phantoms.glob('*tschandl/*.png')}
    (hand / f'{sources.MASKS}.zip').write_bytes(zipped(masks))
    return hand


names = st.text(st.sampled_from('a.b/\\:~ -_\u00e9|C'), min_size=1, max_size=14)


@given(st.lists(st.tuples(names, st.binary(max_size=9)), max_size=6, unique_by=lambda o: o[0]))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_an_archive_is_called_nothing_leaves_the_folder(tmp_path_factory, files):
    top = tmp_path_factory.mktemp('zip')
    (top / 'a.zip').write_bytes(zipped(dict(files)))
    try: n, _ = sources.unpack(top / 'a.zip', top / 'deep' / 'out', lambda name: True)
    except DataError: return
    there = [p for p in top.rglob('*') if p.is_file() and p.name != 'a.zip']
    assert len(there) == n and all(p.parent == top / 'deep' / 'out' for p in there)
    assert {p.read_bytes() for p in there} <= {data for _, data in files}


@pytest.mark.skipif(os.name != 'posix', reason='the limit on the size of files is a thing of Unix')
def test_disk_full_while_unpacking(by_hand, tmp_path):
    folder = tmp_path / 'out'
    said = on_a_small_disk(f'fetch("dataverse", {str(folder)!r}, files={str(by_hand)!r})', 4000)
    assert 'the disk takes no more (File too large); free some space' in said and not list(folder.rglob('.*.tmp'))
    assert read_folder(fetch('dataverse', folder, files=by_hand, say=len))[1].n_kept == 12


def test_dataverse_killed_and_resumed(by_hand, tmp_path):
    folder = tmp_path / 'out'
    code = f'''
import os
put, n = downloads._put, []
def slow(e, path):
    put(e, path); n.append(1)
    if len(n) == 4: os._exit(9)
downloads._put = slow
fetch('dataverse', {str(folder)!r}, files={str(by_hand)!r})'''
    child = start(code)
    child.communicate(timeout=60)
    assert child.returncode == 9 and len(list(folder.rglob('*.jpg'))) == 4
    with pytest.raises(DataError): read_folder(folder)
    said = []
    df, report = read_folder(fetch('dataverse', folder, files=by_hand, say=said.append))
    assert report.n_kept == 12 and set(df.dataset) == {'rosendahl'}
    assert said[-1] == 'Fetched: 12 of 12 pictures that the table names, 12 masks'
    assert 'Left alone: ISIC2018_Task3_Test_Images.zip' in ' '.join(said)


def test_dataverse_unpacked_by_hand(by_hand, tmp_path, phantoms):
    for part in ('HAM10000_images_part_1', 'HAM10000_images_part_2'):
        shutil.unpack_archive(by_hand / f'{part}.zip', by_hand / part)
        (by_hand / f'{part}.zip').unlink()
    (by_hand / 'HAM10000_images_part_1' / 'ISIC_0034524.jpg').write_bytes(b'official test')
    df, report = read_folder(fetch('dataverse', tmp_path / 'out', files=by_hand, say=len))
    assert report.n_kept == 12 and not report.not_listed
    said = []
    fetch('dataverse', by_hand, files=by_hand, say=said.append)  # in place
    assert read_folder(by_hand)[1].n_kept == 12


def test_dataverse_that_is_incomplete_or_damaged(by_hand, tmp_path):
    (by_hand / 'HAM10000_images_part_2.zip').unlink()
    said = []
    df, report = read_folder(fetch('dataverse', tmp_path / 'out', files=by_hand, say=said.append))
    assert 'HAM10000_images_part_2: not there, neither zip nor folder' in said and len(report.missing_files) == 6
    data = (by_hand / 'HAM10000_images_part_1.zip').read_bytes()
    (by_hand / 'HAM10000_images_part_1.zip').write_bytes(data[:len(data) // 2])
    with pytest.raises(DataError, match='HAM10000_images_part_1.zip: cannot be unpacked .* fetch it again'):
        fetch('dataverse', tmp_path / 'other', files=by_hand, say=len)
    with pytest.raises(DataError): read_folder(tmp_path / 'other')


def test_pictures_that_went_missing_are_fetched_again(by_hand, tmp_path):
    folder = fetch('dataverse', tmp_path / 'out', files=by_hand, say=len)
    next(folder.rglob('*.jpg')).unlink()
    said = []
    fetch('dataverse', folder, files=by_hand, say=said.append)
    assert said[-1].startswith('Fetched: 12 of 12')


# ---------------------------------------------------------------- the real table


@pytest.mark.data
def test_ids_without_a_table_are_those_of_the_real_one(real_data):
    folder = real_data / 'ham10000'
    assert known_ids() == known_ids(folder / 'HAM10000_metadata.csv')
    for p in folder.glob('HAM10000_images_part_*/*.jpg'): assert sources._image_folder(p.stem) == p.parent.name
    assert sources.count_pictures(folder) == (9873, 10015, 9873)
