"""How long each notebook takes, run from top to bottom as "Run All Cells" of Jupyter does it, on a fresh checkout.

The claim: from a fresh clone, without the real pictures, every notebook runs to its end in less than three minutes on
two cores, and no cell writes a warning. The checkout lies in a temporary folder with nothing beside it, so that a page
that needs HAM10000 takes the way that a reader without it would see. Pages run one after the other, each in a new
kernel; its start counts.

    python benchmarks/notebook_times.py            # a quarter of an hour; writes results/notebook_times.json
    python benchmarks/notebook_times.py --only nbs/00_lesions.ipynb --out x.json   # into what x.json has already
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 180


def checkout(to: Path) -> list[str]:
    "The tracked files in a folder of their own; the notebooks among them"
    to.mkdir()
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, check=True, capture_output=True).stdout
    tar = ['tar', '--null', '--files-from=-', '-c']
    packed = subprocess.run(tar, cwd=ROOT, input=listed, check=True, capture_output=True).stdout
    subprocess.run(['tar', '-x', '-C', to], input=packed, check=True)
    return sorted(str(f.relative_to(to)) for f in (to / 'nbs').rglob('*.ipynb'))


def run(file: Path) -> dict:
    "Seconds of a run, the error it ended with, and the first lines of what its cells wrote to the error stream"
    book, began = nbformat.read(file, 4), time.perf_counter()
    where = dict(metadata=dict(path=file.parent))
    client = NotebookClient(book, timeout=900, store_widget_state=False, resources=where)
    try: client.execute()
    except CellExecutionError as e: error = str(e)[-300:]
    else: error = ''
    warned = [o['text'].strip().splitlines()[0] for c in book.cells for o in c.get('outputs', ())
              if o.get('name') == 'stderr' and o['text'].strip()]
    return dict(seconds=round(time.perf_counter() - began, 1), error=error, warned=warned)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', nargs='+', metavar='FILE', help='notebooks, as paths in the repository')
    p.add_argument('--out', type=Path, help='JSON to write (default, for all: results/notebook_times.json)')
    p.add_argument('--check', action='store_true', help='exit code 1 if the claim does not hold')
    a = p.parse_args()
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as d:
        repo = Path(d) / 'skin_gradcam'
        found = checkout(repo)
        if unknown := set(a.only or ()) - set(found): p.error(f'no such notebook: {", ".join(sorted(unknown))}')
        os.environ.update(PYTHONPATH=str(repo), HOME=d, MPLCONFIGDIR=f'{d}/mpl', XDG_CACHE_HOME=f'{d}/cache')
        os.environ.pop('SKIN_GRADCAM_DATA', None)
        books = {}
        for name in a.only or found:
            books[name] = b = run(repo / name)
            print(f'{b["seconds"]:7.1f} s  {name}  {b["error"][-80:]} {b["warned"] or ""}', flush=True)
    out = a.out or (None if a.only else ROOT / 'results' / 'notebook_times.json')
    if a.only and out and out.exists(): books = dict(sorted((json.loads(out.read_text())['notebooks'] | books).items()))
    slowest = max(books, key=lambda k: books[k]['seconds'])
    told = dict(limit_s=LIMIT_S, cores=os.cpu_count(), load_before=load, python=platform.python_version(),
                slowest=slowest, total_s=round(sum(b['seconds'] for b in books.values())), notebooks=books)
    if out: out.write_text(json.dumps(told, indent=1) + '\n')
    ok = all(b['seconds'] < LIMIT_S and not b['error'] and not b['warned'] for b in books.values())
    print('holds' if ok else 'does not hold', f'(slowest: {slowest})')
    return int(a.check and not ok)


if __name__ == '__main__': sys.exit(main())
