"""The stages of the method, by name.

A new stage is one file with a `Settings` record and a function
`stage(model, settings) -> Stage`, and one line here. The training loop,
checkpoints, resuming, sharding, logging and evaluation come by themselves.
"""

from types import ModuleType

from rocl_jax.stages import finetune, linear_eval, pretrain, prune, supervised

STAGES: dict[str, ModuleType] = {
  'pretrain': pretrain,
  'linear_eval': linear_eval,
  'supervised': supervised,
  'prune': prune,
  'finetune': finetune,
}
