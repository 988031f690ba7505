"""The files below a work directory, checked as they are read."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rocl_jax.errors import RunFailed, UserError
from rocl_jax.files import check_record, reading
from rocl_jax.report.records import (
  ACCURACIES,
  Key,
  Record,
  apart,
  find_headline,
  key_of,
  main_split,
  merge,
  newest,
  runs_in_order,
  stage_order,
)
from rocl_jax.report.text import cause

STAGE_FOLDER = re.compile(r'(\d+)_(.+)')

# All that a report is made of.
FILES = (
  *('results.json', 'audit.json', 'transfer.json', 'config.json'),
  *('run.json', 'request.json', 'model.json', 'examples.json'),
  *('metrics.jsonl', 'histograms.json'),
)

MODEL = {'run': str, 'stage': str, 'selection': str, 'split': str}
NUMBER = (int, float)
_MOST_WEIGHTS = 10**12
NUMBER_OR_NOT = (int, float, type(None))

# What must agree for two transfers to be the same measurement.
TRANSFER_IDENTITY = (
  'source_name',
  'source_fingerprint',
  'target_name',
  'target_fingerprint',
  'masked',
  'attack',
  'norm',
  'eps',
  'n',
  'split',
)


# Checks.


def _read_json(path: Path) -> Any:
  with reading(path):
    content = path.read_bytes()
  try:
    return json.loads(content.decode())
  # ValueError also covers bytes that are not UTF-8.
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: not valid JSON: {error}') from error


def _read_object(path: Path) -> Record:
  value = _read_json(path)
  if not isinstance(value, dict):
    raise UserError(f'{path}: expected a JSON object')
  return value


def _read_list(path: Path) -> list:
  value = _read_json(path)
  if not isinstance(value, list):
    raise UserError(f'{path}: expected a list of records')
  return value


def _require(where: str, value: Any, fields: Mapping[str, Any]) -> None:
  """Checks that a value is an object with fields of these types."""
  if not isinstance(value, dict):
    raise UserError(f'{where} is not a JSON object')
  for key, kind in fields.items():
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if key not in value and type(None) not in kinds:
      raise UserError(f'{where} has no {key!r}')
    # By exact type: JSON's true and false are integers to isinstance.
    if type(value.get(key)) not in kinds:
      raise UserError(f'{where}: {key!r} may not be {value.get(key)!r:.40}')


def _require_list(
  where: str, values: Any, fields: Mapping[str, Any], what: str
) -> None:
  if not isinstance(values, list):
    raise UserError(f'{where}: expected a list of {what}s')
  for i, value in enumerate(values):
    _require(f'{where}: {what} {i}', value, fields)


# One reader for each kind of file.


def _read_results(path: Path) -> list[Record]:
  records = _read_list(path)
  for i, record in enumerate(records):
    where = f'{path}: record {i}'
    _require(where, record, MODEL)
    names = ('attack', 'norm', 'corruption', 'dtype', 'fingerprint')
    _require(where, record, dict.fromkeys(names, (str, type(None))))
    numbers = ('eps', 'n', 'sparsity', 'parameters', 'invalid', 'clean_invalid')
    _require(where, record, dict.fromkeys(numbers, NUMBER_OR_NOT))
    _require(where, record, {'everyone': (bool, type(None))})
    _require(where, record, {'config': (dict, type(None))})
    for key in ACCURACIES:
      x = record.get(key)
      if isinstance(x, NUMBER) and math.isfinite(x) and not 0 <= x <= 100:
        raise UserError(f'{where}: {key!r} may not be {x!r:.40}')
    check_record(path, i, record)
    if record.get('corruption') is not None:
      _require(where, record, {'severity': int})
    if record.get('members') is not None:
      _require_list(
        f'{where}: members',
        record['members'],
        {'attack': str, 'robust_top1': NUMBER_OR_NOT},
        'member',
      )
    _check_classes(where, record)
  return records


def _check_classes(where: str, record: Record) -> None:
  """Checks that all there is by class is of the same number of classes."""
  sizes = {}
  names = record.get('class_names')
  if names is not None:
    if not isinstance(names, list):
      raise UserError(f'{where}: class_names: expected a list')
    sizes['class_names'] = len(names)
  table = record.get('per_class')
  if table is not None:
    keys = ('n', 'clean_top1', 'robust_top1')
    _require(f'{where}: per_class', table, dict.fromkeys(keys, list))
    for key in (*keys, 'clean_predicted', 'robust_predicted'):
      values = table.get(key)
      if values is None and key not in keys:  # an earlier version's record
        continue
      kinds: tuple = NUMBER if key[-1] == 'd' else NUMBER_OR_NOT
      if not isinstance(values, list) or not _all_are(values, kinds):
        raise UserError(f'{where}: per_class.{key}: expected numbers')
      sizes[f'per_class.{key}'] = len(values)
  counts = record.get('confusion')
  if counts is not None:
    if not isinstance(counts, list) or not all(
      isinstance(row, list)
      and len(row) == len(counts)
      and _all_are(row, NUMBER)
      for row in counts
    ):
      raise UserError(f'{where}: confusion: expected K rows of K counts')
    sizes['confusion'] = len(counts)
  if len(set(sizes.values())) > 1:
    found = ', '.join(f'{key} {size}' for key, size in sizes.items())
    raise UserError(f'{where}: different numbers of classes: {found}')
  pairs = record.get('confused')
  if pairs is not None:
    most = max(sizes.values(), default=_MOST_WEIGHTS)
    if not isinstance(pairs, list) or not all(
      isinstance(pair, list)
      and len(pair) == 3
      and all(type(x) is int and x >= 0 for x in pair)
      and max(pair[:2]) < most
      for pair in pairs
    ):
      raise UserError(
        f'{where}: confused: expected a list of [label, class, count]'
      )


def _all_are(values: list, kinds: tuple) -> bool:
  return {type(x) for x in values} <= {*kinds}


def _read_audit(path: Path) -> list[Record]:
  """Audits; a file may hold one, or a list of them."""
  value = _read_json(path)
  audits = value if isinstance(value, list) else [value]
  for i, audit in enumerate(audits):
    where = f'{path}: audit {i}'
    _require(where, audit, MODEL | {'attack': str, 'n': int})
    names = ('norm', 'dtype', 'fingerprint')
    texts = dict.fromkeys(names, (str, type(None)))
    _require(where, audit, texts | {'eps': NUMBER_OR_NOT})
    check = {'check': str, 'passed': bool}
    _require_list(f'{where}: checks', audit.get('checks', []), check, 'check')
    curves = audit.get('curves', {})
    _require(f'{where}: curves', curves, {})
    for name, points in curves.items():
      wanted = {name: NUMBER, 'robust_top1': NUMBER}
      title = ' '.join(name.split())[:40]  # one line, whatever it is
      _require_list(f'{where}: curves.{title}', points, wanted, 'point')
  return audits


def _read_transfers(path: Path) -> list[Record]:
  """Transfers, the two fingerprints pulled out of their models."""
  records = _read_list(path)
  fields = {
    'source': dict,
    'target': dict,
    'source_name': str,
    'target_name': str,
    'attack': str,
    'split': str,
    'n': int,
    'norm': (str, type(None)),
    'eps': NUMBER_OR_NOT,
    'clean_top1': NUMBER_OR_NOT,
    'robust_top1': NUMBER_OR_NOT,
    'white_box': bool,
    'masked': bool,
  }
  for i, record in enumerate(records):
    _require(f'{path}: record {i}', record, fields)
    for side in ('source', 'target'):
      where = f'{path}: record {i}: {side}'
      _require(where, record[side], {'fingerprint': (str, type(None))})
      record[f'{side}_fingerprint'] = record[side].get('fingerprint')
  return records


def _read_model(path: Path) -> Record:
  """What `model.json` says, the layers' counts checked."""
  model = _read_object(path)
  _require(str(path), model, {'sparsity': NUMBER_OR_NOT})
  layers = model.setdefault('layers', {})
  _require(f'{path}: layers', layers, {})
  for name, layer in layers.items():
    title = ' '.join(name.split())[:80]  # one line, whatever it is
    where = f'{path}: layer {title}'
    _require(where, layer, {'size': int, 'kept': int})
    if not 0 <= layer['kept'] <= layer['size'] <= _MOST_WEIGHTS:
      raise UserError(f'{where}: size and kept are no counts of weights')
  return model


def _read_examples(path: Path) -> Record:
  data = _read_object(path)
  _require(str(path), data, {'eps': NUMBER_OR_NOT})
  names = data.get('class_names', [])
  if not isinstance(names, list):
    raise UserError(f'{path}: class_names: expected a list')
  classes = ('label', 'clean_prediction', 'adversarial_prediction')
  pixels = ('clean', 'adversarial')
  fields = dict.fromkeys(classes, int) | dict.fromkeys(pixels, list)
  images = data.get('images') or []
  _require_list(f'{path}: images', images, fields, 'image')
  for i, image in enumerate(images):
    shapes = [_shape(image[key]) for key in pixels]
    if None in shapes or shapes[0] != shapes[1]:
      raise UserError(f'{path}: image {i}: expected two of H x W x 3 numbers')
  return data


def read_histograms(path: Path) -> Record:
  """What was counted for a picture: `model`, and `panels` by their titles."""
  data = _read_object(path)
  _require(str(path), data, {'model': str, 'panels': dict})
  fields = {'name': str, 'edges': list, 'counts': list}
  for title, drawn in data['panels'].items():
    where = f'{path}: {" ".join(title.split())[:80]}'
    _require_list(where, drawn, fields, 'histogram')
    for histogram in drawn:
      edges, counts = histogram['edges'], histogram['counts']
      numbers = all(
        type(x) in NUMBER and math.isfinite(x) for x in (*edges, *counts)
      )
      if not numbers or not counts or len(edges) != len(counts) + 1:
        raise UserError(f'{where}: edges and counts are not those of bins')
  return data


def _shape(pixels: Any) -> tuple[int, int] | None:
  """Height and width, or None where that is no picture in colour."""
  try:
    right = all(
      len(row) == len(pixels[0])
      and all(
        len(pixel) == 3 and all(isinstance(x, NUMBER) for x in pixel)
        for pixel in row
      )
      for row in pixels
    )
  except TypeError:
    return None
  return (len(pixels), len(pixels[0])) if right and pixels else None


def _read_metrics(path: Path) -> list[Record]:
  """The rows of a metrics file by epoch; a resumed epoch's last row counts."""
  with reading(path):
    lines = path.read_bytes().decode(errors='replace').split('\n')
  rows = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      epoch = int(row['epoch'])
      rows[epoch] = row | {'epoch': epoch}
    except (
      *(ValueError, TypeError, KeyError),
      *(OverflowError, RecursionError),  # Infinity, and brackets in brackets
    ) as error:
      # The last line of a run in progress may still be half written.
      if number == len(lines):
        break
      raise UserError(
        f'{path}, line {number}: not a JSON object with an "epoch"'
      ) from error
  return [rows[epoch] for epoch in sorted(rows)]


# All of them.


def _stage_folders(folder: Path) -> dict[str, Path]:
  """The `<k>_<stage>` folders, in the order of k."""
  found = []
  for path in folder.iterdir():
    match = STAGE_FOLDER.fullmatch(path.name)
    if match and path.is_dir():
      found.append((int(match[1]), match[2], path))
  return {stage: path for _, stage, path in sorted(found)}


def _found(workdir: Path, name: str) -> list[Path]:
  """All files of a name, the oldest first."""
  files = workdir.rglob(name)
  return sorted(files, key=lambda p: (p.lstat().st_mtime_ns, str(p)))


class Workdir:
  """What was found below a work directory.

  What can't be read is left out, and said in `problems`.

  Attributes:
    records, audits, transfers: what was measured, from all files together.
    superseded: records of weights that no longer count, see `records.apart`.
    problems: a line for each file that was left out so far.
    config: the run's, or {}.
    runs: their names, the main one first.
    folders: {run: {stage: folder}}, in order.
    split: the images of the main tables.
    headline: the evaluation of the main tables, see `find_headline`.
    command: that which last ran here, or ''.
  """

  def __init__(self, path: Path) -> None:
    self.path = path
    self.problems: list[str] = []
    self._known: dict[Path, Any] = {}
    if not path.is_dir():
      raise UserError(f'{path}: no such folder')
    config = self.read(path / 'config.json', _read_object, {})
    self.config: Record = config
    command = self.read(path / 'run.json', _read_object, {}).get('command')
    self.command = command if isinstance(command, str) else ''
    main = self.read(path, _stage_folders, {})
    others = {
      folder.name: stages
      for folder in sorted(path.iterdir())
      if folder.is_dir()
      and not STAGE_FOLDER.fullmatch(folder.name)
      and (stages := self.read(folder, _stage_folders, {}))
    }
    records = self._all('results.json', _read_results)
    last, there = newest(records), self._weights({'': main} | others)
    self._there = there
    self.records, self.superseded = apart(merge([records]), last, there)
    self.split = main_split(self.records)
    self.headline = find_headline(self.records, self.split)
    self.main_run = self._main_run(main, others)
    # The main run comes first in every table and picture.
    self.folders = {self.main_run: main} | others
    self.runs = list(
      dict.fromkeys([*self.folders, *runs_in_order(self.records)])
    )
    found = self._all('audit.json', _read_audit)
    audits, _ = apart(merge([found]), newest(found) | last, there)
    self.audits = sorted(audits, key=self._place)
    self.transfers = merge(
      [self._all('transfer.json', _read_transfers)], TRANSFER_IDENTITY
    )
    measured = self.records or self.audits or self.transfers
    if not (measured or self.config or main or others):
      raise UserError(
        self.problems[0]
        if self.problems
        else f'{path}: nothing to report; looked for results.json, audit.json '
        'and transfer.json (at any depth), config.json, and stage folders such '
        'as 1_pretrain and natural/1_supervised'
      )

  def read(self, path: Path, read: Callable[[Path], Any], empty: Any) -> Any:
    """What a file holds; `empty` where there is none, or it is damaged."""
    if path not in self._known:
      self._known[path] = empty
      try:
        if os.path.lexists(path):
          self._known[path] = read(path)
      except (UserError, RunFailed, OSError) as error:
        self.problems.append(cause(error))
    return self._known[path]

  def _all(self, name: str, read: Callable[[Path], list]) -> list[Record]:
    """What all files of a name hold together, the newest last."""
    files = _found(self.path, name)
    return [record for file in files for record in self.read(file, read, [])]

  def _weights(
    self, runs: Mapping[str, Mapping[str, Path]]
  ) -> dict[Key, dict[str, str]]:
    """Of each model, the fingerprints in its stage's folder, or else in any.

    Each has a name, the folder's.
    """
    own = {folder: run for run, x in runs.items() for folder in x.values()}
    homes: dict[Key, dict[str, str]] = {}
    others: dict[Key, dict[str, str]] = {}
    for file in _found(self.path, 'model.json'):
      model = self.read(file, _read_model, {})
      fields = ('run', 'stage', 'fingerprint')
      if all(isinstance(model.get(field), str) for field in fields):
        model.setdefault('selection', 'last')
        folder = file.parent
        folder = folder.parent if folder.name == 'model' else folder
        home = own.get(file.parent.parent) in ('', model['run'])
        name = folder.relative_to(self.path).as_posix()
        known = (homes if home else others).setdefault(key_of(model), {})
        known[model['fingerprint']] = name
    return others | homes

  def _main_run(
    self, main: Mapping[str, Path], others: Mapping[str, Any]
  ) -> str:
    for folder in main.values():
      for name, read in (
        ('model/model.json', _read_model),
        ('examples.json', _read_examples),
      ):
        run = self.read(folder / name, read, {}).get('run')
        if isinstance(run, str):
          return run
    recorded = [r for r in runs_in_order(self.records) if r not in others]
    return recorded[0] if recorded else 'ours'

  def counts(self, model: Record) -> bool:
    """Whether it has the weights that its folder has, if that is known."""
    named = {'run': '', 'stage': '', 'selection': 'last'} | model
    there, own = self._there.get(key_of(named)), model.get('fingerprint')
    return not there or own is None or own in there

  def metrics(self, run: str, stage: str) -> list[Record]:
    return self._of_stage(run, stage, 'metrics.jsonl', _read_metrics, [])

  def model(self, run: str, stage: str) -> Record:
    return self._of_stage(run, stage, 'model/model.json', _read_model, {})

  def examples(self, run: str, stage: str) -> Record:
    return self._of_stage(run, stage, 'examples.json', _read_examples, {})

  def _of_stage(
    self, run: str, stage: str, name: str, read: Callable, empty: Any
  ) -> Any:
    folder = self.folders.get(run, {}).get(stage)
    return self.read(folder / name, read, empty) if folder else empty

  def models(self) -> Iterator[Record]:
    """What is said of each model, the last stage of the main run first."""
    for run in self.runs:
      for stage in reversed(self.stages(run)):
        if model := self.model(run, stage):
          yield model

  def config_of(self, run: str) -> Mapping[str, Any]:
    """What a run was asked for, or {}."""
    said: list[Any] = [self.config] if run == self.main_run else []
    said += [r.get('config') for r in self.records if r['run'] == run]
    said += [self.model(run, s).get('config') for s in self.stages(run)]
    return next((x for x in said if x and isinstance(x, Mapping)), {})

  def datasets(self) -> list[str]:
    names = [r.get('dataset') for r in self.records]
    names += [model.get('dataset') for model in self.models()]
    if not any(names):
      data = self.config.get('data')
      names = [data.get('source') if isinstance(data, Mapping) else None]
    return list(dict.fromkeys(str(name) for name in names if name))

  def place(self, run: str, stage: str) -> str:
    """A stage's folder within the work directory."""
    folder = self.folders.get(run, {}).get(stage)
    return folder.relative_to(self.path).as_posix() if folder else stage

  def stages(self, run: str) -> list[str]:
    """A run's stages in order: its folders, its plan, then its records."""
    planned = self.config.get('stages') if run == self.main_run else None
    if not isinstance(planned, list | tuple):
      planned = []
    names = [name for name in planned if isinstance(name, str)]
    names += [name for name in self.folders.get(run, {}) if name not in names]
    recorded = {r['stage']: 0 for r in self.records if r['run'] == run}
    return names + [s for s in stage_order(recorded) if s not in names]

  def in_order(self, records: Sequence[Record]) -> list[Record]:
    """Records by run and stage, as the tables have them."""
    return sorted(records, key=self._place)

  def _place(self, record: Record) -> tuple:
    run, stage = record['run'], record['stage']
    stages = self.stages(run)
    return (
      self.runs.index(run) if run in self.runs else len(self.runs),
      run,
      stages.index(stage) if stage in stages else len(stages),
    )
