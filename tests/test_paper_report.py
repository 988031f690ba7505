"""The report of a small made-up reproduction: two seeds, whole and broken."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from rocl_jax import figures, published, report
from rocl_jax.report import about, findings, orderings, paper, pictures
from rocl_jax.report.html import page
from rocl_jax.report.reproduction import Model, Reproduction, Value
from rocl_jax.report.size import packed_bytes
from rocl_jax.report.text import Writer

LAYERS = {'encoder/stem/kernel': 2000, 'head/kernel': 500}
TRAIN = ('supervised', 'prune', 'finetune')
# run: stages, init_from, and clean and robust accuracy after the last one.
RUNS = {
  'ours_90': (('pretrain', *TRAIN), '', 76.0, 48.0),
  'baseline1': (('linear_eval',), '1_pretrain', 78.0, 32.0),
  'baseline2_90': (TRAIN, '', 70.0, 42.0),
  'ours_99': (TRAIN[1:], '2_supervised', 68.0, 40.0),
  'baseline2_99': (TRAIN[1:], 'baseline2_90/1_supervised', 69.0, 36.0),
  'baseline12_90': (TRAIN[1:], 'baseline1/1_linear_eval', 76.0, 47.9),
  'baseline2_natural_90': (TRAIN, '', 89.0, 0.0),
  'magnitude_90': (TRAIN[1:], '2_supervised', 75.0, 47.0),
  'small_90': (('pretrain', 'supervised'), '', 60.0, 35.0),
  'surrogate': (('supervised',), '', 85.0, 0.0),
}


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def config_of(run, seed):
  stages, start, *_ = RUNS[run]
  sections = {
    'pretrain': {
      'total_epochs': 16,
      'batch_size': 64,
      'segments': 1,
      'attack': {'eps': '8/255', 'step_size': 'eps/4', 'steps': 10},
    },
    'linear_eval': {'total_epochs': 30, 'batch_size': 256, 'loss': 'natural'},
    'supervised': {'total_epochs': 4, 'batch_size': 64, 'loss': 'trades'},
    'prune': {'total_epochs': 4, 'batch_size': 64, 'loss': 'trades'},
    'finetune': {'total_epochs': 4, 'batch_size': 64, 'loss': 'trades'},
  }
  sections['prune']['keep'] = 0.01 if run.endswith('99') else 0.1
  return sections | {
    'name': run,
    'seed': seed,
    'stages': list(stages),
    'init_from': start,
    'data': {'source': 'binary', 'validation': 200},
    'model': {'name': 'resnet18', 'width': 16},
    'eval': {'eps': '8/255'},
  }


def records_of(run, stage, seed, clean, robust, sparsity):
  """Both attacks and all selections; the second seed is two points better."""
  for selection, more in (
    ('last', 0.0),
    ('best_validation', 0.25),
    ('best_test', 0.5),
  ):
    for attack, steps, less in (('pgd10', 10, 0.0), ('pgd20', 20, 1.0)):
      yield {
        'run': run,
        'stage': stage,
        'selection': selection,
        'epoch': 4 if selection == 'last' else 3,
        'split': 'test',
        'n': 10_000,
        'dataset': 'cifar10',
        'attack': attack,
        'norm': 'linf',
        'eps': 8 / 255,
        'steps': steps,
        'clean_top1': clean + 2 * seed + more,
        'clean_top5': 97.5,
        'robust_top1': max(0.0, robust + 2 * seed + more - less),
        'robust_top5': 88.0,
        'sparsity': sparsity,
        'parameters': 2630,
        'class_names': list('abcdefghij'),
        'versions': {'jax': '0.10.2', 'device': 'cpu'},
        'config': config_of(run, seed),
      }


def make_seed(work, seed):
  records = []
  for run, (stages, _, clean, robust) in RUNS.items():
    folder = work if run == 'ours_90' else work / run
    for k, stage in enumerate(stages, 1):
      pruned = stage in ('prune', 'finetune')
      keep = (0.01 if run.endswith('99') else 0.1) if pruned else 1.0
      model = {
        'run': run,
        'stage': stage,
        'dataset': 'cifar10',
        'sparsity': 1 - keep,
        'config': config_of(run, seed),
        'layers': {
          name: {'size': size, 'kept': round(size * keep)}
          for name, size in LAYERS.items()
        },
      }
      where = folder / f'{k}_{stage}'
      write_json(where / 'model' / 'model.json', model)
      rows = [
        {'epoch': e, 'step': 62 * e, 'loss': 2.0 - 0.1 * e}
        | ({} if stage == 'pretrain' else {'test_clean_top1': 50.0 + e})
        for e in range(1, 5)
      ]
      text = ''.join(json.dumps(row) + '\n' for row in rows)
      (where / 'metrics.jsonl').write_text(text)
      if stage != 'pretrain':
        lower = 1.0 * (len(stages) - k)
        records += records_of(
          run, stage, seed, clean - lower, robust - lower, 1 - keep
        )
  write_json(work / 'results.json', records)
  write_json(work / 'config.json', config_of('ours_90', seed))
  strong = next(records_of('ours_90', 'finetune', seed, 75.0, 44.0, 0.9))
  strong |= {'attack': 'autoattack', 'n': 1000}
  weak = strong | {'attack': 'pgd10', 'robust_top1': strong['robust_top1'] + 4}
  write_json(work / '4_finetune' / 'results.json', [strong, weak])
  transfers = [
    {
      'source': {'run': 'surrogate', 'fingerprint': 's'},
      'target': {'run': run, 'stage': 'finetune', 'fingerprint': run},
      'source_name': 'surrogate/supervised',
      'target_name': f'{run}/finetune',
      'attack': 'pgd10',
      'norm': 'linf',
      'eps': 8 / 255,
      'n': 10_000,
      'split': 'test',
      'clean_top1': 76.0 if masked else 20.0,
      'robust_top1': (robust if masked else 15.0) + seed,
      'white_box': False,
      'masked': masked,
    }
    for run, robust in (('ours_90', 75.0), ('baseline2_90', 69.0))
    for masked in (True, False)
  ]
  write_json(work / '4_finetune' / 'transfer.json', transfers)


def make_reproduction(root, seeds=2):
  for seed in range(seeds):
    make_seed(root / f'seed{seed}', seed)
  return root


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Two seeds with their reports; tests read it and leave it as it is."""
  root = make_reproduction(tmp_path_factory.mktemp('reproduction'))
  assert report.write(str(root)) == str(root / 'report.md')
  return root


@pytest.fixture(scope='module')
def sections(whole):
  text = (whole / 'report.md').read_text()
  return {part.partition('\n')[0]: part for part in re.split('\n##+ ', text)}


def text_of(root, *parts):
  """Some sections of a report."""
  out, found = Writer(root), Reproduction(root)
  for part in parts:
    part(out, found)
  return '\n\n'.join(out.parts)


def test_tables_have_paper_log_and_both_seeds(sections):
  first = sections['Table 1: the method and its two parts']
  # Baseline 1 is compared under PGD-20, ours under PGD-10.
  assert (
    '| Baseline 1 (RoCL) | linear_eval | 77.85 | 31.45 | 77.85 | 31.45 '
    '| 79.00 ± 1.41 | 33.00 ± 1.41 | 32.00 ± 1.41 | +1.15 | +0.55 | PGD-20 '
    '| 10000 |'
  ) in first
  assert (
    '| Our method | finetune | 76.66 | 48.68 | 76.63 | 48.60 '
    '| 77.00 ± 1.41 | 49.00 ± 1.41 | 48.00 ± 1.41 | +0.34 | +0.32 | PGD-10 '
    '| 10000 |'
  ) in first
  assert 'top-5' not in first
  second = sections['Table 2: 90 % pruned, stage by stage']
  assert (
    '| Our method | finetune | 98.57 | 92.04 | 97.50 ± 0.00 | 88.00 ± 0.00 '
    '| -1.07 | -4.04 |'
  ) in second
  # Table 3 has no logs.
  third = sections['Table 3: 99 % pruned, stage by stage']
  assert '| finetune | 68.37 | 40.22 | – | – | 69.00 ± 1.41 |' in third


def test_transfer_with_and_without_masks(sections):
  fourth = sections['Table 4: transfer attacks']
  assert (
    '| Our method | 18.80 | 75.50 ± 0.71 | +56.70 | 76.00 ± 0.00 '
    '| 15.50 ± 0.71 | -3.30 | 20.00 ± 0.00 | 10000 |'
  ) in fourth
  assert 'is an artefact' in fourth
  assert '86.00 ± 1.41 clean, 1.00 ± 1.41 under PGD-10' in fourth
  finding = sections['Findings']
  assert (
    '`ours_90` 75.50 ± 0.71 with, 15.50 ± 0.71 without (paper: 18.80)'
  ) in finding


def test_stages_of_other_runs_and_missing_rows(whole, sections):
  third = sections['Table 3: 99 % pruned, stage by stage']
  assert '| Our method | supervised | 76.64 | 49.15 | – | – | 75.00' in third
  assert 'Our method, supervised is ours_90, supervised.' in third
  fifth = sections['Table 5: without adversarial training']
  assert (
    '| Our method (w/o adv training) | finetune | 91.77 | 0.03 | 91.91 | 0.02 '
    '| – | – | – | – | – | PGD-10 | – |'
  ) in fifth
  assert (
    'Not measured: Our method (w/o adv training), supervised '
    '(ours_natural_90, supervised);'
  ) in fifth
  found = Reproduction(whole)
  assert found.holder('ours_99', 'pretrain') == ('ours_90', 'pretrain')
  assert found.holder('baseline2_99', 'supervised') == Model(
    'baseline2_90', 'supervised'
  )
  # A linear classifier in the place of a supervised stage.
  assert found.holder('baseline12_90', 'supervised') == Model(
    'baseline1', 'linear_eval'
  )
  # Its parent's later stages are not its own.
  assert found.holder('baseline1', 'prune') == ('baseline1', 'prune')
  assert found.holder('ours_99', 'prune') == ('ours_99', 'prune')
  assert found.holder('absent', 'prune') == ('absent', 'prune')


def test_orderings_have_three_outcomes(whole, sections):
  table = sections['Orderings']
  assert (
    '| ours over Baseline 2, 90 % | PGD-10 | +6.94 | +6.00 | 0.70 | shown |'
    in table
  )
  assert (
    '| ours over Baseline 1 + Baseline 2 | PGD-10 | +1.47 | +0.10 | 0.71 '
    '| within noise |'
  ) in table
  assert (
    '| unpruned over pruned, ours_90 | clean | +0.12 | -2.00 | 0.60 '
    '| not shown (opposite) |'
  ) in table
  assert '| ours over magnitude, 90 % | clean | – | +1.00 |' in table
  assert 'ours over random, 90 % (clean)' in table.split('Not tested')[1]
  found = Reproduction(whole)
  assert orderings.counts(found) == {
    'shown': table.count('| shown |') - 2,  # over small, twice, is ours alone
    'within noise': table.count('| within noise |') - 2,
    'not shown (opposite)': table.count('| not shown (opposite) |'),
    'at chance level': 0,
  }


def test_no_ordering_among_guesses(tmp_path):
  make_reproduction(tmp_path, seeds=1)
  path = tmp_path / 'seed0' / 'results.json'
  ordering = orderings.Ordering(
    '',
    Model('ours_90', 'finetune'),
    Model('baseline2_90', 'finetune'),
    'robust_top1',
  )
  for above, verdict in ((10.0, 'at chance level'), (14.0, 'shown')):
    records = json.loads(path.read_text())
    for record in records:
      record['class_names'] = [str(i) for i in range(10)]
      if record['stage'] == 'finetune' and record['run'] == 'ours_90':
        record['robust_top1'] = above
      if record['stage'] == 'finetune' and record['run'] == 'baseline2_90':
        record['robust_top1'] = 7.0
    path.write_text(json.dumps(records))
    outcome = orderings.judge(Reproduction(tmp_path), ordering)
    assert outcome.verdict == verdict


def test_the_error_of_an_ordering(tmp_path):
  make_reproduction(tmp_path, seeds=1)
  found = Reproduction(tmp_path)
  pair = Model('ours_90', 'finetune'), Model('baseline2_90', 'finetune')
  one = orderings.Ordering('', *pair, 'robust_top1')
  outcome = orderings.judge(found, one)
  expected = 100 * np.sqrt((0.48 * 0.52 + 0.42 * 0.58) / 10_000)
  assert outcome.error == pytest.approx(expected)
  assert outcome.difference == Value((6.0,))
  # The seeds' spread comes on top: differences of 6 and 4.
  make_seed(tmp_path / 'seed1', 0)
  path = tmp_path / 'seed1' / 'results.json'
  records = json.loads(path.read_text())
  for record in records:
    if (record['run'], record['stage']) == pair[1]:
      record['robust_top1'] += 2
  path.write_text(json.dumps(records))
  outcome = orderings.judge(Reproduction(tmp_path), one)
  assert outcome.difference == Value((6.0, 4.0))
  images = 48 * 52 / 1e4 + (42 * 58 + 44 * 56) / 2e4
  assert outcome.error == pytest.approx(np.sqrt(images + 2 / 2))


def test_selections_attacks_and_baselines(sections):
  assert (
    '| ours_90 | finetune | 4, 4 | 77.00 ± 1.41 | 49.00 ± 1.41 '
    '| 3, 3 | 77.25 ± 1.41 | 49.25 ± 1.41 '
    '| 3, 3 | 77.50 ± 1.41 | 49.50 ± 1.41 |'
  ) in sections['Which epoch']
  assert (
    '| ours_90 | finetune | 77.00 ± 1.41 | 49.00 ± 1.41 | 48.00 ± 1.41 | 10000 '
    '| 45.00 ± 1.41 | – | 49.00 ± 1.41 | 76.00 ± 1.41 | 1000 |'
  ) in sections['Attack by attack']
  baselines = sections['Baselines beside the paper']
  assert '| magnitude_90, not trained | 90 | 250 | 1,313 | 75.00' in baselines
  assert '`best_test` is +0.50 points' in sections['Findings']


def test_an_attack_on_fewer_images_is_told_apart(tmp_path):
  make_reproduction(tmp_path, seeds=1)
  for path in tmp_path.rglob('results.json'):
    records = json.loads(path.read_text())
    few = [r | {'n': 256} for r in records if r['attack'] == 'pgd20']
    usual = [r for r in records if r['attack'] == 'pgd10']
    same = [
      r | {'n': 256, 'robust_top1': r['robust_top1'] + 10}
      for r in usual
      if r['stage'] in ('finetune', 'linear_eval')
    ]
    strong = [r | {'attack': 'autoattack'} for r in same]
    write_json(path, usual + few + same + strong)
  text = text_of(tmp_path, paper.tables, paper.attacks, findings.section)
  assert 'Under PGD-20 here, another n: 256.' in text
  assert (
    '| ours_90 | finetune | 76.00 | 48.00 | – | 10000 '
    '| 58.00 | 47.00 | 58.00 | 75.00 | 256 |'
  ) in text
  assert '`ours_90` 58.00 under PGD-10, 47.00 under PGD-20, 256 images' in text


def test_bytes_of_a_packed_network():
  # 20 weights of 200 are kept; 13 channels of BatchNorm, 4 biases.
  layers = {'a': (100, 10), 'b': (100, 10)}
  assert packed_bytes(layers, 200 + 26 + 4, 4) == 2 * (20 + 30 + 26) + 25
  dense = {'a': (100, 100), 'b': (100, 100)}
  assert packed_bytes(dense, 200 + 26 + 4, 4) == 2 * (200 + 30 + 26)


def test_scale_and_seeds_are_told(tmp_path, sections):
  assert '3,968 training images, not 50,000' in next(iter(sections.values()))
  make_reproduction(tmp_path)
  config = config_of('ours_90', 0)
  config['model']['width'] = 64
  config['supervised']['batch_size'] = config['pretrain']['batch_size'] = 790
  for path in tmp_path.rglob('results.json'):
    records = json.loads(path.read_text())
    for record in records:
      if record['run'] == 'ours_90':
        record['config'] = config
    path.write_text(json.dumps(records))
  for seed in ('seed0', 'seed1'):
    write_json(tmp_path / seed / 'config.json', config)
  path = tmp_path / 'seed1' / 'results.json'
  records = json.loads(path.read_text())
  write_json(path, [r for r in records if r['run'] != 'baseline1'])
  words = '--config=configs/paper.py:asrun --seeds=0'
  command = f'/x/rocl_jax/reproduce/__main__.py {words}'
  write_json(tmp_path / 'seed0' / 'run.json', {'command': command})
  text = text_of(tmp_path, about.introduction, paper.tables, about.commands)
  assert 'another scale' not in text
  assert '| 78.00 (1 of 2) | 32.00 (1 of 2) |' in text
  assert '- Preset: `configs/paper.py:asrun`;' in text
  made = (
    'python -m rocl_jax.reproduce --config=configs/paper.py:asrun --seeds=0'
  )
  assert f'\n{made}\n' in text
  assert '--config=configs/paper.py:table2_ours,asrun' in text


def test_both_forms_and_no_pictures_from_numbers_alone(whole, sections):
  text = (whole / 'report.md').read_text()
  assert 'Left out: their histograms need' in sections['Scores and weights']
  named = set(re.findall(r'\(figures/(.+?)\)', text))
  assert named == {path.name for path in (whole / 'figures').iterdir()}
  assert {'figure2.png', 'sparsity.png', 'size.png'} <= named
  assert {'published.png', 'published_baseline2_90.png'} <= named
  for folder in (whole, whole / 'seed0', whole / 'seed1'):
    markdown = (folder / 'report.md').read_text()
    html = (folder / 'report.html').read_text()
    sources = re.findall(r'<img src="([^"]{0,30})', html)
    assert len(sources) == markdown.count('\n![')
    assert all(s.startswith('data:image/png;base64,') for s in sources)
    for tag in ('<script', '<link', '<iframe', '@import', 'url('):
      assert tag not in html
  assert not list(whole.rglob('.*'))


def test_html_shows_what_is_no_markup(tmp_path):
  html = page(
    '# A < B & C\n\n<script>x</script>\n\n| a |\n|---:|\n| 1 |', tmp_path
  )
  assert '<title>A &lt; B &amp; C</title>' in html
  assert '&lt;script&gt;' in html and '<script' not in html
  assert '<td style="text-align:right">1</td>' in html


def test_histograms_of_a_whole_run(tmp_path):
  from etils import epath

  from rocl_jax import checkpoint

  make_reproduction(tmp_path, seeds=1)
  work = epath.Path(tmp_path / 'seed0')
  random = np.random.default_rng(0)
  weights = {
    'encoder': {'stem': {'kernel': random.normal(size=(3, 3, 3, 8))}},
    'head': {'kernel': random.normal(size=(8, 10))},
  }
  state = {'frozen': {'kernels': weights}, 'trainable': {'scores': weights}}
  with checkpoint.States(work / '3_prune' / 'checkpoints') as states:
    states.save(1, {'trained': state}, [])
  masks = {
    'encoder/stem/kernel': weights['encoder']['stem']['kernel'] > 1,
    'head/kernel': weights['head']['kernel'] > 1,
  }
  fields = ('epoch', 'class_names', 'image_shape', 'fingerprint', 'selection')
  known = json.loads((work / '4_finetune' / 'model' / 'model.json').read_text())
  variables = {'params': weights, 'masks': masks}
  checkpoint.save_model(
    work / '4_finetune' / 'model', variables, dict.fromkeys(fields) | known
  )
  text = text_of(tmp_path, pictures.histograms)
  assert '(figures/histograms.png)' in text and 'Left out' not in text
  # A copy without weights still has them; not of another model.
  picture = tmp_path / 'figures' / 'histograms.png'
  before = picture.read_bytes()
  picture.unlink()
  (work / '3_prune' / 'checkpoints').rmtree()
  assert text_of(tmp_path, pictures.histograms) == text
  assert picture.read_bytes() == before
  kept = tmp_path / 'figures' / 'histograms.json'
  counted = json.loads(kept.read_text())
  counted['panels']['weight'][0]['counts'].pop()
  write_json(kept, counted)
  found = Reproduction(tmp_path)
  pictures.histograms(Writer(tmp_path), found)
  assert 'weight: edges and counts are not' in found.problems[0]
  write_json(kept, counted | {'model': 'another', 'panels': {}})
  assert 'Left out' in text_of(tmp_path, pictures.histograms)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('results.json', '[{"run": "ours",', 'not valid JSON'),
    ('config.json', '[]', 'expected a JSON object'),
    ('run.json', '[]', 'expected a JSON object'),
    ('4_finetune/transfer.json', '[{}]', "record 0 has no 'source'"),
    ('4_finetune/model/model.json', '{', 'not valid JSON'),
    (
      '4_finetune/model/model.json',
      '{"layers": {"a\\nb": {"size": 1}}}',
      "layer a b has no 'kept'",
    ),
    ('2_supervised/metrics.jsonl', 'x\n{"epoch": 1}\n', 'line 1: not a JSON'),
  ],
)
def test_a_broken_file_costs_its_own_part(
  tmp_path, monkeypatch, name, content, message
):
  monkeypatch.setattr(Writer, 'picture', lambda *_: None)
  make_reproduction(tmp_path, seeds=1)
  path = tmp_path / 'seed0' / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content)
  report.write(str(tmp_path))
  for folder in (tmp_path, tmp_path / 'seed0'):
    text = (folder / 'report.md').read_text()
    (line,) = [x for x in text.splitlines() if x.startswith(f'- {path}')]
    assert message in line.replace('\\', '')
  whole = '| Our method | finetune | 76.66 | 48.68 | 76.63 | 48.60 | 76.00'
  assert (whole in (tmp_path / 'report.md').read_text()) == (
    name != 'results.json'
  )


def test_the_command(whole, tmp_path):
  assert re.search(
    r'ours_90 +finetune +76.66 +48.68 +77.00 ± 1.41 +49.00 ± 1.41\n',
    report.summary(str(whole)),
  )
  write_json(tmp_path / 'seed0' / 'results.json', {})
  command = [sys.executable, '-m', 'rocl_jax.report', str(tmp_path)]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 2 and result.stderr.count('\n') == 1
  assert 'seed0/results.json: expected a list of records' in result.stderr


def test_what_is_not_to_be_believed_is_marked(tmp_path):
  make_reproduction(tmp_path, seeds=1)
  path = tmp_path / 'seed0' / 'results.json'
  records = json.loads(path.read_text())
  for found in records:
    if (found['run'], found['stage']) == ('magnitude_90', 'prune'):
      found['confusion'] = [[1000, *[0] * 9]] * 10
      found['clean_top1'] = 10.0
    if found['run'] == 'ours_90' and found['stage'] in ('prune', 'finetune'):
      found['invalid'] = 3
  path.write_text(json.dumps(records))
  text = text_of(tmp_path, paper.tables, paper.baselines)
  assert '| Our method | prune ⚠ | 75.91 |' in text
  assert '⚠ ours_90, prune: 3 of 10000 images have logits that are' in text
  assert '| magnitude_90, not trained ⚠ | 90 |' in text
  assert '⚠ magnitude_90, prune: predictions collapse: 100 % of all' in text
  assert text.count(' ⚠ |') == 5
  table = paper.terminal_table(Reproduction(tmp_path))
  assert re.search('ours_90 +finetune ⚠ ', table)
  assert '\n⚠ ours_90, finetune: 3 of 10000 images' in table


def test_transfer_to_weights_of_before_does_not_count(tmp_path):
  make_reproduction(tmp_path, seeds=1)
  work = tmp_path / 'seed0'
  path = work / '4_finetune' / 'transfer.json'
  records = json.loads(path.read_text())
  again = [
    record | {'target': record['target'] | {'fingerprint': 'new'}, 'n': 9000}
    for record in records
  ]
  write_json(path, records + again)
  assert (
    Reproduction(tmp_path).transfers('ours_90', True)['seed0']
    == (Reproduction(tmp_path).first.transfers[0])
  )
  model = work / '4_finetune' / 'model' / 'model.json'
  about = json.loads(model.read_text()) | {'fingerprint': 'new'}
  write_json(model, about)
  found = Reproduction(tmp_path).transfers('ours_90', True)['seed0']
  assert found['target_fingerprint'] == 'new'


def test_a_seed_without_anything_is_left_out(tmp_path):
  make_reproduction(tmp_path, seeds=1)
  write_json(tmp_path / 'seed1' / 'config.json', [])
  found = Reproduction(tmp_path)
  assert list(found.seeds) == ['seed0']
  assert found.problems == [
    f'{tmp_path}/seed1/config.json: expected a JSON object'
  ]


def test_every_row_of_the_paper_has_a_place(whole):
  found = Reproduction(whole)
  for row in published.tables()['rows']:
    if row['stage'] != 'black_box':
      assert found.holder(row['row'], row['stage']).run
  names = list(orderings.all_of_them(found))
  assert len({(one.claim, one.key) for one in names}) == len(names)


def test_pictures_have_their_panels():
  point = figures.Point('ours', 1, (76.0, 0.5), (48.0, float('nan')), 'dense')
  stage = figures.StagePoint('ours_90', 'ours', 'prune', 70, 40, 71, 41)
  histogram = figures.Histogram('before', [0, 1, 2], [3, 4])
  drawn = [
    (figures.against([point], 'weights removed', ['0 %', '90 %']), 2),
    (figures.against([point], 'bytes'), 2),
    (figures.by_stage([stage]), 1),
    (figures.histograms({'score': [histogram], 'weight': [histogram]}), 2),
  ]
  for figure, panels in drawn:
    assert len(figure.axes) == panels
    figure.canvas.draw()
  colours = figures.run_colours(['ours_90', 'ours_99', 'other'])
  assert colours['ours_90'] == figures.BLUE.lower() != colours['ours_99']
