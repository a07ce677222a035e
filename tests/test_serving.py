"""What has no place on the page of serving: the service as a process with the real app and model, the faults of
`benchmarks/web_faults.py` (reduced), requests made to do harm, and the stored figures."""
from __future__ import annotations

import http.client
import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import load_script
from flask import Flask, g, request

from skin_gradcam.batching import Batcher
from skin_gradcam.serving import Server, ServerSettings, log_requests, logging_to, make_explainer
from skin_gradcam.web_guard import Settings
from skin_gradcam.webapp import create_app

ROOT = Path(__file__).resolve().parent.parent
web_load = load_script('benchmarks/web_load.py')
web_faults = load_script('benchmarks/web_faults.py')


# ---------------------------------------------------------------- a server in this process

@pytest.fixture(scope='module')
def echo() -> Flask:
    "Tells what arrived"
    app = Flask('echo')

    @app.before_request
    def begin(): g.request_id = 'f' * 16

    @app.route('/echo/<name>', methods=['GET', 'POST'])
    def tell(name):
        return dict(n=len(request.get_data()), client=request.remote_addr, headers=dict(request.headers))

    @app.get('/fault')
    def fault(): raise RuntimeError("somebody's-picture.jpg cannot be shown")

    log_requests(app)
    return app


@contextmanager
def serving(app, batcher=None, max_body: int = 10_000, threads: int = 4, proxied=False, **kw) -> Iterator[Server]:
    server = Server(app, ServerSettings(port=0, **kw), max_body, threads, proxied, batcher)
    server.gave, t = [], threading.Thread(target=lambda: server.gave.append(server.run()))
    t.start()
    try: yield server
    finally:
        server.stop()
        t.join(20)
        assert not t.is_alive()


def talk(server: Server, *parts: bytes, pause: float = .05) -> bytes:
    "Send bytes, then read until the server hangs up"
    with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
        for p in parts:
            s.sendall(p)
            time.sleep(pause if len(parts) > 1 else 0)
        return s.makefile('rb').read()


def status(answer: bytes) -> int: return int(answer.split(b' ', 2)[1])


def test_pipelined_requests_are_answered_in_order(echo):
    with serving(echo) as server:
        one = b'POST /echo/%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n'
        got = talk(server, b''.join(one % (k, k) + b'x' * k for k in (1, 2, 3)) + b'GET /echo/4 HTTP/1.0\r\n\r\n')
        assert re.findall(rb'"n":(\d)', got) == [b'1', b'2', b'3', b'0']
        assert server.listeners[0].adj.budget.taken == 0 and b'Server:' not in got


def test_an_answer_leaves_in_one_packet(echo):
    with serving(echo) as server, socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
        for _ in range(2):
            s.sendall(b'POST /echo/a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc')
            head, _, content = s.recv(2**16).partition(b'\r\n\r\n')
            assert f'Content-Length: {len(content)}'.encode() in head and json.loads(content)['n'] == 3


@pytest.mark.parametrize('method, content', [('GET', b'onetwo'), ('HEAD', b'')])
@pytest.mark.parametrize('said', [dict(), {'Content-Length': '6'}])
def test_answers_in_parts_and_without_content(method, content, said):
    def app(environ, start):
        start('200 OK', list(said.items()))
        return iter([b'one', b'', b'two'] if method == 'GET' else [])

    with serving(app) as server:
        c = http.client.HTTPConnection('127.0.0.1', server.port, timeout=10)
        c.request(method, '/')
        assert c.getresponse().read() == content


def test_the_next_request_may_be_on_its_way_when_the_stop_begins(echo):
    "Between an answer and the next request a connection looks idle; one that was used just now is given a second"
    def ask(c, i):
        c.request('GET', f'/echo/{i}')
        r = c.getresponse()
        return r.read() and r.headers['Connection']

    with serving(echo) as server:
        old, used = (http.client.HTTPConnection('127.0.0.1', server.port, timeout=10) for _ in range(2))
        assert ask(old, 0) is None
        time.sleep(1.1)
        assert ask(used, 1) is None
        server.stop()
        time.sleep(.3)
        assert ask(used, 2) == 'close'
        with pytest.raises(http.client.RemoteDisconnected): ask(old, 3)
    assert server.gave == [0]


def test_who_may_say_where_a_request_comes_from(echo):
    "Headers of proxies reach the app only when it is told to trust them"
    for proxied in (False, True):
        with serving(echo, proxied=proxied) as server:
            c = http.client.HTTPConnection('127.0.0.1', server.port)
            c.request('GET', '/echo/x', headers={'X-Forwarded-For': '203.0.113.9'})
            seen = json.loads(c.getresponse().read())['headers']
            assert ('X-Forwarded-For' in seen) == proxied
            c.close()


POST = b'POST /echo/x HTTP/1.1\r\n'
CHUNK = b'1000\r\n' + b'x' * 4096 + b'\r\n'
HARMFUL = {
    b'GET\r\n\r\n': 400,
    b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n': 400,      # TLS
    b'GET / HTTP/1.1\r\nbad header\r\n\r\n': 400,
    b'GET / HTTP/1.1\r\nX: ' + b'y' * 20_000 + b'\r\n\r\n': 431,
    POST + b'Content-Length: -1\r\n\r\n': 400,
    POST + b'Content-Length: 1e3\r\n\r\n': 400,
    POST + b'Content-Length: 99999999999999\r\n\r\n': 413,
    POST + b'Expect: 100-continue\r\nContent-Length: 20000\r\n\r\n': 413,
    POST + b'Transfer-Encoding: gzip\r\n\r\n': 501,
    POST + b'Transfer-Encoding: chunked\r\n\r\nzz\r\n': 400,
    POST + b'Transfer-Encoding: chunked\r\n\r\n' + 3 * CHUNK + b'0\r\n\r\n': 413}


def test_harmful_requests_get_a_problem(echo):
    "Each is answered by a document with a request id, none is asked to go on, and nothing stays behind"
    with serving(echo, receive_s=1) as server:
        for sent, want in HARMFUL.items():
            got = talk(server, sent)
            assert status(got) == want, sent[:80]
            head, _, content = got.partition(b'\r\n\r\n')
            said = json.loads(content)
            assert said['status'] == want and said['request_id'].encode() in head and b'problem+json' in head
            assert b'100 Continue' not in got and b'waitress' not in got
        assert status(talk(server, b'GET /echo/x HTTP/1.0\r\n\r\n')) == 200
        assert server.listeners[0].adj.budget.taken == 0


def test_a_refused_client_can_read_the_answer(echo):
    "It sends ten megabytes, much more than the buffers of a connection hold, and then reads 413"
    with serving(echo) as server:
        got = talk(server, b'POST /echo/x HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n' + bytes(10_000_000))
        assert status(got) == 413


def test_uploads_share_the_memory(echo):
    "Twenty clients announce bodies; those whose sum fits are let in, the others are told at once, and it is given back"
    with serving(echo, memory=50_000) as server:
        socks = [socket.create_connection(('127.0.0.1', server.port), timeout=10) for _ in range(20)]
        for s in socks: s.sendall(b'POST /echo/x HTTP/1.1\r\nContent-Length: 9000\r\n\r\n' + bytes(100))
        refused = [s for s in socks if can_read(s)]
        assert len(refused) == 15 and server.listeners[0].adj.budget.taken == 45_000
        for s in refused: assert b'HTTP/1.1 503' in s.recv(4096)
        for s in socks: s.close()
        assert web_faults.settled(lambda: server.listeners[0].adj.budget.taken == 0)


def can_read(s: socket.socket) -> bool:
    import select
    return bool(select.select([s], [], [], .3)[0])


def test_a_balancer_has_time_to_notice(echo):
    "During the grace the service still answers, says that it is not ready, and closes each connection after its answer"
    batcher = Batcher(None)
    with serving(echo, batcher, grace_s=1) as server:
        c = http.client.HTTPConnection('127.0.0.1', server.port)
        c.request('GET', '/echo/x')
        assert (r := c.getresponse()).headers['Connection'] is None and r.read()
        server.stop()
        assert not batcher.ready
        new = http.client.HTTPConnection('127.0.0.1', server.port)
        for conn in (c, new):
            conn.request('GET', '/echo/x')
            assert (r := conn.getresponse()).status == 200 and r.headers['Connection'] == 'close' and r.read()
    assert server.gave == [0]


def test_the_log_tells_nothing_about_pictures(echo):
    "Neither names nor addresses nor what an exception says; but the request id that the client has"
    lines = io.StringIO()
    with logging_to(lines), serving(echo) as server:
        c = http.client.HTTPConnection('127.0.0.1', server.port)
        for path in ('/echo/secret-name?q=secret', '/secret-elsewhere', '/fault'):
            c.request('GET', path)
            c.getresponse().read()
        c.close()
    rows = [json.loads(line) for line in lines.getvalue().splitlines()]
    requests = [r for r in rows if r['event'] == 'request']
    assert [(r['status'], r['route']) for r in requests] == [(200, '/echo/<name>'), (404, ''), (500, '/fault')]
    fault = next(r for r in rows if r['event'] == 'error')
    assert (fault['error'], fault['request_id']) == ('RuntimeError', 'f' * 16) and 'fault' in fault['at'][-1]
    for word in ('secret', "somebody's", '127.0.0.1'): assert word not in lines.getvalue()
    assert logging.getLogger('skin_gradcam.serving').level == logging.NOTSET      # as it was before


def test_a_fault_of_the_log_is_no_fault_of_the_service(echo):
    "Standard output is full or gone"
    class Full(io.StringIO):
        def write(self, s): raise OSError(28, 'No space left on device')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(logging, 'raiseExceptions', False)
        with logging_to(Full()), serving(echo) as server:
            assert status(talk(server, b'GET /echo/x HTTP/1.0\r\n\r\n')) == 200


# ---------------------------------------------------------------- the real app in this process

def test_busy_and_late_reach_the_client_as_documented():
    "A queue of two and a network that stands still: 503 with Retry-After, 504, and the next request is served"
    explainer = make_explainer()
    go, answer = threading.Event(), explainer.answer
    explainer.answer = lambda prepared: go.wait(20) and answer(prepared)
    settings = Settings(queue_size=2, timeout_s=1., rate_limit='', demo=False)
    batcher = Batcher(explainer, settings.max_batch, queue_size=2)
    with serving(create_app(explainer, settings, batcher), batcher, settings.max_body, 8) as server:
        import numpy as np
        from PIL import Image
        buf = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(buf, 'PNG')
        got: list = []
        def ask() -> None:
            got.append(web_load.Client(server.port).ask(web_load.body(buf.getvalue())))
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for t in threads: t.start()
        for t in threads: t.join(20)
        assert sorted(s for s, _, _ in got) == [503, 503, 503, 503, 504, 504]
        assert all(int(h['retry-after']) >= 1 for s, h, _ in got if s == 503)
        assert all(h['content-type'] == 'application/problem+json' for _, h, _ in got)
        go.set()
        assert web_faults.settled(lambda: not batcher.inside)
        got.clear()
        ask()
        assert got[0][0] == 200
    batcher.close()


# ---------------------------------------------------------------- the service as a process

@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp('web')
    web_load.prepare(made, 6)
    return made


def test_who_was_let_in_is_answered_before_the_stop(folder):
    assert (r := web_faults.stopped(folder, clients=8, answers=16, times=1))['ok'], r


def test_a_kill_leaves_nothing_behind(folder):
    assert (r := web_faults.killed(folder, clients=8, answers=8))['ok'], r


def test_clients_that_hang_up_cost_nothing(folder):
    assert (r := web_faults.gone(folder, clients=60))['ok'], r


def test_slow_uploads_are_cut(folder):
    assert (r := web_faults.slow(folder, clients=20, limit=1.5))['ok'], r


def test_a_full_disk_does_not_matter(folder):
    assert (r := web_faults.full(folder))['ok'], r


@pytest.mark.parametrize('fault', ['damaged', 'taken'])
def test_what_cannot_start_says_why_in_one_line(folder, fault):
    assert (r := getattr(web_faults, fault)(folder))['ok'], r


def test_a_second_signal_ends_at_once(folder):
    "A client that never finishes its request keeps the first stop waiting"
    import signal
    with web_load.service('--receive-s', '60', '--stop-s', '60') as (p, port):
        with socket.create_connection(('127.0.0.1', port)) as s:
            s.sendall(b'POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\n1')
            time.sleep(.2)
            p.send_signal(signal.SIGTERM)
            time.sleep(.5)
            assert p.poll() is None
            p.send_signal(signal.SIGTERM)
            assert p.wait(5) == 128 + signal.SIGTERM


def test_nothing_is_loaded_or_told_that_should_not_be():
    "Without torch, without the telemetry of onnxruntime; and a machine without Flask is told what to install"
    code = ("import sys\nfor m in ('torch', 'torchvision', 'timm', 'fastai'): sys.modules[m] = None\n"
            'import os, skin_gradcam.serving as s; s.make_explainer(); print(os.environ["ORT_DISABLE_TELEMETRY"])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '1', done.stderr
    done = subprocess.run([sys.executable, '-c', 'import sys\nsys.modules["flask"] = None\n' + web_load.START, 'serve'],
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "pip install 'skin_gradcam[web]'" in done.stderr


# ---------------------------------------------------------------- the stored figures

def test_the_load_holds_its_marks():
    s = json.loads((ROOT / 'results/web_load.json').read_text())
    assert s['limits'] == dict(ratio=.8, tail=4, memory=1.05)
    assert s['passed'] == web_load.passed(s) and all(s['passed'].values())
    assert s['many']['answered'] == s['many']['requests'] == 10_000


def test_the_faults_hold_their_marks():
    s = json.loads((ROOT / 'results/web_faults.json').read_text())
    assert list(s) == [f.__name__ for f in web_faults.FAULTS]
    assert all(f['ok'] and 'skipped' not in f for f in s.values())
