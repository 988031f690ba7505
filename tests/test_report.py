"""The report of a small made-up work directory, whole, partial and broken."""

import json
import math
import os

import numpy as np
import pytest
from matplotlib.figure import Figure

from rocl_jax import figures, report
from rocl_jax.errors import UserError

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
      images = [
        {
          'label': i,
          'clean_prediction': i,
          'adversarial_prediction': i if i % 3 else (i + 5) % 10,
          'clean': random.random((8, 8, 3)).round(3).tolist(),
          'adversarial': random.random((8, 8, 3)).round(3).tolist(),
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
  assert 'selected on the test images, for comparison with the paper' in text
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
  stage = report.published_curves()['runs']['ours']['stages']['finetune']
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
  with pytest.raises(UserError, match='metrics.jsonl, line 1'):
    report.write(str(tmp_path))


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
  assert report.eps_text(eps) == text


def test_spearman():
  assert report.spearman([1, 2, 3, 9], [2, 4, 5, 6]) == pytest.approx(1)
  # Ties share a rank: 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
  expected = np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
  assert report.spearman([1, 5, 5, 7], [1, 3, 2, 4]) == pytest.approx(expected)
  assert math.isnan(report.spearman([1, 1, 1], [1, 2, 3]))


def test_every_picture_is_a_figure_with_its_panels():
  curve = figures.Curve('ours', [1, 2], [2.0, 1.0], [50, 60], [30, 40])
  blank = [math.nan] * 2
  bare = figures.Curve('mine', [1, 2], [2.0, 1.0], blank, blank)
  example = figures.Example(3, 3, 8, np.zeros((8, 8, 3)), np.ones((8, 8, 3)))
  pictures = [
    (figures.curves({'pretrain': [bare], 'prune': [curve, bare]}), 4),
    # A twin axis for each loss.
    (figures.against_published({'prune': (curve, curve)}, 'test', 'x'), 3),
    (figures.examples([example] * 5, ['a'] * 3, 'x'), 10),
    (figures.results([figures.Result('ours', 'prune', 0.9, 90, 70)], 'x'), 1),
    (figures.density({'stem': (100, 10), 'empty': (10, 0)}, 'x'), 2),
    (figures.overview([('prune', 'masks', 'scores', 'weights')] * 4), 1),
  ]
  for figure, panels in pictures:
    assert isinstance(figure, Figure)
    assert len(figure.axes) == panels
    figure.canvas.draw()
