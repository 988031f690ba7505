"""Plans the steps of another commit: what `--diff` starts in its checkout.

There this file and those that read programs are this commit's; the steps and
all that they are made of are the other's. So nothing else is imported here
that it might not have. Reads what is asked as a Python literal from standard
input, and prints the steps as JSON.
"""

import ast
import json
import sys

import jax


def main() -> None:
  jax.config.update('jax_platforms', 'cpu')
  from rocl_jax.command import load_config
  from rocl_jax.plan import chips, steps
  from rocl_jax.plan import compile as ahead

  asked = ast.literal_eval(sys.stdin.read())
  config = load_config(asked['config'])
  config.update_from_flattened_dict(asked['overrides'])
  run, images = steps.read(config, *asked['images'])
  stages = {s.name: s for s in steps.plan(run, images)}
  found = {}
  for name in asked['slices']:
    where = chips.slice_of(name)
    devices = ahead.mesh(where)
    found[name] = {
      stage: ahead.step(
        stages[stage],
        stages[stage].settings.batch_size,
        where,
        devices,
        asked['effort'],
      ).record()
      for stage in asked['stages']
    }
  print(json.dumps(found))


if __name__ == '__main__':
  main()
