"""Sets the steps of another commit beside this code's, as both are compiled.

The other commit is checked out beside this one, into a temporary worktree, and
its steps are compiled in a process of their own. What reads the programs is
this code, for both.
"""

import collections
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags

from rocl_jax.errors import UserError
from rocl_jax.plan.chips import Slice
from rocl_jax.plan.output import MOST, Sheet, label, table
from rocl_jax.profile import SCOPES
from rocl_jax.progress import say

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Steps are built as the other commit builds them.
_THEIRS = 'steps.py'


def plan_of(
  revision: str, slices: Sequence[Slice], stages: Sequence[str]
) -> dict[str, Any]:
  """{'commit': its name, 'slices': {slice: {stage: Step.record()}}}.

  Raises:
    UserError: there is no such commit, or it can't compile that.
  """
  given = flags.FLAGS
  config = pathlib.Path(config_flags.get_config_filename(given['config']))
  with contextlib.suppress(ValueError):  # of this checkout: the other has its
    config = config.relative_to(_ROOT)
  asked = {
    'config': str(config),
    'overrides': config_flags.get_override_values(given['config']),
    'images': (given.images, given.image_size, given.classes),
    'slices': [where.name for where in slices],
    'stages': list(stages),
    'effort': given.effort,
  }
  with _checkout(revision) as (folder, commit):
    say(f'{commit}: compiling its steps')
    there = subprocess.run(
      [sys.executable, '-m', 'rocl_jax.plan.before'],
      input=repr(asked),
      capture_output=True,
      text=True,
      cwd=folder,
      env=os.environ
      | {'JAX_ENABLE_X64': str(int(given.config.model.dtype == 'float64'))},
    )
  if there.returncode:
    why = (there.stderr.strip().splitlines() or ['no reason given'])[-1]
    raise UserError(
      f'--diff: {commit} can not compile that step as this command reads it: '
      f'{why}'
    )
  return {'commit': commit, 'slices': json.loads(there.stdout)}


@contextlib.contextmanager
def _checkout(revision: str) -> Iterator[tuple[pathlib.Path, str]]:
  """A folder with that commit and this code's readers, and its short name."""
  if not (_ROOT / '.git').exists() or not shutil.which('git'):
    raise UserError(
      f'--diff: found {revision!r}, but {_ROOT} is not a git checkout'
    )
  name = _git('rev-parse', '--short', '--verify', revision + '^{commit}')
  if name.returncode:
    raise UserError(
      f'--diff: found {revision!r}, wanted a commit of the git repository '
      f'{_ROOT}'
    )
  with tempfile.TemporaryDirectory(prefix='rocl_jax_plan') as temporary:
    folder = pathlib.Path(temporary) / 'before'
    made = _git('worktree', 'add', '--detach', str(folder), name.stdout.strip())
    if made.returncode:
      raise UserError(f'--diff: {made.stderr.strip().splitlines()[-1]}')
    try:
      here = pathlib.Path(__file__).parent
      there = folder / 'rocl_jax' / 'plan'
      there.mkdir(exist_ok=True)
      for file in here.glob('*.py'):
        if file.name != _THEIRS:
          shutil.copy(file, there)
      shutil.copy(here.parent / 'hlo.py', there.parent)
      yield folder, name.stdout.strip()
    finally:
      _git('worktree', 'remove', '--force', str(folder))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    ['git', '-C', str(_ROOT), *arguments], capture_output=True, text=True
  )


def tables(before: dict[str, Any], sheet: Sheet) -> list[str]:
  """The lines of one slice: stage by stage, then what changed most."""
  commit, others = before['commit'], before['slices'][sheet.where.name]
  rows, changed = [], []
  for r in sheet.rows:
    name, one, two = r.planned.name, others[r.planned.name], r.step.record()
    if one['refused'] or two['refused']:
      fits = [x['refused'] or 'fits' for x in (one, two)]
      rows.append([name, 'memory', *fits])
      continue
    rows += [[name, *line] for line in _quantities(one, two)]
    changed += [[name, *line] for line in _changes(one, two)]
  head = ['stage', 'a chip, a step', commit, 'now', 'ratio']
  lines = table(head, rows, left=2)
  if changed:
    head = ['stage', 'changed most', 'source', f'{commit}, ms', 'now, ms']
    lines += ['', *table([*head, 'more'], changed, left=3)]
  return lines


def _quantities(one, two):
  """Rows of a name, both numbers and their ratio."""
  collectives = lambda s, field: sum(
    c[field] for c in s['collectives'].values()
  )
  wanted = {
    'estimate, ms': (lambda s: 1e3 * s['whole']['seconds'], '.2f'),
    'of it in loops': (lambda s: 1e3 * s['in_loops']['seconds'], '.2f'),
    'kernels': (lambda s: s['whole']['times'], ',d'),
    'of them in loops': (lambda s: s['in_loops']['times'], ',d'),
    'GB': (lambda s: s['traffic'] / 1e9, '.3f'),
    'of it, in loops': (lambda s: s['in_loops']['nbytes'] / 1e9, '.3f'),
    'transposes in loops': (lambda s: s['in_loops']['relayouts'], ',d'),
    'GFLOP': (lambda s: s['flops'] / 1e9, ',.1f'),
    'memory, GiB': (lambda s: s['memory']['total'] / 2**30, '.3f'),
    'collectives': (lambda s: collectives(s, 'times'), ',d'),
    'their MB': (lambda s: collectives(s, 'nbytes') / 1e6, ',.2f'),
  }
  for name, (read, form) in wanted.items():
    a, b = read(one), read(two)
    if a or b:
      yield [name, *(format(x, form) for x in (a, b)), _ratio(a, b)]


def _ratio(a, b):
  return f'{b / a:.3f}' if a else ''


def _changes(one, two):
  """Rows of the operations whose times changed most; equal names are one."""
  times: dict[tuple[str, bool], list[float]] = collections.defaultdict(
    lambda: [0.0, 0.0]
  )
  sources = {}
  for i, step in enumerate((one, two)):
    for o in step['operations']:
      words = o['name'].split()  # the other commit may have no scopes
      key = ' '.join(w for w in words if w not in SCOPES), o['looped']
      times[key][i] += 1e3 * o['seconds']
      sources[key] = o['source']
  ranked = sorted(times, key=lambda key: -abs(times[key][1] - times[key][0]))
  for key in ranked[:MOST]:
    a, b = times[key]
    if a != b:
      more = f'{b - a:+.3f}'
      yield [label(*key), sources[key], f'{a:.3f}', f'{b:.3f}', more]
