#!/usr/bin/env python
"""Build README.md from `nbs/index.ipynb` and the docs site from all notebooks.

    python tools/build_docs.py                 # README.md, then the site in _docs/
    python tools/build_docs.py --readme-only   # README.md and its pictures, within a second
    python tools/build_docs.py --site-only     # the site alone
    python tools/build_docs.py --check         # exit 1, naming the first line that differs, if README.md is stale

The site is rendered by `nbdev-docs` where the quarto binary is installed, else from the same processed notebooks by
smalldocs. README.md is written here on every machine, so that `--check` means the same everywhere. Formulas become
MathML, and the script that draws diagrams is fetched once from npm and kept with the site: the pages load nothing from
the network. Each page links to its notebook. Links that leave `nbs/` (source code, CONTRIBUTING.md) lead to pages made
from those files. The order of the pages stands in `_quarto.yml`.
"""
from __future__ import annotations

import argparse
import ast
import base64
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\(|\b(?:src|href)=")([^)\s"]+)')
FENCE = re.compile(r'^(```.*?^```)', re.M | re.S)
REBUILD = 'python tools/build_docs.py --readme-only'
MIMES = {'image/png': 'png', 'image/jpeg': 'jpg'}

# ---------------------------------------------------------------- README.md


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#| key: value` lines at the top of a cell, and the source without them"
    found = re.findall(r'^#\|[ \t]*([\w-]+):?[ \t]*(.*)$', source, re.M)
    return dict(found), re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()


def from_root(text: str, folder: str = 'nbs') -> str:
    "Markdown written in `folder`, its relative links rewritten so that they work from the repository's root"
    def fix(m: re.Match) -> str:
        if re.match(r'[a-z][a-z0-9+.-]*:|[/#]', m[2]): return m[0]
        path, mark, anchor = m[2].partition('#')
        return m[1] + posixpath.normpath(posixpath.join(folder, path)) + mark + anchor
    parts = FENCE.split(text)
    return ''.join(p if p.startswith('```') else LINK.sub(fix, p) for p in parts)


def fenced(text: str, language: str = '') -> str:
    return f'```{language}\n{text.rstrip()}\n```'


def output_md(output: dict, picture: str, alt: str, pictures: dict[str, bytes]) -> str | None:
    "One saved output as Markdown; a picture goes into `pictures` under the path `picture` plus its suffix"
    if output['output_type'] == 'stream': return fenced(''.join(output['text'])) if output['name'] == 'stdout' else None
    if output['output_type'] == 'error': raise SystemExit('nbs/index.ipynb: an output is an error: run the page')
    data = {k: v if isinstance(v, str) else ''.join(v) for k, v in output['data'].items() if isinstance(v, str | list)}
    if 'text/markdown' in data: return from_root(data['text/markdown'])
    for mime, suffix in MIMES.items():
        if mime in data:
            pictures[f'{picture}.{suffix}'] = base64.b64decode(data[mime])
            return f'![{alt}]({picture}.{suffix})'
    table = data.get('text/html', '')
    if '<table' in table and 'data:' not in table: return re.sub(r'<style.*?</style>', '', table, flags=re.S).strip()
    return fenced(data['text/plain']) if 'text/plain' in data else None


def readme_parts(cells: list[dict], pictures: dict[str, bytes]) -> Iterator[str]:
    "README.md paragraph by paragraph"
    for cell in cells:
        options, source = directives(''.join(cell['source']))
        if {'hide', 'default_exp', 'export'} & options.keys() or options.get('include') == 'false': continue
        if cell['cell_type'] == 'markdown': yield from_root(source)
        if cell['cell_type'] != 'code': continue
        if options.get('echo') != 'false' and source: yield fenced(source, 'python')
        if options.get('output') == 'false': continue
        for out in cell['outputs']:
            name = f'nbs/images/index-{len(pictures) + 1}'
            yield output_md(out, name, options.get('fig-alt', 'output of the code above').strip('"\''), pictures) or ''


def readme(index: Path = ROOT / 'nbs/index.ipynb') -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the pictures among the saved outputs by path"
    cells = json.loads(index.read_text(encoding='utf-8'))['cells']
    pictures: dict[str, bytes] = {}
    title, _, rest = ''.join(cells[0]['source']).partition('\n')
    parts = [title, '<!-- Generated from nbs/index.ipynb: edit that page, then run `python tools/build_docs.py` -->',
             from_root(rest.strip()), *readme_parts(cells[1:], pictures)]
    return '\n\n'.join(p for p in parts if p) + '\n', pictures


def write_readme() -> None:
    text, pictures = readme()
    (ROOT / 'README.md').write_text(text, encoding='utf-8')
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    print('wrote', ', '.join(['README.md', *pictures]))


def check_readme() -> int:
    "0 if README.md and its pictures are what `write_readme` would write, else 1 with the first difference"
    text, pictures = readme()
    path = ROOT / 'README.md'
    old = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    for n, (has, wants) in enumerate(zip([*old, None], [*text.splitlines(), None], strict=False), 1):
        if has != wants:
            print(f'README.md:{n}: is {has!r}, nbs/index.ipynb gives {wants!r}: run {REBUILD}')
            return 1
    stale = [n for n, data in pictures.items() if not (ROOT / n).exists() or (ROOT / n).read_bytes() != data]
    for n in stale: print(f'{n}: is not the output saved in nbs/index.ipynb: run {REBUILD}')
    return int(bool(stale))


# ---------------------------------------------------------------- the site


def page_names(nbs: Path) -> dict[str, str]:
    "For each notebook the name that nbdev's links give its page, relative to `nbs`: `00_x.ipynb` -> `x.ipynb`"
    from nbdev.config import nbpath2html
    found = sorted(p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    found = [p for p in found if not any(s[0] in '._' for s in p.parts)]
    names = {p.as_posix(): nbpath2html(p).with_suffix('.ipynb').as_posix() for p in found}
    twice = [n for n in set(names.values()) if list(names.values()).count(n) > 1]
    if twice: raise SystemExit(f'two notebooks would have the page {twice[0]}: rename one')
    return names


def relink(text: str, folder: str, names: dict[str, str]) -> str:
    "Markdown of a page in `folder`, its links to notebooks rewritten to their page names"
    def fix(m: re.Match) -> str:
        path, mark, anchor = m[2].partition('#')
        name = names.get(posixpath.normpath(posixpath.join(folder, path)))
        return m[1] + posixpath.relpath(name, folder or '.') + mark + anchor if name else m[0]
    return LINK.sub(fix, text)


def stage_page(path: Path, name: Path, folder: str, names: dict[str, str]) -> None:
    "Give a processed notebook its page name, and drop what smalldocs does not know"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'raw': text = re.sub(r'^output-file:.*\n', '', text, flags=re.M)
        cell['source'] = relink(text, folder, names) if cell['cell_type'] == 'markdown' else text
    path.unlink()
    name.write_text(json.dumps(nb), encoding='utf-8')


def listed(contents: list) -> Iterator[str]:
    "The notebooks of a sidebar's `contents`, sections opened"
    for c in contents:
        if isinstance(c, str): yield c
        elif 'contents' in c: yield from listed(c['contents'])
        else: yield c['href']


def present(contents: list, names: dict[str, str]) -> list:
    "A sidebar's `contents` under the names of the pages, without entries whose notebook is not there"
    out: list = []
    for c in contents:
        if isinstance(c, str): out += [names[c]] if c in names else []
        elif 'contents' in c: out += [c | {'contents': kept}] if (kept := present(c['contents'], names)) else []
        else: out += [c | {'href': names[c['href']]}] if c['href'] in names else []
    return out


def stage_sidebar(config: Path, names: dict[str, str]) -> None:
    "Fit the sidebar in the `_quarto.yml` of the processed pages to the pages there are; say which of them it lacks"
    import yaml
    options = yaml.safe_load(config.read_text(encoding='utf-8'))
    sidebar = options['website']['sidebar']
    for n in sorted(names.keys() ^ set(listed(sidebar['contents']))):
        problem = 'not in the sidebar of' if n in names else 'no such page, but in'
        print(f'warning: {n}: {problem} _quarto.yml', file=sys.stderr)
    sidebar['contents'] = present(sidebar['contents'], names)
    config.unlink()                          # may be a link to the file of the repository
    config.write_text(yaml.safe_dump(options, sort_keys=False), encoding='utf-8')


def stage() -> Path:
    "The notebooks processed by nbdev (symbols documented and linked), every page under its final name"
    import yaml
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    names = page_names(ROOT / 'nbs')
    try: cache = Path(proc_nbs(force=True, n_workers=min(2, os.cpu_count() or 1)))
    except Exception as e: raise SystemExit(f'nbdev cannot document a page: {e}') from e
    for old, new in names.items():
        stage_page(cache / old, cache / new, posixpath.dirname(old), names)
    stage_sidebar(cache / '_quarto.yml', names)
    options = yaml.safe_load((cache / 'nbdev.yml').read_text())
    options.pop('format-links', None)
    (cache / 'nbdev.yml').write_text(yaml.safe_dump(options, sort_keys=False))
    return cache


HANDLED = re.compile(r'broken link /?blob/|outside the project|html\.(?:grid|html-math)')  # seen to elsewhere


def render_smalldocs(out: Path) -> None:
    from smalldocs.site import build
    cache = stage()
    site = build(cache, quiet=True)
    for w in site.warnings:
        if not HANDLED.search(w): print('warning:', w, file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(cache / '_docs', out)
    shutil.rmtree(cache)
    (out / 'sitemap.xml').unlink(missing_ok=True)  # it needs the address of the site, which is not ours to know


def render_quarto(out: Path) -> None:
    subprocess.run(['nbdev-docs'], cwd=ROOT, check=True)
    if out != ROOT / '_docs':
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(ROOT / '_docs', out)


# ---------------------------------------------------------------- after rendering

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', re.I)
REMOTE_IMPORT = re.compile(r'@import\s*(?:url\(["\']?https?:[^)]*\)|"https?:[^"]*"|\'https?:[^\']*\')[^;]*;')
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="{icon}"><style>{style}
body {{ font-family: system-ui, sans-serif; line-height: 1.5; margin: 0 auto; max-width: 62rem; padding: 1rem; }}
code, nav, p, li, h2, h3 {{ overflow-wrap: anywhere; }}
pre {{ overflow-x: auto; font-size: .85rem; }} a {{ color: #0b5ea8; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border-bottom: 1px solid #8885; padding: .2rem .6rem; text-align: left; vertical-align: top; }}
:root {{ color-scheme: light dark; }} body {{ background: #fff; color: #222; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0d1117; color: #e6edf3; }} a {{ color: #7cc0ff; }} {dark}
.highlight .linenos {{ color: #9aa4af; }} }}
</style></head>
<body><nav><a href="{home}">skin_gradcam</a> / {title}</nav><main>{body}</main></body></html>
"""


def mathml(page: str) -> str:
    "`page` with its formulas as MathML, which browsers show without a script"
    from latex2mathml.converter import convert
    def fix(m: re.Match) -> str:
        return convert(html.unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
    page, n = MATH.subn(fix, page)
    return KATEX.sub('', page) if n else page


SCROLLS = re.compile(r'<(?:pre\b|math\b(?=[^>]*display="block")|div class="cell-output cell-output-display"|table\b)'
                     r'(?![^>]*tabindex)')


def scrollable(page: str) -> str:
    "`page` with everything that may scroll sideways within reach of the keyboard"
    return SCROLLS.sub(lambda m: f'{m[0]} tabindex="0"', page)


NAVS = {'class="navbar': 'Site', 'class="quarto-secondary-nav': 'Where you are', 'id="quarto-sidebar': 'Pages'}


def named(page: str) -> str:
    "`page` with a name for each navigation, and with plain cells where a table's head has no words"
    for start, label in NAVS.items(): page = page.replace(f'<nav {start}', f'<nav aria-label="{label}" {start}')
    page = re.sub(r'(<a\b[^>]*data-bs-toggle[^>]*) role="navigation"', r'\1 role="button"', page)
    return re.sub(r'<th((?:\s[^>]*)?)>\s*</th>', r'<td\1></td>', page)


def stepped(page: str) -> str:
    "`page` whose headings go down one level at a time for a screen reader, also where an output brings its own"
    above = 0
    def fix(m: re.Match) -> str:
        nonlocal above
        level, above = int(m[1]), min(int(m[1]), above + 1)
        return m[0] if level == above else f'<h{level} aria-level="{above}"'
    return re.sub(r'<h([1-6])(?=[\s>])', fix, page)


def file_page(name: str, out: Path) -> str:
    "Show the repository's file `name` in the site; returns the page, relative to `out`"
    from markdown_it import MarkdownIt
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import TextLexer, get_lexer_for_filename
    from pygments.util import ClassNotFound
    page = out / 'files' / f'{name}.html'
    if page.exists(): return f'files/{name}.html'
    text, form = (ROOT / name).read_text(encoding='utf-8'), HtmlFormatter(lineanchors='L', linenos='inline')
    dark = HtmlFormatter(linenos='inline', style='github-dark').get_style_defs('.highlight')
    try: lexer = get_lexer_for_filename(name)
    except ClassNotFound: lexer = TextLexer()
    body = highlight(text, lexer, form)
    body = f'<h1>{html.escape(name)}</h1>{body}'
    if name.endswith('.md'): body = MarkdownIt('commonmark').enable('table').render(text)
    page.parent.mkdir(parents=True, exist_ok=True)
    home = posixpath.relpath('index.html', posixpath.dirname(f'files/{name}'))
    icon = posixpath.relpath('images/favicon.svg', posixpath.dirname(f'files/{name}'))
    kw = dict(title=html.escape(name), style=form.get_style_defs('.highlight'), dark=dark, home=home, icon=icon)
    text = PAGE.format(**kw, body=scrollable(body))
    page.write_text(text, encoding='utf-8')
    return f'files/{name}.html'


def file_link(href: str, folder: str, out: Path) -> str:
    "A link on a page in `folder`: to a file outside `nbs/`, it leads to that file's page; any other stays"
    path, _, anchor = html.unescape(href).partition('#')
    if re.match(r'[a-z][a-z0-9+.-]*:', path): return href
    source = re.fullmatch(r'(?:\.{0,2}/)*blob/[\w.-]+/(.+)', path)  # nbdev's link to a symbol's source
    name = f'../{source[1]}' if source else posixpath.normpath(posixpath.join(folder, path))
    if not re.match(r'\.\./(?!\.\.)', name) or not (ROOT / 'nbs' / name).is_file(): return href
    name = name.removeprefix('../')
    line = re.fullmatch(r'L(\d+)', anchor)
    return posixpath.relpath(file_page(name, out), folder or '.') + (f'#L-{line[1]}' if line else '')


def alt_texts(page: str) -> str:
    "`page` with an alternative text for every picture that has none: the heading over it (`#| fig-alt:` is better)"
    heading = ''
    def fix(m: re.Match) -> str:
        nonlocal heading
        if m[1] is None: return f'<img alt="figure in: {heading}"'
        heading = html.escape(html.unescape(re.sub(r'<[^>]+>', '', m[1])).strip())
        return m[0]
    return re.sub(r'<h[1-6][^>]*>(.*?)</h|<img(?![^>]*\salt=)', fix, page, flags=re.S)


def class_anchor(href: str, folder: str, ids: dict[str, set[str]]) -> str:
    "A link to a method that has no heading of its own leads to its class"
    path, _, anchor = href.partition('#')
    there = ids.get(posixpath.normpath(posixpath.join(folder, path)), {anchor})
    owner = anchor.partition('.')[0]
    return f'{path}#{owner}' if anchor not in there and owner in there else href


def public_names(tree: ast.Module) -> list[str]:
    "What a module's `__all__` lists"
    found = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__']
    return ast.literal_eval(found[0]) if found else []


def definitions(tree: ast.Module, text: str) -> dict[str, str]:
    "Name -> source of what a module defines at its top: a value whole, a command as far as its docstring"
    found: dict[str, str] = {}
    for n in tree.body:
        if isinstance(n, ast.ClassDef | ast.FunctionDef):
            names, first = [n.name], min([n.lineno, *(d.lineno for d in n.decorator_list)])
            last = n.body[0].end_lineno if ast.get_docstring(n) else n.body[0].lineno - 1
        elif isinstance(n, ast.Assign | ast.AnnAssign):
            targets = n.targets if isinstance(n, ast.Assign) else [n.target]
            names = [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]
            first, last = n.lineno, n.end_lineno
        else: continue
        lines = text.splitlines()[first - 1:last]
        found |= dict.fromkeys(names, '\n'.join(lines[:40] + ['...'] * (len(lines) > 40)))
    return found


def imported_from(tree: ast.Module) -> dict[str, str]:
    "Name -> module of this package that it comes from"
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    return {a.asname or a.name: n.module or '' for n in found for a in n.names}


def other_names(page: str, module: str) -> str:
    "The `page` of a module with an entry for each public name that nbdev leaves out: values, commands, names passed on"
    text = (ROOT / f'skin_gradcam/{module}.py').read_text(encoding='utf-8')
    tree, parts = ast.parse(text), []
    ids, defined, passed = set(re.findall(r'\bid="([^"]+)"', page)), definitions(tree, text), imported_from(tree)
    for name in public_names(tree):
        if {name, name.lower()} & ids: continue
        body = f'<pre tabindex="0"><code>{html.escape(defined.get(name, name))}</code></pre>'
        if name not in defined and name in passed:
            body = f'<p>From <a href="{passed[name]}.html#{name.lower()}">skin_gradcam.{passed[name]}</a>.</p>'
        parts.append(f'<section><h3 id="{name}" class="anchored">{name}</h3>{body}</section>')
    if not parts: return page
    whole = '<section id="other-public-names"><h2>Other public names</h2>' + ''.join(parts) + '</section>'
    return re.sub(r'(</main>)(?!.*</main>)', lambda m: whole + m[1], page, flags=re.S)


TITLE_BLOCK = re.compile(r'(<header id="title-block-header".*?)(</header>)', re.S)


def module_of(notebook: str) -> str | None:
    "The module that a notebook with this text is exported to"
    found = re.search(r'"#\|\s*default_exp (\w+)', notebook)
    return found[1] if found and (ROOT / f'skin_gradcam/{found[1]}.py').exists() else None


def notebook_links(page: str, notebook: str, out: Path) -> str:
    "`page`, which lies in `out`, with links under its title: its notebook, kept in the site, and the module made of it"
    to = out / 'notebooks' / notebook
    to.parent.mkdir(parents=True, exist_ok=True)
    text = (ROOT / 'nbs' / notebook).read_text(encoding='utf-8')
    to.write_text(text, encoding='utf-8')
    back = posixpath.relpath('.', posixpath.dirname(notebook) or '.')
    links = f'<a href="{back}/notebooks/{notebook}" download>Open as notebook</a>'
    if module := module_of(text):
        source = file_page(f'skin_gradcam/{module}.py', out)
        links += f' <span aria-hidden="true">·</span> <a href="{back}/{source}">skin_gradcam.{module}</a>'
    return TITLE_BLOCK.sub(lambda m: f'{m[1]}<p class="page-links">{links}</p>{m[2]}', page, count=1)


MERMAID = re.compile(r'https://cdn\.jsdelivr\.net/npm/mermaid@([\d.]+)/dist/mermaid\.esm\.min\.mjs')


def fetch_mermaid(version: str) -> Path:
    "The folder of this version of mermaid, which draws diagrams; fetched from npm once"
    from platformdirs import user_cache_path
    there = user_cache_path('skin_gradcam') / f'mermaid-{version}'
    if not (there / 'package').exists():
        if not shutil.which('npm'): raise SystemExit('a page has a diagram: install npm, which fetches mermaid')
        there.mkdir(parents=True, exist_ok=True)
        subprocess.run(['npm', 'pack', f'mermaid@{version}', '--silent'], cwd=there, check=True)
        shutil.unpack_archive(next(there.glob('*.tgz')), there)
    return there / 'package/dist'


def local_diagrams(page: str, folder: str, out: Path) -> str:
    "A page in `folder` that draws its diagrams with a script of the site instead of one from the network"
    def fix(m: re.Match) -> str:
        libs = out / 'site_libs/mermaid'
        if not libs.exists():
            dist = fetch_mermaid(m[1])
            shutil.copytree(dist / 'chunks/mermaid.esm.min', libs / 'chunks/mermaid.esm.min', ignore=maps)
            shutil.copy(dist / 'mermaid.esm.min.mjs', libs)
        return posixpath.join('.', posixpath.relpath('site_libs/mermaid/mermaid.esm.min.mjs', folder or '.'))
    maps = shutil.ignore_patterns('*.map')
    return MERMAID.sub(fix, page)


def finish(out: Path) -> None:
    "Formulas, diagrams, links and alternative texts of the rendered pages; nothing from the network"
    pages = {p.relative_to(out).as_posix(): p.read_text(encoding='utf-8') for p in out.rglob('*.html')}
    notebooks = {Path(new).with_suffix('.html').as_posix(): old for old, new in page_names(ROOT / 'nbs').items()}
    for name in notebooks.keys() & pages.keys():
        module = module_of((ROOT / 'nbs' / notebooks[name]).read_text(encoding='utf-8'))
        if module: pages[name] = other_names(pages[name], module)
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages.items()}
    for name, text in pages.items():
        folder = posixpath.dirname(name)
        def fix(m: re.Match, folder: str = folder) -> str:
            return m[1] + class_anchor(file_link(m[2], folder, out), folder, ids)
        page = local_diagrams(stepped(named(scrollable(alt_texts(mathml(text))))), folder, out)
        page = re.sub(r'(<a\b[^>]*?\bhref=")([^"#][^"]*)', fix, page)
        if name in notebooks: page = notebook_links(page, notebooks[name], out)
        (out / name).write_text(page, encoding='utf-8')
    for path in out.rglob('*.css'):
        css = path.read_text(encoding='utf-8')
        path.write_text(REMOTE_IMPORT.sub('', css), encoding='utf-8')


def build_site(out: Path) -> None:
    os.chdir(ROOT)
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    sys.path.insert(0, str(ROOT))
    (render_quarto if shutil.which('quarto') else render_smalldocs)(out)
    finish(out)
    print(f'wrote {os.path.relpath(out)}: {sum(1 for _ in out.rglob("*.html"))} pages')


def main() -> int:
    head, _, rest = (__doc__ or '').partition('\n\n')
    p = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true', help='only compare README.md with nbs/index.ipynb')
    p.add_argument('--readme-only', action='store_true', help='write README.md and its pictures, no site')
    p.add_argument('--site-only', action='store_true', help='build the site, leave README.md')
    p.add_argument('--out', type=Path, default=ROOT / '_docs', help='where the site goes (default: _docs)')
    args = p.parse_args()
    if args.check: return check_readme()
    if not args.site_only: write_readme()
    if not args.readme_only: build_site(args.out.resolve())
    return 0


if __name__ == '__main__': sys.exit(main())
