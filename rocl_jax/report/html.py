"""A report as one HTML file: readable anywhere, nothing is loaded."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #ddd; --back: #fff;
  --head: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --faint: #444; --back: #16181b; --head: #23272c; }
}
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; margin-top: 2em; }
h1 { margin-top: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--faint);
  vertical-align: top; }
th { background: var(--head); }
code, pre { background: var(--head); border-radius: 4px; font-size: 0.9em; }
code { padding: 0.1em 0.25em; }
pre { padding: 0.8em; overflow-x: auto; }
pre code { padding: 0; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
"""


def page(markdown: str, folder: Path) -> str:
  """The report as HTML, with the pictures that it names in it.

  Args:
    markdown: the report; HTML in it is shown as text.
    folder: where the paths of its pictures start.
  """
  parser = MarkdownIt('commonmark', {'html': False}).enable('table')
  tokens = parser.parse(markdown)
  for token in tokens:
    for child in token.children or ():
      if child.type == 'image':
        child.attrs['src'] = _embedded(folder / str(child.attrs['src']))
  body = parser.renderer.render(tokens, parser.options, {})
  body = body.replace('<table>', '<div class="table"><table>')
  body = body.replace('</table>', '</table></div>')
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width">\n'
    f'<title>{_title(tokens)}</title>\n<style>{_STYLE}</style>\n</head>\n'
    f'<body>\n{body}</body>\n</html>\n'
  )


def _embedded(path: Path) -> str:
  try:
    data = base64.b64encode(path.read_bytes()).decode('ascii')
  except OSError:  # the text around it is worth having
    return path.name
  return f'data:image/png;base64,{data}'


def _title(tokens: list[Any]) -> str:
  """The text of the first heading."""
  for before, token in zip(tokens, tokens[1:], strict=False):
    if before.type == 'heading_open':
      return escape(''.join(child.content for child in token.children))
  return 'Report'
