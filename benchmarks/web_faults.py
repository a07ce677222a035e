"""What happens to the web service, and to those who ask it, when something goes wrong. Each fault as documented:

- `stopped`: SIGTERM while sixteen clients ask. Who was let in gets an answer, the right one; the exit code is 0.
- `killed`: SIGKILL while they ask. Their connections break, nothing is left on disk, the next start answers as before.
- `gone`: clients hang up in the middle of an upload or while they wait. No thread, file or place in the queue is lost.
- `slow`: fifty clients send a byte now and then. Others are served meanwhile, and the fifty are cut with 408.
- `full`: the disk for temporary files is full. Uploads of any allowed size are answered: nothing is written.
- `damaged`: a model file with one changed byte. Exit code 2 and one line that names the file; the port is never opened.
- `taken`: the port is in use. Exit code 2 and one line.

    python benchmarks/web_faults.py            # two minutes; writes results/web_faults.json
    python benchmarks/web_faults.py --only stopped full
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from web_load import Client, Tally, body, command, load, prepare, service

ROOT = Path(__file__).resolve().parent.parent


def requests_of(folder: Path) -> list[bytes]:
    return [body(f.read_bytes()) for f in sorted((folder / 'pictures').iterdir())]


def tally_of(folder: Path) -> Tally: return Tally(json.loads((folder / 'expected.json').read_text()))


class Askers:
    "Clients that ask, each time on a connection of its own, until the service is not there any more"
    def __init__(self, folder: Path, port: int, n: int):
        self.requests, self.tally, self.port, self.ended = requests_of(folder), tally_of(folder), port, Counter()
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(n)]
        for t in self.threads: t.start()

    def run(self, i: int) -> None:
        while True:
            i = (i + 1) % len(self.requests)
            client = Client(self.port)
            try: client.open()
            except OSError as e:
                self.ended[type(e).__name__] += 1
                return
            began = time.perf_counter()
            try: got = client.ask(self.requests[i])
            except OSError as e: got = e
            self.tally.add(i, began, got)
            client.close()

    def wait(self, answers: int) -> None:
        while len(self.tally.seconds) < answers: time.sleep(.01)

    def join(self) -> dict:
        for t in self.threads: t.join()
        return self.tally.report(1) | dict(ended=dict(self.ended))


def one_answer(folder: Path, port: int) -> bool:
    "Whether the service answers a picture rightly"
    tally = tally_of(folder)
    client = Client(port)
    tally.add(0, 0., client.ask(requests_of(folder)[0]))
    client.close()
    return tally.statuses == {'200': 1} and not tally.wrong


def open_things(pid: int) -> dict[str, int]:
    "Threads and files of a process"
    import psutil
    p = psutil.Process(pid)
    return dict(threads=p.num_threads(), files=p.num_fds())


def settled(f: Callable[[], bool], seconds: float = 15) -> bool:
    "Whether something becomes true in time"
    end = time.monotonic() + seconds
    while not (ok := f()) and time.monotonic() < end: time.sleep(.05)
    return ok


# ---------------------------------------------------------------- the faults

def stopped(folder: Path, clients: int = 16, answers: int = 64, times: int = 5) -> dict:
    "SIGTERM under load"
    rows = []
    for _ in range(times):
        with service() as (p, port):
            askers = Askers(folder, port, clients)
            askers.wait(answers)
            began = time.monotonic()
            p.send_signal(signal.SIGTERM)
            code = p.wait(60)
            took = time.monotonic() - began
            got = askers.join()
        rows.append(dict(answered=got['answered'], wrong=got['wrong'], lost=sum(got['failed'].values()),
                         statuses=got['statuses'], ended=got['ended'], exit_code=code, stop_s=round(took, 2)))
    good = [r['exit_code'] == 0 and not r['wrong'] and not r['lost'] and set(r['statuses']) == {'200'}
            and r['ended'] == {'ConnectionRefusedError': clients} for r in rows]
    return dict(runs=rows, ok=all(good))


def killed(folder: Path, clients: int = 16, answers: int = 32) -> dict:
    "SIGKILL under load, and a new start"
    with tempfile.TemporaryDirectory() as tmp:
        with service(TMPDIR=tmp) as (p, port):
            askers = Askers(folder, port, clients)
            askers.wait(answers)
            p.kill()
            p.wait()
            got = askers.join()
        left = os.listdir(tmp)
    began = time.monotonic()
    with service() as (_, port):
        ready = time.monotonic() - began
        again = one_answer(folder, port)
    return dict(answered=got['answered'], wrong=got['wrong'], broken=sum(got['failed'].values()), left_on_disk=left,
                start_s=round(ready, 2), answers_again=again, ok=again and not left and not got['wrong'])


def gone(folder: Path, clients: int = 50) -> dict:
    "Clients that hang up"
    request = requests_of(folder)[0]
    with tempfile.TemporaryDirectory() as tmp, service(log=Path(tmp) / 'log') as (p, port):
        for _ in range(2): one_answer(folder, port)
        before = open_things(p.pid)
        for part in (len(request) // 2, len(request)):       # in the middle of the upload, and waiting
            socks = [socket.create_connection(('127.0.0.1', port)) for _ in range(clients)]
            for s in socks: s.sendall(request[:part])
            if part == len(request): time.sleep(.05)             # too short for all of them to be answered
            for s in socks: s.close()
        settled(lambda: open_things(p.pid)['files'] <= before['files'])
        after, again = open_things(p.pid), one_answer(folder, port)
        rows = [json.loads(line) for line in (Path(tmp) / 'log').read_text().splitlines()]
    runs = sum(r.get('decisions', 0) for r in rows) - 3
    kept = all(after[k] <= before[k] for k in before)
    return dict(hung_up=2 * clients, before=before, after=after, answers_for_nobody=runs, answers_again=again,
                ok=again and kept and runs < clients)


def slow(folder: Path, clients: int = 50, limit: float = 3.) -> dict:
    "Clients that send a byte now and then"
    request, cut = requests_of(folder)[0], []
    def creep(s: socket.socket) -> None:
        began = time.monotonic()
        s.settimeout(.2)
        s.sendall(request[:300])
        for k in range(300, 600):
            try:
                s.sendall(request[k:k + 1])
                got = s.recv(4096)
            except TimeoutError: continue
            except OSError: got = b''
            cut.append((got[9:12].decode(), time.monotonic() - began))
            break
        s.close()
    with service(SKIN_GRADCAM_RECEIVE_S=str(limit)) as (p, port):
        socks = [socket.create_connection(('127.0.0.1', port)) for _ in range(clients)]
        threads = [threading.Thread(target=creep, args=(s,)) for s in socks]
        for t in threads: t.start()
        meanwhile = load(folder, p.pid, port, 32)
        for t in threads: t.join()
        again = one_answer(folder, port)
    worst, how = max(t for _, t in cut), Counter(s for s, _ in cut)
    return dict(clients=clients, limit_s=limit, cut=dict(how), latest_s=round(worst, 2),
                meanwhile={k: meanwhile[k] for k in ('answered', 'statuses', 'ms')}, answers_again=again,
                ok=again and how == {'408': clients} and worst < limit + 3 and meanwhile['answered'] == 32)


def full(folder: Path) -> dict:
    "A full disk for temporary files"
    import numpy as np
    from PIL import Image
    big = folder / 'big.bmp'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1700, 2000, 3), dtype=np.uint8)).save(big)
    sys.path.insert(0, str(ROOT / 'tests'))
    from disks import disk_of_1_mib
    limited: list[bool] = []
    with tempfile.TemporaryDirectory() as tmp:
        place = Path(tmp) / 'full'
        with disk_of_1_mib(place, lambda: limited.append(True)):
            if limited: return dict(skipped='no file system can be mounted here', ok=True)
            try: (place / 'all').write_bytes(bytes(2**21))
            except OSError: pass
            with service(TMPDIR=str(place), TEMP=str(place), TMP=str(place)) as (p, port):
                small = one_answer(folder, port)
                client = Client(port)
                status, _, said = client.ask(body(big.read_bytes()))
                refused = client.ask(body(bytes(13 * 2**20)))[0]
                client.close()
            left = sorted(os.listdir(place))
    return dict(small=small, megabytes=round(big.stat().st_size / 1e6, 1), status=status, too_large=refused, files=left,
                ok=small and status == 200 and refused == 413 and left == ['all'])


def failed_start(*args: str) -> dict:
    "Exit code and what was said"
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=60)
    return dict(exit_code=done.returncode, said=done.stderr.strip().splitlines())


def damaged(folder: Path) -> dict:
    "A model file with a changed byte"
    from skin_gradcam.bundle import default_bundle
    bad = folder / 'bundle'
    shutil.copytree(default_bundle().folder, bad)
    data = bytearray((bad / 'model.onnx').read_bytes())
    data[len(data) // 2] ^= 1
    (bad / 'model.onnx').write_bytes(data)
    got = failed_start('--bundle', str(bad))
    said = [line.replace(str(folder), '...') for line in got['said']]
    return dict(**got | dict(said=said), ok=got['exit_code'] == 2 and len(said) == 1 and 'model.onnx' in said[0])


def taken(folder: Path) -> dict:
    "A port in use"
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = str(s.getsockname()[1])
        got = failed_start('--port', port)
    said = [line.replace(port, '8000') for line in got['said']]
    return dict(**got | dict(said=said), ok=got['exit_code'] == 2 and len(said) == 1 and 'cannot listen' in said[0])


FAULTS = [stopped, killed, gone, slow, full, damaged, taken]


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    names = {f.__name__: f for f in FAULTS}
    p.add_argument('--only', nargs='+', choices=names, help='only these; writes nothing without --out')
    p.add_argument('--out', type=Path, help='where to write the JSON')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        prepare(folder, 6)
        found = {n: dict(fault=names[n].__doc__, **names[n](folder)) for n in args.only or names}
    print(json.dumps(found, indent=1))
    out = args.out or (None if args.only else ROOT / 'results/web_faults.json')
    if out: out.write_text(json.dumps(found, indent=1) + '\n')
    return 0 if all(f['ok'] for f in found.values()) else 1


if __name__ == '__main__': sys.exit(main())
