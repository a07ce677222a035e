#!/usr/bin/env python
"""Check the repository itself: what a reader must not meet, and what a page or a module must be.

    python tools/check_repo.py            # list every problem with its file and cell, exit 1 if there is one
    python tools/check_repo.py --stats    # also a table of the notebooks: exported cells, their length, prose, tests
    python tools/check_repo.py --only names sizes ...    # some of the checks (--help lists them)

Looks at the files that git knows or would add. To add a check, write a generator of lines and list it in `CHECKS`.
"""
from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB = 'skin_gradcam'
TORCH_FREE = ('lesions files pictures cache phantoms readers downloads data overview sources checks bundle evaluation '
              'calibration stress display abstention runtime viewer inference bulk assessment reports run_reports '
              'cards demo_logic widgets batching web_guard web_views webapp serving serve_cli data_cli runs_cli '
              'trials_cli scale_cli cli').split()
TORCH = ('torch', 'torchvision', 'fastai', 'timm')
FIGURE_BYTES, CELL_BYTES, FILE_BYTES = 60_000, 150_000, 12_000_000
LONGEST, MEDIAN = 50, 12  # lines of an exported cell
PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif')
PICTURE_HOMES = ('nbs/images/', f'{LIB}/assets/', f'{LIB}/static/')
# put together from parts, so that this file passes its own checks
MACHINE_PATH = re.compile(r'(?<![\w.\-/:<~%*])/(?:(?:work|root|tmp)(?![\w-])|(?:home|Users)/\w)')
HOSTS = 'pypi_.org python_hosted.org npm_js.org npm_js.com deb._debian.org conda._anaconda.org crates_.io'
REGISTRY = re.compile('|'.join(map(re.escape, HOSTS.replace('_', '').split())), re.I)
TRACEBACK = 'Traceback ' + '(most recent call last)'


# ---------------------------------------------------------------- what there is

@dataclass
class Cell:
    "A notebook cell: `where` names it in messages"
    where: str
    kind: str
    source: str
    outputs: list[dict]

    @property
    def directives(self) -> set[str]: return set(re.findall(r'^#\|\s*([\w-]+)', self.source, re.M))

    @property
    def exported(self) -> bool: return self.kind == 'code' and bool({'export', 'exports', 'exporti'} & self.directives)

    @property
    def lines(self) -> int: return sum(bool(s.strip()) and not s.startswith('#|') for s in self.source.splitlines())

    @cached_property
    def tree(self) -> list[ast.stmt]:
        if self.kind != 'code': return []
        try: return ast.parse(re.sub(r'^[%!].*$', '', self.source, flags=re.M)).body
        except SyntaxError: return []


def files() -> list[str]:
    "Paths of the files git knows or would add, relative to the root"
    command = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(f for f in set(out.split('\0')) if f and (ROOT / f).is_file())


def notebooks() -> dict[str, list[Cell]]:
    "The cells of every notebook"
    books = {}
    for f in files():
        if not f.endswith('.ipynb'): continue
        cells = json.loads((ROOT / f).read_text(encoding='utf-8'))['cells']
        books[f] = [Cell(f'{f} cell {i} ({c.get("id")})', c['cell_type'], ''.join(c['source']), c.get('outputs', []))
                    for i, c in enumerate(cells)]
    return books


def cells() -> Iterator[Cell]:
    for book in notebooks().values(): yield from book


def texts(output: dict) -> Iterator[str]:
    "The readable parts of a saved output, embedded pictures left out"
    data = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/') or k == 'image/svg+xml'}
    for part in [output.get('text', ''), *data.values()]:
        text = part if isinstance(part, str) else ''.join(part) if isinstance(part, list) else json.dumps(part)
        yield re.sub(r'base64,[A-Za-z0-9+/=\s]+', 'base64,', text)


def figures(output: dict) -> Iterator[bytes]:
    "The pictures of a saved output, those inside HTML too"
    data = output.get('data', {})
    for mime in ('image/png', 'image/jpeg'):
        if mime in data: yield base64.b64decode(''.join(data[mime]))
    for mime in ('text/html', 'text/markdown'):
        yield from map(base64.b64decode, re.findall(r'base64,([A-Za-z0-9+/=\s]+)', ''.join(data.get(mime, ''))))


def plain_files() -> Iterator[tuple[str, str]]:
    "Name and text of every text file that is no notebook"
    for f in files():
        if f.endswith('.ipynb') or f.lower().endswith(PICTURES): continue
        try: yield f, (ROOT / f).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue


def lines_with(pattern: re.Pattern, text: str) -> Iterator[tuple[int, str]]:
    "Number and match of every line of `text` in which `pattern` is found"
    for n, line in enumerate(text.splitlines(), 1):
        if m := pattern.search(line): yield n, re.split(r'\s', line[m.start():m.start() + 60])[0]


# ---------------------------------------------------------------- the checks


def paths() -> Iterator[str]:
    "no path of one machine in a file or a saved output"
    for f, text in plain_files():
        for n, s in lines_with(MACHINE_PATH, text): yield f'{f}:{n}: machine path {s!r}'
    for c in cells():
        for n, s in lines_with(MACHINE_PATH, c.source): yield f'{c.where} line {n}: machine path {s!r}'
        for o in c.outputs:
            for t in texts(o):
                for _, s in lines_with(MACHINE_PATH, t): yield f'{c.where}: machine path in the output: {s!r}'


def clean_outputs() -> Iterator[str]:
    "no error, warning or half-drawn progress bar among the saved outputs"
    for c in cells():
        for o in c.outputs:
            if o['output_type'] == 'error': yield f'{c.where}: the output is an error: {o.get("ename")}'
            if o.get('name') == 'stderr': yield f'{c.where}: stderr in the output: {"".join(o["text"])[:80]!r}'
            for t in texts(o):
                if TRACEBACK in t: yield f'{c.where}: a traceback in the output'
                if '\r' in t: yield f'{c.where}: a progress bar in the output'


def sizes() -> Iterator[str]:
    "figures, cells and files of a size that git and a reader can bear"
    for c in cells():
        for o in c.outputs:
            for fig in figures(o):
                if (n := len(fig)) > FIGURE_BYTES: yield f'{c.where}: a figure of {n} bytes (at most {FIGURE_BYTES})'
        n = len(json.dumps(c.outputs))
        if n > CELL_BYTES: yield f'{c.where}: {n} bytes of output (at most {CELL_BYTES})'
    for f in files():
        if (n := (ROOT / f).stat().st_size) > FILE_BYTES: yield f'{f}: {n} bytes (at most {FILE_BYTES})'


def data_set() -> Path | None:
    "The real pictures, where this machine has them"
    try:
        from skin_gradcam.data import real_data
    except ImportError:
        return None
    return real_data()


def photographs() -> Iterator[str]:
    "no photograph of the data set: by name, by place, and by content where the data set is at hand"
    mine = {}
    for f in files():
        if re.search(r'ISIC_\d', Path(f).name): yield f'{f}: named like a picture of the data set'
        if f.lower().endswith(PICTURES):
            mine[hashlib.sha256((ROOT / f).read_bytes()).hexdigest()] = f
            if not f.startswith(PICTURE_HOMES): yield f'{f}: pictures live in {", ".join(PICTURE_HOMES)}'
    mine |= {hashlib.sha256(fig).hexdigest(): c.where for c in cells() for o in c.outputs for fig in figures(o)}
    if not mine or (root := data_set()) is None: return
    for p in root.rglob('*'):
        if p.suffix.lower() not in PICTURES: continue
        if twin := mine.get(hashlib.sha256(p.read_bytes()).hexdigest()): yield f'{twin}: is {p.name} of the data set'


def cell_lengths() -> Iterator[str]:
    "exported cells short enough to read: one idea each"
    lengths = []
    for c in cells():
        if not c.exported: continue
        lengths.append(c.lines)
        if c.lines > LONGEST: yield f'{c.where}: an exported cell of {c.lines} lines (at most {LONGEST})'
    if lengths and (m := statistics.median(lengths)) > MEDIAN:
        yield f'nbs: the median exported cell has {m:g} lines (at most {MEDIAN}); --stats shows where'


def page_form() -> Iterator[str]:
    "pages as nbdev reads them"
    for f, book in notebooks().items():
        first = book[0].source.strip() if book else ''
        if not re.fullmatch(r'# \S.*\n+> \S.*(\n+- [\w-]+: .*)*', first):
            yield f'{f} cell 0: must be "# Title", "> one line" and nothing else: the docs drop the rest of this cell'
        for c in book:
            imports = sum(isinstance(n, ast.Import | ast.ImportFrom) for n in c.tree)
            never_run = 'nbdev_export()' in c.source or re.search(r'^#\|\s*eval:\s*false', c.source, re.M)
            blocks = [n for n in c.tree if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
            inside = not re.search(r'^#\|\s*export', c.source, re.M) and any(
                isinstance(n, ast.Import | ast.ImportFrom) for top in blocks for n in ast.walk(top) if n is not top)
            if (0 < imports < len(c.tree) or inside) and not never_run:
                yield f'{c.where}: imports and other code in one cell: the docs build runs it and replaces its output'
            if 'default_exp' in c.directives and c.kind == 'code' and c.lines:
                yield f'{c.where}: #| default_exp stands alone in its cell'
    link = ROOT / 'nbs/_quarto.yml'
    if not link.is_symlink() or link.readlink() != Path('../_quarto.yml'):
        yield 'nbs/_quarto.yml: must be a symbolic link to ../_quarto.yml'


def registries() -> Iterator[str]:
    "no host of a package registry"
    for f, text in plain_files():
        for n, s in lines_with(REGISTRY, text): yield f'{f}:{n}: names a package registry: {s!r}'
    for c in cells():
        for t in [c.source, *[t for o in c.outputs for t in texts(o)]]:
            for _, s in lines_with(REGISTRY, t): yield f'{c.where}: names a package registry: {s!r}'


def one_version() -> Iterator[str]:
    "the version stands in the package's __init__.py and nowhere else"
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / LIB / '__init__.py').read_text(), re.M)
    if not found:
        yield f'{LIB}/__init__.py: no line __version__ = "..."'
        return
    second = re.compile(r'^\s*version\s*[=:]\s*["\']?\d')
    literal = re.compile(rf'["\']{re.escape(found[1])}["\']')
    for f, text in plain_files():
        if f in ('settings.ini', 'pyproject.toml', 'setup.py', '_quarto.yml'):
            for n, s in lines_with(second, text): yield f'{f}:{n}: a second version: {s!r}'
        if f.startswith(f'{LIB}/') and f.endswith('.py') and f != f'{LIB}/__init__.py':
            for n, _ in lines_with(literal, text): yield f'{f}:{n}: the version written out: use __version__'
        if f == 'CHANGELOG.md' and f'[{found[1]}]' not in text: yield f'CHANGELOG.md: no section [{found[1]}]'


PROBE = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
asked = []
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {torch}:
            asked.append(name)
            raise ImportError(f'{{name}} must not be imported here')
sys.meta_path.insert(0, Refuse())
problems = []
for m in {modules}:
    del asked[:]
    try: importlib.import_module('{lib}.' + m)
    except Exception as e: problems.append(f'{lib}/{{m}}.py: importing it without torch: {{type(e).__name__}}: {{e}}')
    else: problems += [f'{lib}/{{m}}.py: importing it asks for {{a}}' for a in dict.fromkeys(asked)]
print(json.dumps(problems))
"""


def torch_free() -> Iterator[str]:
    "modules that serve without torch import without torch"
    code = PROBE.format(torch=TORCH, modules=TORCH_FREE, lib=LIB)
    run = subprocess.run([sys.executable, '-c', code, str(ROOT)], capture_output=True, text=True, cwd=ROOT)
    if run.returncode: yield f'importing modules without torch ended with {run.stderr.strip().splitlines()[-1:]}'
    else: yield from json.loads(run.stdout.splitlines()[-1])


def imported(text: str) -> Iterator[tuple[int, str]]:
    "Line and name of every package outside the standard library that a module imports"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module or '']
        else: continue
        for top in {n.split('.')[0] for n in names} - sys.stdlib_module_names - {LIB}: yield node.lineno, top


def declared() -> Iterator[str]:
    "every package that the library imports is among the requirements in settings.ini"
    def canonical(name: str) -> str: return re.sub(r'[-_.]+', '-', name).lower()
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    asked = ' '.join(v for k, v in ini['DEFAULT'].items() if k.endswith('requirements') and k != 'dev_requirements')
    required = {canonical(re.split(r'[<>=!~\[;]', r)[0]) for r in asked.split()}
    installed = packages_distributions()
    for f, text in plain_files():
        if not (f.startswith(f'{LIB}/') and f.endswith('.py')): continue
        for n, top in imported(text):
            if not required & {canonical(d) for d in installed.get(top, [top])}:
                yield f'{f}:{n}: imports {top}, which settings.ini does not require'


CHECKS = [paths, clean_outputs, sizes, photographs, cell_lengths, page_form, registries, one_version, torch_free,
          declared]


def stats() -> None:
    "A table of the notebooks; the lines of a cell are those that are not blank"
    row = '{:32}' + 6 * '{:>8}'
    print(row.format('notebook', 'exports', 'median', 'longest', 'prose', 'asserts', 'kB'))
    tests = re.compile(r'^\s*(?:assert\b|test_\w+\(|with expect_fail)', re.M)
    for f, book in notebooks().items():
        lengths = [c.lines for c in book if c.exported]
        middle = f'{statistics.median(lengths):g}' if lengths else ''
        asserts = sum(len(tests.findall(c.source)) for c in book if c.kind == 'code')
        prose = sum(c.kind == 'markdown' for c in book)
        kb = (ROOT / f).stat().st_size // 1000
        print(row.format(f.removeprefix('nbs/'), len(lengths), middle, max(lengths, default=''), prose, asserts, kb))


def main() -> int:
    names = {c.__name__: c for c in CHECKS}
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = 'checks:\n' + '\n'.join(f'  {n:14} {c.__doc__}' for n, c in names.items())
    p.add_argument('--stats', action='store_true', help='also print a table of the notebooks')
    p.add_argument('--only', nargs='+', choices=names, metavar='CHECK', help='only these checks')
    args = p.parse_args()
    if args.stats: stats()
    found = [p for n in args.only or names for p in dict.fromkeys(names[n]())]
    print('\n'.join(found) or f'repository: no problem ({len(args.only or names)} checks, {len(files())} files)')
    return int(bool(found))


if __name__ == '__main__': sys.exit(main())
