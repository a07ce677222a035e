"The tools that build the docs and check the repository, on small examples"
from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path

import build_docs
import check_links
import check_repo
import pytest
from PIL import Image


def png() -> str:
    out = BytesIO()
    Image.new('RGB', (4, 3), 'teal').save(out, 'PNG')
    return base64.b64encode(out.getvalue()).decode()


def notebook(path: Path, *cells: dict) -> Path:
    path.write_text(json.dumps({'cells': list(cells)}), encoding='utf-8')
    return path


def md(source: str) -> dict: return {'cell_type': 'markdown', 'source': source}


def code(source: str, **data: str) -> dict:
    out = [{'output_type': 'display_data', 'data': {k.replace('_', '/'): v for k, v in data.items()}}] if data else []
    return {'cell_type': 'code', 'source': source, 'outputs': out, 'id': 'c'}


TITLE = md('# T\n\n> one line')

# ---------------------------------------------------------------- README.md


@pytest.mark.parametrize('there,here', [
    ('[a](10_data.ipynb#roles)', '[a](nbs/10_data.ipynb#roles)'),
    ('![p](images/p.png)', '![p](nbs/images/p.png)'),
    ('<img src="images/p.png">', '<img src="nbs/images/p.png">'),
    ('[c](../CONTRIBUTING.md)', '[c](CONTRIBUTING.md)'),
    ('[w](https://a.org/x) [s](#start)', '[w](https://a.org/x) [s](#start)'),
    ('```\n[a](x.ipynb)\n```', '```\n[a](x.ipynb)\n```'),
])
def test_readme_links(there: str, here: str) -> None:
    assert build_docs.from_root(there) == here


def test_readme_cells(tmp_path: Path) -> None:
    "Hidden cells vanish, options act, a picture becomes a file, HTML with embedded pictures becomes text"
    index = notebook(
        tmp_path / 'index.ipynb', TITLE, code('#| hide\nimport x'), md('Text, see [d](10_data.ipynb).'),
        code('1 + 1', text_plain='2'), code("#| echo: false\n#| fig-alt: 'a map'\nshow()", image_png=png()),
        code('card', text_html='<img src="data:image/png;base64,xx"><table></table>', text_plain='Card()'),
        code('table', text_html='<style>td {}</style><table><tr><td>1</td></tr></table>', text_plain='1'))
    text, pictures = build_docs.readme(index)
    assert text.startswith('# T\n\n<!-- Generated') and '> one line' in text and 'import x' not in text
    assert '[d](nbs/10_data.ipynb)' in text and '```python\n1 + 1\n```\n\n```\n2\n```' in text
    assert '![a map](nbs/images/index-1.png)' in text and 'show()' not in text
    assert '```\nCard()\n```' in text and 'base64' not in text and '\n<table><tr><td>1</td></tr></table>\n' in text
    assert pictures == {'nbs/images/index-1.png': base64.b64decode(png())}


def test_stale_readme(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / 'nbs').mkdir()
    index = notebook(tmp_path / 'nbs/index.ipynb', md('# T\n\n> one'), md('a'), code('p', image_png=png()))
    made = build_docs.readme(index)
    monkeypatch.setattr(build_docs, 'ROOT', tmp_path)
    monkeypatch.setattr(build_docs, 'readme', lambda: made)
    assert build_docs.check_readme() == 1
    build_docs.write_readme()
    assert build_docs.check_readme() == 0
    (tmp_path / 'nbs/images/index-1.png').write_bytes(b'')
    assert build_docs.check_readme() == 1
    (tmp_path / 'README.md').write_text(made[0].replace('a\n', 'b\n'), encoding='utf-8')
    capsys.readouterr()
    assert build_docs.check_readme() == 1
    assert capsys.readouterr().out.startswith("README.md:7: is 'b', nbs/index.ipynb gives 'a'")


# ---------------------------------------------------------------- the site


def test_page_names(tmp_path: Path) -> None:
    (tmp_path / 'tutorials').mkdir()
    for n in ('index', '00_lesions', 'tutorials/01_Study'): (tmp_path / f'{n}.ipynb').write_text('{}')
    names = build_docs.page_names(tmp_path)
    assert names['00_lesions.ipynb'] == 'lesions.ipynb' and names['tutorials/01_Study.ipynb'] == 'tutorials/study.ipynb'
    assert build_docs.relink('[x](../00_lesions.ipynb#a)', 'tutorials', names) == '[x](../lesions.ipynb#a)'
    (tmp_path / '04_lesions.ipynb').write_text('{}')
    with pytest.raises(SystemExit, match='two notebooks would have the page lesions'): build_docs.page_names(tmp_path)


def test_formulas_become_mathml() -> None:
    head = '<link rel="stylesheet" href="https://c/katex.css"><script src="https://c/katex.js" defer></script>'
    page = build_docs.mathml(head + r'<span class="math inline">\(a &lt; b\)</span>')
    assert page.startswith('<math') and 'katex' not in page and '&lt;' in page.replace('&#x0003C;', '&lt;')
    assert 'display="block"' in build_docs.mathml(r'<span class="math display">\[\sum_k w_k A_k\]</span>')
    assert build_docs.mathml('<p>no formula</p>') == '<p>no formula</p>'


def test_alt_texts() -> None:
    page = build_docs.alt_texts('<h2 id="x">A &amp; <code>b</code></h2><img src="1"><img src="2" alt="mine">')
    assert page.endswith('<img alt="figure in: A &amp; b" src="1"><img src="2" alt="mine">')


def test_links_to_files(tmp_path: Path) -> None:
    "nbdev's links to source code and links out of `nbs/` lead to pages made from the files; others stay"
    link = build_docs.file_link('blob/main/setup.py#L3', '', tmp_path)
    assert link == 'files/setup.py.html#L-3' and 'id="L-3"' in (tmp_path / 'files/setup.py.html').read_text()
    assert build_docs.file_link('../../LICENSE', 'tutorials', tmp_path) == '../files/LICENSE.html'
    for href in ('https://a.org/blob/main/x.py', 'data.html#x', '../no_such_file', '../../outside', '../nbs'):
        assert build_docs.file_link(href, '', tmp_path) == href


def test_links_to_methods() -> None:
    ids = {'a/x.html': {'explainer', 'explainer.load'}}
    assert build_docs.class_anchor('x.html#explainer.load', 'a', ids) == 'x.html#explainer.load'
    assert build_docs.class_anchor('x.html#explainer.batch', 'a', ids) == 'x.html#explainer'
    for href in ('x.html#other.batch', 'x.html', 'y.html#explainer.batch', 'https://a.org/x.html#explainer.batch'):
        assert build_docs.class_anchor(href, 'a', ids) == href


def test_quarto_renders_where_it_is_installed(monkeypatch, tmp_path: Path) -> None:
    "`nbdev-docs` makes `_docs`; its pages get the same finish as smalldocs', in the folder asked for"
    def nbdev_docs(command: list[str], cwd: Path, check: bool) -> None:
        assert command == ['nbdev-docs'] and check
        (cwd / '_docs').mkdir()
        (cwd / '_docs/index.html').write_text('<a href="../LICENSE">licence</a>')
    monkeypatch.setattr(build_docs, 'ROOT', tmp_path)
    monkeypatch.setattr(build_docs.shutil, 'which', lambda name: '/usr/bin/quarto' if name == 'quarto' else None)
    monkeypatch.setattr(build_docs.subprocess, 'run', nbdev_docs)
    monkeypatch.setenv('PYTHONPATH', '')
    monkeypatch.setattr(build_docs.sys, 'path', [*build_docs.sys.path])
    monkeypatch.chdir(tmp_path)
    for name in ('nbs', 'skin_gradcam'): (tmp_path / name).mkdir()
    (tmp_path / 'LICENSE').write_text('Apache')
    build_docs.build_site(tmp_path / 'out')
    assert 'href="files/LICENSE.html"' in (tmp_path / 'out/index.html').read_text()
    assert not (tmp_path / '_docs').exists()


def test_remote_fonts() -> None:
    css = '@import url(https://f.org/css2?a:300;400&b);:root{a:b}@import "local.css";'
    assert build_docs.REMOTE_IMPORT.sub('', css) == ':root{a:b}@import "local.css";'


# ---------------------------------------------------------------- checks of links


def test_link_problems(tmp_path: Path) -> None:
    (tmp_path / 'b.html').write_text('<h1 id="top">b</h1>')
    (tmp_path / 'p.png').write_bytes(base64.b64decode(png()))
    good = ('<a href="b.html#top"></a><a href="#here" id="here"></a><img alt="" src="p.png"><a href="https://a.org"></a>'
            '<a download href="data:text/csv;base64,YQo="></a>'
            f'<img alt="" src="data:image/png;base64,{png()}"><script type="module">'
            "import m from 'https://cdn.jsdelivr.net/npm/mermaid@11.4.1/x.mjs'</script>")
    (tmp_path / 'index.html').write_text(good)
    assert list(check_links.site_problems(tmp_path)) == []
    bad = {'<a href="c.html"></a>': 'no such file: c.html', '<a href="b.html#x"></a>': 'no such anchor: b.html#x',
           '<img alt="" src="q.png">': 'no such file: q.png', '<img src="p.png">': 'picture without alt text: p.png',
           '<a href="/b.html"></a>': 'address from the root', '<a href="../x"></a>': 'leads out of',
           '<script src="https://a.org/x.js"></script>': 'loads from the network: https://a.org/x.js',
           '<style>a { b: url(//a.org/x.png) }</style>': 'loads from the network: //a.org/x.png',
           '<img alt="" src="data:image/png;base64,iVBORw0KGgo=">': 'embedded picture does not decode',
           '<a download href="data:text/csv;base64,YQo"></a>': 'embedded text/csv does not decode'}
    for text, problem in bad.items():
        (tmp_path / 'index.html').write_text(text)
        found = list(check_links.site_problems(tmp_path))
        assert len(found) == 1 and found[0].startswith('index.html: ') and problem in found[0], (text, found)


def test_markdown_links_resolve() -> None:
    assert not list(check_links.markdown_problems())


# ---------------------------------------------------------------- checks of the repository


def books(*cells: dict) -> dict[str, list[check_repo.Cell]]:
    return {'nbs/x.ipynb': [check_repo.Cell(f'x {i}', c['cell_type'], c['source'], c.get('outputs', []))
                            for i, c in enumerate(cells)]}


LONG = '#| export\n' + '\n'.join(f'a{i} = {i}' for i in range(51))


@pytest.mark.parametrize('check,cell,problem', [
    ('paths', code('x', text_plain='saved to /' + 'tmp/abc'), 'machine path in the output'),
    ('paths', code('p = "/' + 'home/me/x"'), 'machine path'),
    ('clean_outputs', {**code('x'), 'outputs': [{'output_type': 'stream', 'name': 'stderr', 'text': 'w'}]}, 'stderr'),
    ('clean_outputs', {**code('x'), 'outputs': [{'output_type': 'error', 'ename': 'E'}]}, 'is an error'),
    ('clean_outputs', code('x', text_plain='1%\r2%'), 'a progress bar'),
    ('sizes', code('x', image_png=base64.b64encode(bytes(60_001)).decode()), 'a figure of 60001 bytes'),
    ('sizes', code('x', text_html='y' * 150_000), 'bytes of output'),
    ('cell_lengths', code(LONG), 'an exported cell of 51 lines'),
    ('page_form', code('import os\nos.sep'), 'imports and other code in one cell'),
    ('page_form', code('with here:\n    import os'), 'imports and other code in one cell'),
    ('page_form', code('#| default_exp x\nimport os'), 'stands alone'),
    ('registries', md('get it from py' + 'pi.org'), 'names a package registry'),
])
def test_bad_cells(monkeypatch, check: str, cell: dict, problem: str) -> None:
    monkeypatch.setattr(check_repo, 'plain_files', lambda: [])
    monkeypatch.setattr(check_repo, 'files', lambda: [])
    fine = md('https://a.org/' + 'tmp/x'), code('1', text_plain='1')
    monkeypatch.setattr(check_repo, 'notebooks', lambda: books(TITLE, *fine))
    assert list(getattr(check_repo, check)()) == []
    monkeypatch.setattr(check_repo, 'notebooks', lambda: books(TITLE, cell))
    found = list(getattr(check_repo, check)())
    assert found and found[0].startswith('x 1') and problem in found[0]


def test_first_cell(monkeypatch) -> None:
    "nbdev turns the first cell into front matter and drops what else stands in it"
    monkeypatch.setattr(check_repo, 'notebooks', lambda: books(md('# T\n\n> one line\n\nlost')))
    assert 'nothing else' in next(check_repo.page_form())


def test_photographs(monkeypatch, tmp_path: Path) -> None:
    "A picture of the data set is known by its content, whatever it is called"
    data = tmp_path / 'data'
    data.mkdir()
    (data / 'ISIC_1.png').write_bytes(base64.b64decode(png()))
    monkeypatch.setattr(check_repo, 'data_set', lambda: data)
    monkeypatch.setattr(check_repo, 'files', lambda: [])
    for cell in code('x', image_png=png()), code('x', text_html=f'<img src="data:image/png;base64,{png()}">'):
        monkeypatch.setattr(check_repo, 'notebooks', lambda c=cell: books(TITLE, c))
        assert list(check_repo.photographs()) == ['x 1: is ISIC_1.png of the data set']
