"""What the web service makes of two cores: throughput beside one process without it, tails, overload, memory.

Claims, for `skin-gradcam serve` with the model that ships, over loopback, drawn pictures of 600x450 pixels in JPEG,
PNG and WebP:

- sixteen clients get at least 0.8 times the pictures a second that one process answers (decoding and model on the same
  files, in two threads); the processor time of the load generator is measured, and its share of the cores taken off;
- at 80 % of that rate the 99th percentile of the time to an answer is at most four times the median, whether pictures
  come evenly or at random (Poisson; a queue without any cost of its own has 3.9 then with two servers, M/D/2);
- beyond what it can do it answers 503 with Retry-After, and nothing else fails;
- of 10,000 answers under load none is another picture's: each is compared with the answer given alone;
- its memory is as large after these 10,000 requests as after the first 1,000 (at most 5 % more), in a service that has
  answered 500 requests of 64 clients before.

The load generator is a process of its own: plain sockets, a thread for each client, each answer parsed and compared. In
each round one process alone and the service take turns, and the figure is the median of the rounds' ratios. Wall clock.
The load of the machine is written down: only ratios measured on a quiet machine are worth quoting. `cpu_ratio` compares
the processor time a picture costs on both sides, which other jobs disturb less.

    python benchmarks/web_load.py            # about ten minutes; writes results/web_load.json
    python benchmarks/web_load.py --quick    # a minute; writes nothing without --out
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = dict(ratio=.8, tail=4, memory=1.05)
KINDS = dict(JPEG=dict(quality=90), PNG={}, WEBP=dict(quality=90))
CLIENTS = 16
START = '''
from skin_gradcam.cli import main
from skin_gradcam.serve_cli import serve_command
main.add_command(serve_command)
main()
'''


# ---------------------------------------------------------------- the service, as a user starts it

def command(*args: str) -> list[str]:
    return [sys.executable, '-c', START, 'serve', '--port', '0', *args]


@contextmanager
def service(*args: str, log: Path | int = subprocess.DEVNULL, **env: str) -> Iterator[tuple[subprocess.Popen, int]]:
    "The running service and its port; stopped with SIGTERM, and killed when that takes more than a minute"
    out = open(log, 'w') if isinstance(log, Path) else log
    p = subprocess.Popen(command(*args), stdout=out, stderr=subprocess.PIPE, text=True,
                         env=os.environ | dict(SKIN_GRADCAM_RATE_LIMIT='') | env)
    try:
        line = p.stderr.readline()
        if not (found := re.search(r':(\d+) ', line)): raise SystemExit(f'the service did not start: {line}')
        yield p, int(found[1])
    finally:
        if p.poll() is None: p.send_signal(signal.SIGTERM)
        try: p.wait(60)
        except subprocess.TimeoutExpired: p.kill()
        p.stderr.close()
        if isinstance(log, Path): out.close()


def used(pid: int) -> dict:
    "Processor seconds and resident bytes of a process"
    import psutil
    p = psutil.Process(pid)
    t = p.cpu_times()
    return dict(cpu=t.user + t.system, rss=p.memory_info().rss)


# ---------------------------------------------------------------- the load generator

def body(picture: bytes) -> bytes:
    "A request with a picture, whole"
    edge = b'----------------------------7f3a91'
    form = (b'--' + edge + b'\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n'
            b'Content-Type: application/octet-stream\r\n\r\n' + picture + b'\r\n--' + edge + b'--\r\n')
    head = ('POST /api/v1/explain HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; '
            f'boundary={edge.decode()}\r\nContent-Length: {len(form)}\r\n\r\n')
    return head.encode() + form


class Client:
    "One connection, opened again when the service has closed it"
    def __init__(self, port: int): self.port, self.s = port, None

    def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        "Status, headers and content; `OSError` when the connection breaks"
        if self.s is None: self.open()
        try: return self._ask(request)
        except OSError:
            self.close()
            raise

    def open(self) -> None:
        self.s = socket.create_connection(('127.0.0.1', self.port), timeout=60)
        self.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        self.s.sendall(request)
        data = b''
        while (end := data.find(b'\r\n\r\n')) < 0: data += self._more()
        first, *lines = data[:end].decode('latin-1').split('\r\n')
        headers = {k.lower(): v for k, v in (line.split(': ', 1) for line in lines)}
        need = end + 4 + int(headers.get('content-length', 0))
        while len(data) < need: data += self._more()
        if headers.get('connection') == 'close': self.close()
        return int(first.split(' ', 2)[1]), headers, data[end + 4:]

    def _more(self) -> bytes:
        if not (got := self.s.recv(2**16)): raise ConnectionResetError('the service closed the connection')
        return got

    def close(self) -> None:
        if self.s is not None: self.s.close()
        self.s = None


class Tally:
    "What the clients saw"
    def __init__(self, expected: list[dict]):
        self.expected, self.lock = expected, threading.Lock()
        self.statuses, self.failed, self.seconds = Counter(), Counter(), []
        self.mixed = self.wrong = self.without = 0

    def add(self, i: int, began: float, got: tuple | OSError) -> None:
        took = time.perf_counter() - began
        with self.lock:
            if isinstance(got, OSError): self.failed[type(got).__name__] += 1; return
            status, headers, content = got
            self.statuses[str(status)] += 1
            if status == 503 and not headers.get('retry-after', '').isdigit(): self.without += 1
            if status == 200:
                self.seconds.append(took)
                self.compare(i, json.loads(content)['answers'][0])

    def compare(self, i: int, a: dict) -> None:
        def same(e: dict) -> bool:
            far = max(abs(e['p'][c] - v) for c, v in a['probabilities'].items())
            return e['decision'] == a['decision'] and far < 1e-4
        if not same(self.expected[i]):
            self.wrong += 1
            self.mixed += any(same(e) for e in self.expected)

    def report(self, wall: float) -> dict:
        s = sorted(self.seconds)
        at = {f'p{q}': round(s[min(len(s) - 1, int(len(s) * q / 100))] * 1e3, 1) for q in (50, 95, 99)} if s else {}
        return dict(wall_s=round(wall, 2), answered=len(s), per_s=round(len(s) / wall, 2), ms=at, wrong=self.wrong,
                    mixed=self.mixed, statuses=dict(self.statuses), failed=dict(self.failed),
                    without_retry_after=self.without)


def generate(folder: Path, port: int, clients: int, total: int, rate: float, arrivals: str, patience: float) -> dict:
    "Ask `total` times; as fast as answers come, or `rate` times a second whether they come or not"
    requests = [body(f.read_bytes()) for f in sorted((folder / 'pictures').iterdir())]
    tally = Tally(json.loads((folder / 'expected.json').read_text()))
    dice, starts, at = random.Random(0), [], 0.
    for _ in range(total if rate else 0):
        at += dice.expovariate(rate) if arrivals == 'poisson' else 1 / rate
        starts.append(at)
    turn, began, lock = iter(range(total)), time.perf_counter() + .1, threading.Lock()

    def run() -> None:
        client = Client(port)
        while True:
            with lock: k = next(turn, None)
            if k is None: break
            start = time.perf_counter()
            if rate:                                       # time counts from when the picture should have been sent
                if (ahead := began + starts[k] - start) > 0: time.sleep(ahead)
                start = began + starts[k]
            i = (k * 7919) % len(requests)
            try: got = client.ask(requests[i])
            except OSError as e: got = e
            tally.add(i, start, got)
            if not isinstance(got, OSError) and got[0] == 503: time.sleep(patience)
        client.close()

    threads = [threading.Thread(target=run) for _ in range(clients)]
    cpu, began = time.process_time(), time.perf_counter() + .1
    for t in threads: t.start()
    for t in threads: t.join()
    wall = time.perf_counter() - began
    return tally.report(wall) | dict(client_cpu_s=round(time.process_time() - cpu, 2))


def load(folder: Path, pid: int, port: int, total: int, clients: int = CLIENTS, rate: float = 0.,
         arrivals: str = 'even', patience: float = .05) -> dict:
    "What a load generator in a process of its own saw, and what the service used meanwhile"
    args = dict(folder=str(folder), port=port, clients=clients, total=total, rate=rate, arrivals=arrivals,
                patience=patience)
    before = used(pid)
    done = subprocess.run([sys.executable, __file__, '--generate', json.dumps(args)], capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'the load generator failed: {done.stderr}')
    got, after = json.loads(done.stdout), used(pid)
    return got | dict(service_cpu_s=round(after['cpu'] - before['cpu'], 2), rss_mb=round(after['rss'] / 1e6, 1))


# ---------------------------------------------------------------- one process without a service

PEER = '''
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from skin_gradcam.bundle import default_bundle
from skin_gradcam.inference import Explainer
from skin_gradcam.runtime import runtime_backend
files = [f.read_bytes() for f in sorted(Path(sys.argv[1]).iterdir())]
bundle = default_bundle()
one = Explainer(bundle, runtime_backend(bundle, 1))
def answer(i): return one(files[i % len(files)], name='x', keep_side=0).top
def threads(n):
    with ThreadPoolExecutor(2) as pool: list(pool.map(answer, range(n)))
def stream(n):
    for _ in one.explain_many([('x', files[i % len(files)]) for i in range(n)], keep_side=0): pass
threads(8)
for line in sys.stdin:
    n, result = int(line), {}
    for f in (threads, stream):
        cpu, began = time.process_time(), time.perf_counter()
        f(n)
        wall = time.perf_counter() - began
        result[f.__name__] = dict(per_s=n/wall, cpu_ms=(time.process_time() - cpu)/n*1e3)
    print(json.dumps(result), flush=True)
'''


class Alone:
    "The same pictures in one process: two threads that decode and run the model, and `explain_many`"
    def __init__(self, folder: Path):
        self.p = subprocess.Popen([sys.executable, '-c', PEER, folder / 'pictures'], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)

    def __call__(self, n: int) -> dict:
        self.p.stdin.write(f'{n}\n')
        self.p.stdin.flush()
        return json.loads(self.p.stdout.readline())

    def __enter__(self) -> Alone: return self
    def __exit__(self, *_) -> None:
        self.p.stdin.close()
        self.p.wait()


# ---------------------------------------------------------------- what is measured

def prepare(folder: Path, n: int) -> None:
    "Pictures and what the explainer says about each of them alone"
    from PIL import Image

    from skin_gradcam.inference import Explainer
    from skin_gradcam.lesions import CLASSES
    from skin_gradcam.phantoms import draw_phantom
    (folder / 'pictures').mkdir()
    explainer, expected = Explainer.load(backend='runtime'), []
    for i in range(n):
        kind = list(KINDS)[i % 3]
        file = folder / 'pictures' / f'{i:03d}.{kind.lower()}'
        drawn = draw_phantom(CLASSES[i // 3 % 3], seed=i, width=600, height=450)
        Image.fromarray(drawn.image).save(file, kind, **KINDS[kind])
        e = explainer(file, keep_side=0)
        expected.append(dict(decision=e.decision, p=e.probabilities))
    (folder / 'expected.json').write_text(json.dumps(expected))


def distinct(folder: Path) -> float:
    "Smallest difference of the answers to two pictures: under 1e-4 a mixed answer could go unnoticed"
    ps = [list(e['p'].values()) for e in json.loads((folder / 'expected.json').read_text())]
    return min(max(abs(a - b) for a, b in zip(p, q)) for i, p in enumerate(ps) for q in ps[:i])


def throughput(folder: Path, pid: int, port: int, rounds: int, n: int) -> dict:
    "Rounds of one process alone and the service with sixteen clients"
    rows = []
    load(folder, pid, port, 2 * CLIENTS)
    with Alone(folder) as alone:
        for _ in range(rounds):
            peer = alone(n)
            best = max(peer.values(), key=lambda r: r['per_s'])
            got = load(folder, pid, port, n)
            cores = len(os.sched_getaffinity(0))
            own = got['wall_s'] - got['client_cpu_s'] / cores      # what was left of the machine for the service
            rows.append(dict(alone_per_s={k: round(v['per_s'], 2) for k, v in peer.items()}, service_per_s=got['per_s'],
                             plain_ratio=round(got['per_s'] / best['per_s'], 3),
                             ratio=round(n / own / best['per_s'], 3),
                             alone_cpu_ms=round(best['cpu_ms'], 2),
                             service_cpu_ms=round(got['service_cpu_s'] / n * 1e3, 2),
                             client_cpu_ms=round(got['client_cpu_s'] / n * 1e3, 2), ms=got['ms']))
            if got['answered'] != n: raise SystemExit(f'not all requests were answered: {got}')
    def median(key: str) -> float: return round(statistics.median(r[key] for r in rows), 3)
    cpu_ratio = statistics.median(r['alone_cpu_ms'] / r['service_cpu_ms'] for r in rows)
    return dict(clients=CLIENTS, pictures=n, per_s=median('service_per_s'), ratio=median('ratio'),
                plain_ratio=median('plain_ratio'), cpu_ratio=round(cpu_ratio, 3), rounds=rows)


def tails(folder: Path, pid: int, port: int, rate: float, n: int) -> list[dict]:
    "Times to an answer when pictures come at a given rate: evenly, and at random"
    rows = []
    for arrivals in ('even', 'poisson'):
        got = load(folder, pid, port, n, clients=64, rate=rate, arrivals=arrivals)
        rows.append(dict(arrivals=arrivals, rate=round(rate, 1), tail=round(got['ms']['p99'] / got['ms']['p50'], 2),
                         **{k: got[k] for k in ('answered', 'ms', 'statuses', 'failed', 'wrong')}))
    return rows


def many(folder: Path, pid: int, port: int, n: int, parts: int) -> dict:
    "Answers compared one by one, and the memory after each part; a service that has served before"
    load(folder, pid, port, n // parts // 2, clients=64)
    got = [load(folder, pid, port, n // parts) for _ in range(parts)]
    rss = [g['rss_mb'] for g in got]
    return dict(requests=n, answered=sum(g['answered'] for g in got), mixed=sum(g['mixed'] for g in got),
                wrong=sum(g['wrong'] for g in got), rss_mb=rss, memory=round(max(rss[-3:]) / rss[0], 3))


def measure(rounds: int, n: int, total: int, parts: int, pictures: int) -> dict:
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        prepare(folder, pictures)
        with service() as (p, port):
            found = dict(pictures=pictures, least_difference=round(distinct(folder), 5))
            found['throughput'] = throughput(folder, p.pid, port, rounds, n)
            found['tails'] = tails(folder, p.pid, port, .8 * found['throughput']['per_s'], n)
            found['overload'] = load(folder, p.pid, port, 4 * n, clients=128)
        found['exit_code'] = p.returncode
        with service() as (p, port): found['many'] = many(folder, p.pid, port, total, parts)
    return found


def passed(f: dict) -> dict[str, bool]:
    "Which claims hold"
    o, m = f['overload'], f['many']
    return dict(ratio=f['throughput']['ratio'] >= LIMITS['ratio'],
                tail=all(set(t['statuses']) == {'200'} and t['tail'] <= LIMITS['tail'] for t in f['tails']),
                overload=set(o['statuses']) == {'200', '503'} and not (o['failed'] or o['without_retry_after']
                                                                       or o['wrong']),
                mixed=not m['wrong'] and m['answered'] == m['requests'] and f['least_difference'] > 1e-4,
                memory=m['memory'] <= LIMITS['memory'], stop=f['exit_code'] == 0)


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('--quick', action='store_true', help='few requests; no verdict on the marks')
    p.add_argument('--out', type=Path, help='where to write the JSON')
    p.add_argument('--generate', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.generate:
        given = json.loads(args.generate)
        print(json.dumps(generate(**given | dict(folder=Path(given['folder'])))))
        return 0
    before = os.getloadavg()
    sizes = dict(rounds=15, n=300, total=10_000, parts=10, pictures=60)
    if args.quick: sizes = dict(rounds=1, n=96, total=400, parts=4, pictures=12)
    found = measure(**sizes)
    found |= dict(limits=LIMITS, passed=passed(found), load_before=[round(v, 2) for v in before],
                  load_after=[round(v, 2) for v in os.getloadavg()], cores=len(os.sched_getaffinity(0)),
                  machine=platform.machine(), python=platform.python_version())
    print(json.dumps(found, indent=1))
    out = args.out or (None if args.quick else ROOT / 'results/web_load.json')
    if out: out.write_text(json.dumps(found, indent=1) + '\n')
    return 0 if args.quick or all(found['passed'].values()) else 1


if __name__ == '__main__': sys.exit(main())
