"""The report of a small made-up work directory, whole, partial and broken."""

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from markdown_it import MarkdownIt
from matplotlib import font_manager
from matplotlib.figure import Figure

from rocl_jax import figures, published, report
from rocl_jax.errors import UserError
from rocl_jax.figures import names
from rocl_jax.report import text, verdicts
from rocl_jax.report.text import eps_text
from rocl_jax.report.training import spearman

LAYERS = {
  'encoder/stem/kernel': {'size': 1728, 'kept': 173},
  'encoder/block1/conv1/kernel': {'size': 36864, 'kept': 3686},
  'head/kernel': {'size': 5120, 'kept': 512},
}
PLAN = {
  'ours': ('pretrain', 'supervised', 'prune', 'finetune'),
  'magnitude': ('prune', 'finetune'),
  'natural': ('supervised', 'prune', 'finetune'),
  'rocl': ('linear_eval',),
}


def record(run, stage, clean, robust, **changes):
  sparsity = 0.9 if stage in ('prune', 'finetune') else 0.0
  return {
    'run': run,
    'stage': stage,
    'selection': 'last',
    'epoch': 6,
    'split': 'test',
    'n': 360,
    'dataset': 'digits',
    'attack': 'pgd10',
    'eps': 0.1,
    'norm': 'linf',
    'clean_top1': clean,
    'clean_top5': 99.0,
    'robust_top1': robust,
    'robust_top5': 90.0,
    'sparsity': sparsity,
    'steps': 10,
    'step_size': 0.025,
    'start': 'uniform',
    'restarts': 1,
    'seed': 7,
    'dtype': 'float32',
    'matmul_precision': 'highest',
    'parameters': 44_000,
    'config': {},
  } | changes


def unescaped(markdown):
  return re.sub(r'\\([^\w\s])', r'\1', markdown)


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def make_workdir(work, dataset='digits', epochs=6):
  """A finished run of four stages with three runs to compare it with."""
  random = np.random.default_rng(0)
  config = {
    'name': 'small',
    'stages': list(PLAN['ours']),
    'seed': 7,
    'data': {'source': dataset},
    'model': {'name': 'resnet18', 'width': 16},
    'prune': {'keep': 0.1, 'total_epochs': epochs},
  }
  write_json(work / 'config.json', config)
  records = []
  for run, stages in PLAN.items():
    parent = work if run == 'ours' else work / run
    for k, stage in enumerate(stages, 1):
      folder = parent / f'{k}_{stage}'
      (folder / 'model').mkdir(parents=True)
      top = 97 if run == 'natural' else 92 - 4 * (run == 'magnitude')
      robust = 4.0 if run == 'natural' else top - 18
      rows = []
      for epoch in range(1, epochs + 1):
        rise = 1 - math.exp(-4 * epoch / epochs) + random.normal(0, 0.01)
        row = {'epoch': epoch, 'step': 10 * epoch, 'loss': 2.4 - 1.3 * rise}
        if stage != 'pretrain':
          row['validation_clean_top1'] = top * (0.4 + 0.6 * rise)
          row['validation_robust_top1'] = robust * (0.3 + 0.7 * rise)
        rows.append(row)
      text = ''.join(json.dumps(row) + '\n' for row in rows)
      (folder / 'metrics.jsonl').write_text(text)
      model = {
        'run': run,
        'stage': stage,
        'selection': 'last',
        'sparsity': 0.9 if stage in ('prune', 'finetune') else 0.0,
        'layers': LAYERS,
        'dataset': dataset,
        'image_shape': [8, 8, 3],
      }
      write_json(folder / 'model' / 'model.json', model)
      if stage == 'pretrain':
        continue
      for selection in ('last', 'best_validation', 'best_test'):
        new = record(run, stage, top - k, robust - k, selection=selection)
        records.append(new | {'dataset': dataset})
      clean = random.random((4, 8, 8, 3)).round(3)
      adversarial = clean + random.choice([-0.1, 0, 0.1], clean.shape)
      adversarial = adversarial.clip(0, 1).round(4)
      images = [
        {
          'label': i,
          'clean_prediction': i,
          'adversarial_prediction': i if i % 3 else (i + 5) % 10,
          'clean': clean[i].tolist(),
          'adversarial': adversarial[i].tolist(),
        }
        for i in range(4)
      ]
      shown = {
        'run': run,
        'stage': stage,
        'attack': 'pgd10',
        'eps': 0.1,
        'class_names': [str(i) for i in range(10)],
        'images': images,
      }
      write_json(folder / 'examples.json', shown)
  write_json(work / 'results.json', records)
  return work


def make_evaluation(work, classes=10):
  """What evaluations add to a finished run: four more kinds of file."""
  random = np.random.default_rng(1)
  names = [f'class {k}' for k in range(classes)]
  counts = random.integers(0, 3, (classes, classes))
  counts += np.diag(np.arange(10, 10 + classes))
  # Nothing is known of the first class; the second is the worst.
  counts[0] = 0
  counts[1] = counts[1, ::-1]
  n = counts.sum(axis=1)
  robust = [None] + (100 * counts.diagonal()[1:] / n[1:]).round(2).tolist()
  by_class = {
    'class_names': names,
    'confusion': counts.tolist(),
    'per_class': {
      'n': n.tolist(),
      'clean_top1': [None, *[95.5] * (classes - 1)],
      'robust_top1': robust,
    },
  }
  members = [
    {
      'attack': name,
      'algorithm': name.split('-')[0],
      'norm': 'linf',
      'eps': 0.1,
      'steps': 100,
      'robust_top1': after,
    }
    for name, after in (('apgd-ce', 66.0), ('apgd-t', 64.5), ('square', 64.25))
  ]
  ensemble = {'attack': 'autoattack', 'members': members, 'everyone': False}
  left_out = ('steps', 'step_size', 'start', 'restarts', 'robust_top5')
  strongest = record('ours', 'finetune', 88.0, 64.25, **ensemble) | by_class
  records = [
    {k: v for k, v in strongest.items() if k not in left_out},
    record('ours', 'finetune', 88.0, 88.0, attack='clean', eps=None, norm=None),
  ]
  for i, name in enumerate(('fog', 'gaussian_noise')):
    for severity in range(1, 6):
      top = 90.0 - 10 * severity - i
      foggy = {'corruption': name, 'severity': severity}
      foggy |= {'split': f'{name}-{severity}', 'attack': 'clean'}
      records.append(record('ours', 'finetune', top, top, **foggy))
  del records[-1]
  write_json(work / '4_finetune' / 'results.json', records)
  radii = [0, 0.025, 0.05, 0.1, 0.2, 1.0]
  audits = []
  for run, stage, top in (
    ('ours', 'finetune', 88.0),
    ('ours', 'prune', 84.0),
    ('natural', 'finetune', 94.0),
  ):
    slope = 40 if run == 'natural' else 4
    checks = [
      {
        'check': f'more {what} break more',
        'passed': what != 'steps' or run != 'natural',
        'found': 'accuracy 1.2 higher at 100 steps than at 10',
        'wanted': 'at most 0.5 higher',
      }
      for what in ('radius', 'steps', 'restarts')
    ]
    curves = {
      'eps': [
        {'eps': eps, 'robust_top1': round(top * math.exp(-slope * eps**1.2), 2)}
        for eps in radii
      ],
      'steps': [
        {'steps': steps, 'robust_top1': round(top * (0.7 + 0.2 / steps), 2)}
        for steps in (1, 2, 5, 10, 20, 50, 100, 1000)
      ],
      'restarts': [
        {'restarts': 1, 'robust_top1': 62.5},
        {'restarts': 5, 'robust_top1': 62.25},
      ],
    }
    what = record(run, stage, 0, 0, attack='pgd10')
    kept = ('run', 'stage', 'selection', 'split', 'attack', 'norm', 'eps', 'n')
    audit = {k: what[k] for k in kept}
    audits.append(audit | {'checks': checks, 'curves': curves})
  write_json(work / '4_finetune' / 'audit.json', audits[0])
  write_json(work / 'audit.json', audits[1:])
  models = ['ours, finetune', 'ours, supervised', 'natural, finetune']
  transfers = []
  for i, source in enumerate(models):
    for j, target in enumerate([*models, 'ours, finetune']):
      transfers.append(
        {
          'source': {'run': 'x', 'stage': 'y', 'fingerprint': f'{i}'},
          'target': {'run': 'x', 'stage': 'y', 'fingerprint': f'{j % 3}'},
          'source_name': source,
          'target_name': target,
          'attack': 'pgd10',
          'norm': 'linf',
          'eps': 0.1,
          'n': 360,
          'split': 'test',
          'clean_top1': 88.0 + j,
          'robust_top1': 64.0 if i == j else 80.0 + i - j,
          'white_box': i == j % 3,
          'masked': j < 3,
        }
      )
  write_json(work / 'transfer.json', transfers)


def test_table_of_two_records(tmp_path):
  natural = record('natural', 'supervised', 97.5, 0.28, eps=8 / 255)
  ours = record('ours', 'finetune', 91.0, 70.125, eps=8 / 255)
  table = report.terminal_table([natural, ours])
  assert table == (
    'run      stage       sparsity %  clean top-1  clean top-5  '
    'robust top-1  robust top-5  attack    n\n'
    '-------  ----------  ----------  -----------  -----------  '
    '------------  ------------  ------  ---\n'
    'ours     finetune            90        91.00        99.00  '
    '       70.12         90.00  pgd10   360\n'
    'natural  supervised           0        97.50        99.00  '
    '        0.28         90.00  pgd10   360\n'
    'selection: last; split: test; attack: pgd10 (linf, eps 0.03137 = 8/255);'
    ' n: 360; dataset: scikit-learn digits (handwritten digits, not CIFAR-10)'
  )
  write_json(tmp_path / 'results.json', [natural, ours])
  text = (report.write(str(tmp_path)), tmp_path / 'report.md')[1].read_text()
  assert (
    '| ours | finetune | 90 | 91.00 | 99.00 | 70.12 | 90.00 | pgd10 | 360 |\n'
    '| natural | supervised | 0 | 97.50 | 99.00 | 0.28 | 90.00 | pgd10 | 360 |'
  ) in text


def test_whole_report(tmp_path):
  make_workdir(tmp_path)
  assert report.write(str(tmp_path)) == str(tmp_path / 'report.md')
  text = (tmp_path / 'report.md').read_text()
  linked = set(
    line.split('(figures/')[1][:-1]
    for line in text.splitlines()
    if line.startswith('![')
  )
  assert linked == {path.name for path in (tmp_path / 'figures').iterdir()}
  assert {'results.png', 'curves.png', 'density.png'} <= linked
  # Digits are never called CIFAR, nor set against the published curves.
  assert text.replace('not CIFAR-10', '').count('CIFAR') == 0
  assert '| ours | pretrain | – | – | – | – | – | no classifier' in text
  assert 'see run rocl, stage linear_eval' in text
  assert 'most robust on the test images, for comparison with the paper' in text
  assert '| total | 43,712 | 4,371 | 10.00 |' in text
  # The natural run's pictures follow the main run's of the same stage.
  order = ['ours_finetune', 'natural_finetune', 'ours_prune', 'natural_prune']
  places = [text.index(f'examples_{name}.png') for name in order]
  assert places == sorted(places)
  before = (tmp_path / 'report.md').read_bytes()
  report.write(str(tmp_path))
  assert (tmp_path / 'report.md').read_bytes() == before
  assert not list(tmp_path.rglob('.*'))


def test_published_curves_stand_beside_a_cifar_run(tmp_path):
  make_workdir(tmp_path, 'cifar10', epochs=25)
  # As the published run: its own curve correlates perfectly with itself.
  stage = published.curves()['runs']['ours']['stages']['finetune']
  rows = zip(stage['epoch'], stage['loss'], strict=True)
  lines = [json.dumps({'epoch': e, 'loss': x}) for e, x in rows if e]
  (tmp_path / '4_finetune' / 'metrics.jsonl').write_text('\n'.join(lines))
  report.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  assert '| finetune | loss | 1.19 → 1.17 | 1.19 → 1.17 | 1.00 |' in text
  assert '(figures/published.png)' in text
  assert '| prune | robust |' in text


def test_a_later_evaluation_replaces_an_equal_one_and_adds_a_new_one(tmp_path):
  first = [
    record('ours', stage, 90.0, 70.0) for stage in ('supervised', 'prune')
  ]
  write_json(tmp_path / 'results.json', first)
  later = [
    record('ours', 'prune', 90.0, 69.5),
    record('ours', 'prune', 90.0, 61.0, attack='pgd50', steps=50),
  ]
  path = tmp_path / '3_prune' / 'eval_paper' / 'results.json'
  write_json(path, later)
  os.utime(tmp_path / 'results.json', (1, 1))
  report.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  main, other = text.split('## Other evaluations')
  assert '| ours | prune | 90 | 90.00 | 99.00 | 69.50 |' in main
  assert '61.00' not in main and 'pgd50 (linf, eps 0.1)' in other
  os.utime(path, (0, 0))
  report.write(str(tmp_path))
  assert (
    '| 70.00 | 90.00 | pgd10 | 360 |'
    in ((tmp_path / 'report.md').read_text().split('| ours | prune |')[1])
  )


def test_a_run_in_progress(tmp_path):
  make_workdir(tmp_path)
  (tmp_path / 'results.json').unlink()
  for run in ('natural', 'magnitude', 'rocl'):
    for path in sorted((tmp_path / run).rglob('*'), reverse=True):
      path.unlink() if path.is_file() else path.rmdir()
  metrics = tmp_path / '2_supervised' / 'metrics.jsonl'
  metrics.write_text(metrics.read_text() + '{"epoch": 7, "lo')
  report.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  assert 'No model has been evaluated yet.' in text
  assert '(figures/curves.png)' in text
  metrics.write_text('{"epoch": 7, "lo\n{"epoch": 8}\n')
  report.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  assert 'metrics.jsonl, line 1: not a JSON object' in text
  assert '(figures/curves.png)' in text  # of the other stages


def test_what_an_evaluation_adds(tmp_path):
  make_workdir(tmp_path)
  make_evaluation(tmp_path)
  report.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  pictures = ('security', 'confusion', 'transfer')
  assert all(f'(figures/{name}.png)' in text for name in pictures)
  sections = re.split('\n## ', text)
  main = next(s for s in sections if s.startswith('Results'))
  part = {s.partition('\n')[0]: s for s in sections}

  # The main table still compares what most models have.
  assert 'attack: pgd10' in main and 'autoattack' not in main
  assert '| ours | finetune | 90 | 88.00 | 99.00 | 70.00 |' in main
  # A failed check is told at the top, and by its name; a line a model.
  assert '**✗ Failed checks of the attack: 1 (natural, finetune)' in sections[0]
  audit = part['Audit of the attack']
  assert (
    '- ✗ run natural, stage finetune, selection last: pgd10 (linf, eps 0.1), '
    '360 test images: **2 of 3 checks passed**; failed: **more steps break '
    'more** (found: accuracy 1.2 higher at 100 steps than at 10; wanted: at '
    'most 0.5 higher)\n- ✓ run'
  ) in audit
  assert audit.count(': 3 of 3 checks passed') == 2
  assert 'more radius break more' not in audit
  assert '| restarts | 1: 62.50, 5: 62.25 |' in audit
  # Each attack of the ensemble, and what was left after it.
  ensemble = part['Attack by attack']
  assert '| 360 | 88.00 | 66.00 | 64.50 | 64.25 |' in ensemble
  assert '`apgd-t`: apgd, linf, eps 0.1, steps 100' in ensemble
  assert 'count as broken at once' in ensemble
  # Classes: of the strongest evaluation, the main run's last model.
  classes = part['Class by class']
  assert classes.startswith(
    'Class by class\n\nrun ours, stage finetune, selection last: autoattack '
    '(linf, eps 0.1), 360 test images.'
  )
  assert '| class 0 | 0 | – | – | – |' in classes
  # Corruptions: a mean only where nothing is missing.
  corruptions = part['Common corruptions']
  assert (
    '| fog | 80.00 | 70.00 | 60.00 | 50.00 | 40.00 | 60.00 |\n'
    '| gaussian_noise | 79.00 | 69.00 | 59.00 | 49.00 | – | – |\n'
    '| **mean** | 79.50 | 69.50 | 59.50 | 49.50 | – | – |'
  ) in corruptions
  other = part['Other evaluations']
  assert 'fog' not in other and 'autoattack' in other
  # Without attack nothing is robust.
  assert '| clean (no attack) | 360 | 88.00 | 99.00 | – | – |' in other
  # What was scored without its mask is called so.
  transfer = part['Transfer']
  assert '**“mask left out”: the dense weights' in transfer
  assert (
    '| ours, supervised | ours, finetune, mask left out |  | 91.00 | 78.00 |'
    in transfer
  )
  assert '| ours, finetune | ours, finetune | white box | 88.00 |' in transfer
  assert transfer.count('| white box |') == 3
  assert '| common corruptions |' in part['Protocol']

  before = (tmp_path / 'report.md').read_bytes()
  report.write(str(tmp_path))
  assert (tmp_path / 'report.md').read_bytes() == before


def test_an_evaluation_alone_and_many_classes(tmp_path):
  make_evaluation(tmp_path / 'deep' / 'down', classes=30)
  transfers = tmp_path / 'deep' / 'down' / 'transfer.json'
  write_json(transfers, json.loads(transfers.read_text())[:2])
  report.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  classes = text.split('The 10 worst of 30 classes:')[1].split('![')[0]
  assert classes.count('\n| class ') == 11  # and the header
  assert classes.index('| class 1 |') < 120 and '| class 0 |' not in classes
  # A single source needs no matrix.
  assert '## Transfer' in text and 'transfer.png' not in text
  (tmp_path / 'deep' / 'down' / '4_finetune' / 'results.json').unlink()
  report.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  assert '## Audit' in text and 'Class by class' not in text


def test_table_of_an_evaluation():
  members = [{'attack': 'apgd-ce', 'robust_top1': 66.0}]
  ensemble = record('ours', 'prune', 88.0, 64.0, attack='aa', members=members)
  del ensemble['robust_top5']
  clean = record('ours', 'prune', 88.0, 88.0, attack='clean')
  assert report.evaluation_table([ensemble, clean]).splitlines()[2:] == [
    'ours  prune  last       test   360  aa (linf, eps 0.1)          90        '
    '88.00        99.00         64.00             –',
    '                                      apgd-ce                             '
    '                           66.00',
    'ours  prune  last       test   360  clean (no attack)           90        '
    '88.00        99.00             –             –',
  ]


NAMES = (
  *('Ba$$in', 'b\udcffd', 'a_b^{2}\\frac', '<b>x</b>&amp;', 'p|q', '$x_1$'),
  *('`tick` ``', '*s* _e_ __d__', '# head', '[l](u)', '![i](j)', '~~x~~'),
  *('new\nline', 'tab\tx\x00', '\u202ertl\u200f', 'n' * 200, '\\', 'a\\|b'),
  *('中文', '- dash', '1. one', '---', '😀', '', 'https://x.y/?a=b&c'),
)


def shown_text(markdown):
  """What a reader of a report sees, without its pictures' pixels."""
  parser = MarkdownIt('commonmark').enable(['table', 'strikethrough'])
  inline = [t for t in parser.parse(markdown) if t.type == 'inline']
  kinds = {child.type for t in inline for child in t.children}
  assert kinds <= {'text', 'code_inline', 'image', 'strong_open'} | {
    'strong_close'
  }
  return '\n'.join(''.join(c.content for c in t.children) for t in inline)


def test_any_name_is_text_in_every_form(tmp_path):
  make_workdir(tmp_path)
  # As a checkpoint with the classes of such folders would have them.
  make_evaluation(tmp_path, classes=20)
  wild = 'r$_|*`<[é中\udcff\n]'
  (tmp_path / 'natural').rename(tmp_path / wild.replace('\n', 'n'))

  def renamed(found):
    if isinstance(found, dict):
      return {key: renamed(value) for key, value in found.items()}
    if isinstance(found, list):
      return [renamed(value) for value in found]
    known = {'natural': wild, 'digits': 'da$ta|_', 'pgd10': 'p$g_*d10*'}
    if isinstance(found, str) and found.startswith('class '):
      return NAMES[int(found.split()[1])]
    return known.get(found, found) if isinstance(found, str) else found

  for path in tmp_path.rglob('*.json'):
    found = renamed(json.loads(path.read_text()))
    if path.name == 'config.json':
      found |= {'name': '# con$fig_ `x`\n', 'seed': '$7|'}
    if path.name == 'examples.json':
      found['class_names'] = NAMES[-10:]
    path.write_text(json.dumps(found))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    report.write(str(tmp_path))
  assert [w.category for w in caught] == [figures.MissingGlyphs]
  text = (tmp_path / 'report.md').read_text()
  assert 'Left out' not in text and 'No picture' not in text
  shown = shown_text(text)
  for name in (*NAMES[1:20], wild, '# con$fig_ `x`\n', '$7|', 'p$g_*d10*'):
    assert figures.printable(name) in shown, name
  assert '\n' not in figures.printable(wild)
  html = (tmp_path / 'report.html').read_text()
  assert '<title>Report: # con$fig_ `x`\\n</title>' in html
  assert '&lt;b&gt;x&lt;/b&gt;&amp;amp;' in html and '<b>' not in html
  done = subprocess.run(
    [sys.executable, '-m', 'rocl_jax.report', str(tmp_path)],
    capture_output=True,
    env=os.environ | {'PYTHONIOENCODING': 'ascii:strict'},
  )
  assert done.returncode == 0 and done.stderr.count(b'\n') == 1, done.stderr
  assert b'\\udcff' in done.stdout


@pytest.mark.parametrize('name', NAMES)
def test_a_name_in_markdown_shows_as_it_is(name):
  wanted = figures.printable(name)
  table = text.table(['a', 'b'], [[name, 'x'], ['y', name]], 1)
  texts = [f'## {text.md(name)}', f'- {text.md(name)}', table]
  texts += [f'x {text.md(name)} x', f'- {text.code(name)}', text.md(name)]
  shown = shown_text('\n\n'.join(texts)).split('\n')
  cells = ['a', 'b', wanted, 'x', 'y', wanted]
  found = [wanted, wanted, *cells, f'x {wanted} x', wanted, wanted]
  if name:
    assert [x.replace('\xa0', ' ').strip() for x in shown] == found


def test_a_font_that_has_the_characters_is_found(tmp_path):
  builder = FontBuilder(1000, isTTF=True)
  glyphs = ['.notdef', 'cat']
  builder.setupGlyphOrder(glyphs)
  builder.setupCharacterMap({ord('猫'): 'cat'})
  pen = TTGlyphPen(None)
  for point in ((0, 0), (0, 900), (900, 900)):
    pen.lineTo(point) if pen.points else pen.moveTo(point)
  pen.closePath()
  builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
  builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
  builder.setupHorizontalHeader(ascent=900, descent=-100)
  builder.setupNameTable({'familyName': 'Felis Sans', 'styleName': 'Regular'})
  builder.setupOS2(usWeightClass=400)
  builder.setupPost()
  builder.save(tmp_path / 'felis.ttf')
  fonts = font_manager.fontManager.ttflist
  before = list(fonts)
  font_manager.fontManager.addfont(tmp_path / 'felis.ttf')
  names._fonts.cache_clear()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      figure = figures.confusion(np.eye(2), ['猫', 'dog'], 'x')
      figure.canvas.draw()
    (label, _) = figure.axes[0].get_xticklabels()
    assert label.get_text() == '猫' and 'Felis Sans' in label.get_fontfamily()
  finally:
    fonts[:] = before
    names._fonts.cache_clear()
  with pytest.warns(figures.MissingGlyphs):
    figure = figures.confusion(np.eye(2), ['猫Å', '$x$'], 'x')
  labels = figure.axes[0].get_xticklabels()
  assert [x.get_text() for x in labels] == ['U+732BÅ', '$x$']
  assert not any(x.get_parse_math() for x in labels)


def test_a_picture_that_fails_costs_itself(tmp_path, monkeypatch, capsys):
  make_workdir(tmp_path)
  (tmp_path / 'figures').write_text('in the way')
  report.write(str(tmp_path))
  found = (tmp_path / 'report.md').read_text()
  assert found.count('**No picture `') == 10 and '![' not in found
  assert '**No picture `curves`: ' in found and 'in the way of the' in found
  assert '| ours | finetune | 90 | 88.00' in found and '## Protocol' in found
  (tmp_path / 'figures').unlink()

  def broken(*_, **__):
    raise ValueError('odd\nfont')

  monkeypatch.setattr(figures, 'curves', broken)
  monkeypatch.setattr(report.tables, 'selections', broken)
  broken.__name__ = 'selections'
  report.write(str(tmp_path))
  found = (tmp_path / 'report.md').read_text()
  assert found.count('No picture') == 1 and found.count('Left out') == 1
  assert '**No picture `curves`: ValueError: odd**' in found
  assert '**Left out: selections: ValueError: odd**' in found
  assert '(figures/results.png)' in found
  # At the end of a run not even that no report can be written costs anything.
  (tmp_path / 'report.md').unlink()
  (tmp_path / 'report.md').mkdir()
  with pytest.raises(UserError, match=r'/report\.md: in the way'):
    report.write(str(tmp_path))
  assert report.attempt(str(tmp_path)) == ''
  (line,) = capsys.readouterr().err.splitlines()
  assert 'in the way of the report' in line
  assert line.endswith(f'python -m rocl_jax.report {tmp_path}')


def by_class(n, predicted, right=None, **changes):
  right = n if right is None else right
  return {
    'per_class': {
      'n': n,
      'clean_top1': [
        100 * r / m if m else None for r, m in zip(right, n, strict=True)
      ],
      'robust_top1': [0.0] * len(n),
      'clean_predicted': predicted,
      'robust_predicted': predicted,
    }
  } | changes


@pytest.mark.parametrize('count', [2, 3, 10, 100, 1500])
def test_a_network_with_one_answer_is_marked(tmp_path, count):
  n = [6] * count
  one = by_class(n, [6 * count, *[0] * (count - 1)])
  known = [
    record('ours', 'supervised', 100 / count, 100 / count, **one),
    record('ours', 'prune', 90, 40, **by_class(n, n)),
  ]
  terminal = report.terminal_table(known)
  assert 'supervised ⚠' in terminal and 'prune ⚠' not in terminal
  assert '100 % of all images are taken for “class 0”' in terminal
  assert 'supervised ⚠' in report.evaluation_table(known)
  # Earlier records have the confusion under attack alone.
  del one['per_class']
  matrix = [[6, *[0] * (count - 1)]] * count
  known[0] = record('ours', 'supervised', 1, 1, confusion=matrix, **one)
  assert '⚠' in report.terminal_table(known)
  write_json(tmp_path / 'results.json', known)
  began = time.monotonic()
  report.write(str(tmp_path))
  assert time.monotonic() - began < 20
  found = (tmp_path / 'report.md').read_text()
  assert '| ours | supervised ⚠ | 0 |' in found and len(found) < 12_000
  assert '- ⚠ ours, supervised: predictions collapse: 100 % of all' in found


@pytest.mark.parametrize(
  ('n', 'predicted', 'marked'),
  [
    ([50, 50], [70, 30], False),
    ([50, 50], [80, 20], True),
    ([95, 5], [98, 2], False),
    ([95, 5], [100, 0], True),
    ([100, 0], [100, 0], False),
    ([10] * 10, [30, 20, 10, 10, 10, 10, 5, 5, 0, 0], False),
    ([10] * 10, [25, 25, 25, 25, *[0] * 6], True),
    ([1] * 4, [2, 2, 0, 0], False),
    ([0] * 3, [0] * 3, False),
  ],
)
def test_what_is_a_collapse(n, predicted, marked):
  found = record('ours', 'prune', 1, 1, **by_class(n, predicted))
  assert bool(verdicts.collapse(found)) == marked


def test_a_crowd_under_attack_alone_is_no_collapse():
  crowd = np.zeros((4, 4), int)
  crowd[:, 1] = 25
  found = record('ours', 'prune', 25, 25, confusion=crowd.tolist())
  assert verdicts.collapse(found)
  found['clean_top1'] = 90.0
  assert not verdicts.collapse(found)
  found |= by_class([25] * 4, None, [23] * 4)
  assert not verdicts.collapse(found)
  found |= by_class([25] * 4, None, [0, 25, 0, 0])
  assert verdicts.collapse(found)


def test_autoattack_and_bad_logits_are_beside_the_headline(tmp_path):
  weak = record('ours', 'prune', 90.0, 70.0, invalid=3, clean_invalid=2)
  strong = record('ours', 'prune', 91.0, 60.0, attack='autoattack', n=100)
  others = [
    record('ours', 'supervised', 90.0, 70.0),
    record('ours', 'prune', 91.0, 10.0, attack='autoattack', eps=0.3, n=100),
  ]
  known = [weak, strong, *others]
  row = (
    '| ours | prune ⚠ | 90 | 90.00 | 99.00 | 70.00 | 90.00 | 60.00 (n 100) |'
  )
  write_json(tmp_path / 'results.json', known)
  report.write(str(tmp_path))
  found = (tmp_path / 'report.md').read_text()
  assert row in found
  assert '| 70.00 | 90.00 | – | pgd10 | 360 |' in found
  assert '3 of 360 images have logits that are not numbers under pgd10' in found
  assert '2 of 360 images have logits that are not numbers without' in found
  assert '60.00 (n 100)' in report.terminal_table(known)
  assert '3 of 360 images' in report.evaluation_table(known)
  del known[1]['n'], known[1]['robust_top1']
  assert report.terminal_table(known)


def test_frequent_confusions_instead_of_a_matrix(tmp_path):
  many = by_class([3] * 1500, [3] * 1500)
  many['per_class']['robust_top1'] = [0.0, 50.0, *[100.0] * 1498]
  many['confused'] = [[0, 7, 2], [1, 9, 1], [0, 8, 1]]
  many['class_names'] = [f'c{k}' for k in range(1500)]
  known = [record('ours', 'prune', 90.0, 70.0, **many)]
  write_json(tmp_path / 'results.json', known)
  report.write(str(tmp_path))
  found = (tmp_path / 'report.md').read_text()
  assert 'The 10 worst of 1500 classes:' in found
  assert '| c0 | 3 | 100.00 | 0.00 | c7 (67 %) |' in found
  assert '| c0 | c7 | 2 |' in found and 'confusion.png' not in found


def test_records_of_other_weights_stand_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(text.Writer, 'picture', lambda *_, **__: None)
  make_workdir(tmp_path)
  path = tmp_path / 'results.json'
  write_json(path, [record('ours', 'prune', 80.0, 50.0, fingerprint='old')])
  os.utime(path, (1, 1))
  new = record('ours', 'prune', 90.0, 60.0, fingerprint='new')
  later = tmp_path / '3_prune' / 'results.json'
  write_json(later, [new])
  for there, first in ((None, '90.00'), ('old', '80.00'), ('third', '–')):
    model = tmp_path / '3_prune' / 'model' / 'model.json'
    about = json.loads(model.read_text()) | {'fingerprint': there}
    write_json(model, about)
    report.write(str(tmp_path))
    main, rest = (tmp_path / 'report.md').read_text().split('## Other eval')
    row = main.split('| ours | prune |')[1].split('\n')[0]
    assert f'| {first} |' in row and 'new' not in main
    old = 'old' if there is None else 'new'
    assert f'ours (weights {old}, not those of now) | prune |' in rest
  assert '90.00' in report.terminal_table([*json.loads(path.read_text()), new])


@pytest.mark.parametrize('inner', ['', 'model'])
def test_two_checkpoints_side_by_side_are_two_rows(tmp_path, inner):
  for name, robust in (('one', 50.0), ('two', 60.0)):
    what = {'run': 'published', 'stage': 'supervised', 'fingerprint': name}
    folder = tmp_path / name / inner
    write_json(folder / 'model.json', what | {'selection': 'last'})
    known = record('published', 'supervised', 80.0, robust, fingerprint=name)
    write_json(tmp_path / name / 'results.json', [known])
    audit = {k: known[k] for k in ('split', 'attack', 'norm', 'eps', 'n')}
    checks = [{'check': 'x', 'passed': name == 'one'}]
    audit |= what | {'selection': 'last', 'checks': checks}
    write_json(tmp_path / name / 'audit.json', audit)
  report.write(str(tmp_path))
  found = (tmp_path / 'report.md').read_text()
  for name, robust in (('one', '50.00'), ('two', '60.00')):
    row = f'| published ({name}) | supervised | 0 | 80.00 | 99.00 | {robust} |'
    assert found.count(row) == 1
  assert '✗ run published (two), stage' in found
  assert '✓ run published (one), stage' in found
  assert '60.00' in report.summary(str(tmp_path))


def test_how_runs_were_trained(tmp_path):
  attack = {'name': 'pgd', 'eps': '8/255', 'steps': 7, 'step_size': 'eps/4'}
  stage = {'loss': 'trades', 'batch_size': 16, 'attack': attack}
  config = {
    'data': {'source': 'folder'},
    'supervised': stage | {'total_epochs': 4},
    'prune': stage | {'total_epochs': 3, 'loss': 'natural'},
  }
  for k, (name, more) in enumerate(
    (('supervised', {}), ('prune', {'train_images': 55})), 1
  ):
    folder = tmp_path / f'{k}_{name}'
    model = {'run': 'ours', 'stage': name, 'config': config, 'dataset': 'pets'}
    write_json(folder / 'model' / 'model.json', model | more)
    rows = [{'epoch': e, 'step': 3 * e, 'seconds': 61.5} for e in (1, 2, 3)]
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / 'metrics.jsonl').write_text(lines)
  report.write(str(tmp_path))
  found = (tmp_path / 'report.md').read_text()
  row = (
    '| ours | pets | folder | {} | supervised 3 of 4, prune 3 | trades, pgd: '
    'eps 8/255, 7 steps of eps/4 (supervised); natural, no attack (prune) | '
    '6 min 9 s |'
  )
  assert row.format('55') in found
  write_json(tmp_path / '2_prune' / 'model' / 'model.json', model)
  report.write(str(tmp_path))
  found = (tmp_path / 'report.md').read_text()
  assert row.format('about 48') in found


def test_mistakes_are_told_with_the_file(tmp_path):
  with pytest.raises(UserError, match='nothing to report; looked for results'):
    report.write(str(tmp_path))
  with pytest.raises(UserError, match='absent: no such folder'):
    report.write(str(tmp_path / 'absent'))
  path = tmp_path / 'results.json'
  path.write_text('[{"run": "ours",')
  with pytest.raises(UserError, match='results.json: not valid JSON'):
    report.write(str(tmp_path))
  path.write_text('[{"run": "ours"}]')
  with pytest.raises(UserError, match="results.json: record 0 has no 'stage'"):
    report.write(str(tmp_path))


@pytest.mark.parametrize(
  'name, change, message',
  [
    ('results.json', {'n': '360'}, "record 0: 'n' may not be '360'"),
    ('results.json', {'eps': [0.1]}, "record 0: 'eps' may not be"),
    ('results.json', {'corruption': 'fog'}, "record 0 has no 'severity'"),
    ('results.json', {'members': [{}]}, "members: member 0 has no 'attack'"),
    ('results.json', {'confusion': [[1], [2]]}, 'confusion: expected K rows'),
    ('results.json', {'class_names': ['a']}, 'different numbers of classes'),
    ('results.json', {'per_class': {}}, "per_class has no 'n'"),
    ('results.json', {'robust_top1': 1e308}, "'robust_top1' may not be 1e+308"),
    ('results.json', {'config': 5}, "'config' may not be 5"),
    ('results.json', {'fingerprint': 5}, "'fingerprint' may not be 5"),
    ('results.json', {'confused': [[0, 10, 3]]}, 'confused: expected a list'),
    ('results.json', {'invalid': 'x'}, "'invalid' may not be 'x'"),
    ('results.json', {'checksum': 'x'}, 'is not what was written; delete it'),
    ('audit.json', {'n': None}, "audit 0: 'n' may not be None"),
    ('audit.json', {'checks': [{'check': 'x'}]}, "check 0 has no 'passed'"),
    ('audit.json', {'curves': {'eps': [{}]}}, "eps: point 0 has no 'eps'"),
    ('audit.json', {'curves': []}, 'curves is not a JSON object'),
    ('transfer.json', {'masked': 1}, "record 0: 'masked' may not be 1"),
    ('transfer.json', {'source': 'x'}, "record 0: 'source' may not be 'x'"),
    ('examples.json', {'images': [{}]}, "images: image 0 has no 'label'"),
    ('examples.json', {'eps': 'x'}, "'eps' may not be 'x'"),
    ('examples.json', 'pixels', 'image 0: expected two of H x W x 3 numbers'),
  ],
)
def test_a_broken_file_costs_its_own_section(tmp_path, name, change, message):
  make_evaluation(tmp_path)
  grey = [[[0.5] * 3] * 2] * 2
  classes = {'label': 1, 'clean_prediction': 1, 'adversarial_prediction': 0}
  image = classes | {'clean': grey, 'adversarial': grey}
  examples = {'eps': 0.1, 'class_names': ['a', 'b'], 'images': [image]}
  write_json(tmp_path / '4_finetune' / 'examples.json', examples)
  path = tmp_path / ('' if name == 'transfer.json' else '4_finetune') / name
  value = json.loads(path.read_text())
  broken = value[0] if isinstance(value, list) else value
  if change == 'pixels':
    broken['images'][0]['clean'][0] = [1.0]
  else:
    broken |= change
  write_json(path, value)
  write_json(tmp_path / 'results.json', [record('ours', 'prune', 91, 77)])
  (tmp_path / '3_prune' / 'metrics.jsonl').mkdir(parents=True)  # foreign
  report.write(str(tmp_path))
  text = unescaped((tmp_path / 'report.md').read_text())
  (line,) = [x for x in text.splitlines() if x.startswith(f'- {path}: ')]
  assert message in line
  assert (
    f'\n- {tmp_path}/3_prune/metrics.jsonl: can not be read: Is a directory'
    in text
  )
  assert '| ours | prune | 90 | 91.00 |' in text
  measured = name == 'results.json'
  assert ('## Attack by attack' in text) != measured


@pytest.mark.parametrize(
  'eps, text',
  [
    (8 / 255, '0.03137 = 8/255'),
    (0.0313725, '0.03137 = 8/255'),
    (0.031, '0.031'),
    (0.0314, '0.0314'),
    (0.1, '0.1'),
  ],
)
def test_eps_is_a_fraction_only_when_it_is_one(eps, text):
  assert eps_text(eps) == text


def test_spearman():
  assert spearman([1, 2, 3, 9], [2, 4, 5, 6]) == pytest.approx(1)
  # Ties share a rank: 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
  expected = np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
  assert spearman([1, 5, 5, 7], [1, 3, 2, 4]) == pytest.approx(expected)
  assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_every_picture_is_a_figure_with_its_panels():
  curve = figures.Curve('ours', [1, 2], [2.0, 1.0], [50, 60], [30, 40])
  blank = [math.nan] * 2
  bare = figures.Curve('mine', [1, 2], [2.0, 1.0], blank, blank)
  example = figures.Example(3, 3, 8, np.zeros((8, 8, 3)), np.ones((8, 8, 3)))
  steps = ([1, 10], [80, 70])
  strong = figures.SecurityCurve('a', 'a', 0.1, '0.1', ([0, 1], [9, 0]), steps)
  weak = figures.SecurityCurve('b', 'b', None, '–', ([], []), ([], []))
  pictures = [
    (figures.curves({'pretrain': [bare], 'prune': [curve, bare]}), 4),
    # A twin axis for each loss.
    (figures.against_published({'prune': (curve, curve)}, 'test', 'x'), 3),
    (figures.examples([example] * 5, ['a'] * 3, 'x'), 15),
    (figures.results([figures.Result('ours', 'prune', 0.9, 90, 70)], 'x'), 1),
    (figures.density({'stem': (100, 10), 'empty': (10, 0)}, 'x'), 2),
    (figures.security([strong, strong], 'x'), 2),
    (figures.security([weak], 'x'), 2),
    (figures.confusion(np.eye(3), ['a', 'b', 'c'], 'x'), 1),
    (figures.confusion(np.zeros((30, 30)), ['a'] * 30, 'x', numbers=False), 1),
    (figures.transfer(['a', 'b'], ['a'], {('a', 'a'): (9, True)}, {}, 'x'), 1),
    (figures.overview([('prune', 'masks', 'scores', 'weights')] * 4), 1),
  ]
  for figure, panels in pictures:
    assert isinstance(figure, Figure)
    assert len(figure.axes) == panels
    figure.canvas.draw()
