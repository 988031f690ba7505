r"""Evaluates a saved model.

  python -m rocl_jax.evaluate --model=W/4_finetune/model \
      --config=configs/eval.py:paper

--model=FOLDER             a model folder, with its own masks
--config=FILE[:SUITE]      attacks and images: configs/eval.py:paper or :quick;
                           --config.FIELD=VALUE overrides

The radius is the config's, 8/255, whatever the model was trained with: add
--config.eval.eps=0.1 for the quickstart's. The records go to results.json
beside the model's folder, where `python -m rocl_jax.report` finds them.
"""

from dataclasses import dataclass

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rocl_jax import command, evaluation
from rocl_jax.settings import one_of, parse, within


@dataclass(frozen=True, kw_only=True)
class DataOverride:
  """The `data` section of an evaluation; empty fields are the model's own.

  Attributes:
    source: see `rocl_jax.data`.
    dir: where the source finds its files.
  """

  source: str
  dir: str


@dataclass(frozen=True, kw_only=True)
class Settings:
  """What an evaluation config says.

  Attributes:
    seed: of the attacks' starts.
    split: 'test' or 'validation'.
    data: where the images are, if not where the model was trained.
    eval: the suite.
  """

  seed: int
  split: str
  data: DataOverride
  eval: evaluation.Settings

  def __post_init__(self):
    within('seed', self.seed, 0, 2**32 - 1)
    one_of('split', self.split, ('test', 'validation'))


def evaluate(config: ConfigDict, model_folder: str) -> list[dict]:
  """Evaluates a model folder under a suite.

  Args:
    config: see `configs/eval.py`.
    model_folder: a folder with `model.json`.

  Returns:
    The records.

  Raises:
    UserError: a mistake in the config, or no model in the folder.
    RunFailed: the model fails its own checks.
  """
  import jax

  from rocl_jax import checkpoint, data, mesh, models, results
  from rocl_jax.errors import UserError

  if not isinstance(config, ConfigDict):
    raise UserError(
      f'--config: get_config gives {config!r:.40}, wanted a ConfigDict'
    )
  values = config.copy_and_resolve_references().to_dict()
  settings = parse(Settings, values, 'config')
  folder = epath.Path(model_folder).expanduser().resolve()
  variables, about = checkpoint.load_model(folder)
  if 'head' not in variables['params']:
    raise UserError(f'--model: {folder} is an encoder without a classifier')
  trained = about['config']
  dataset = data.load(
    settings.data.source or trained['data']['source'],
    settings.data.dir or trained['data']['dir'],
    trained['data']['validation'] if settings.split == 'validation' else 0,
  )
  if list(dataset.class_names) != about['class_names']:
    raise UserError(
      f'config.data: its classes are {", ".join(dataset.class_names)}, the '
      f"model's are {', '.join(about['class_names'])}"
    )
  splits = {settings.split: getattr(dataset, settings.split)}
  splits = evaluation.cut(splits, settings.eval.examples)
  if not splits:
    raise UserError(
      f'config.split: the model was trained without {settings.split} images'
    )
  model_settings = parse(models.Settings, trained['model'], 'config.model')
  model = models.build(model_settings, len(dataset.class_names))
  shape = dataset.test.images.shape[1:]
  fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
  difference = models.mismatch(variables, fresh)
  if difference:
    raise UserError(
      f'--model: {folder} is not the network that its model.json says: '
      f'{difference}'
    )
  devices = mesh.make_mesh()
  evaluators = [
    evaluation.evaluator(model, attack, devices, settings.eval.batch_size)
    for attack in settings.eval.selected
  ]
  return results.evaluate_model(
    folder,
    evaluators,
    splits,
    settings.seed,
    folder.parent / 'results.json',
  )


def main(_: list[str]) -> None:
  from rocl_jax import compiled, report

  compiled.keep_programs()
  records = evaluate(flags.FLAGS.config, flags.FLAGS.model)
  print(report.evaluation_table(records))


if __name__ == '__main__':
  command.define_config()
  flags.DEFINE_string('model', None, 'A model folder.')
  command.run(main, usage=__doc__ or '', required=('config', 'model'))
