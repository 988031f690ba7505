"""The fields that every stage has, whatever it trains."""

from dataclasses import dataclass

from rocl_jax import optim, schedules
from rocl_jax.settings import FieldError, at_least


@dataclass(frozen=True, kw_only=True)
class Training:
  """Length, batch and optimiser of a stage.

  Attributes:
    total_epochs: passes over the training set; each drops its last partial
      batch. 0 hands on what the stage starts from.
    batch_size: examples in a step, over all devices.
    eval_epochs: evaluate every so many epochs, and after the last; 0 for
      never during training.
    optimizer: see `optim.Settings`; every stage starts a fresh one.
    microbatch: images that pass through the network at a time, over all
      devices; their gradients and BatchNorm moments are averaged, so that an
      update is still one of the batch. 0 for the whole batch at once.
    segments: times that a per-epoch schedule starts over. Momentum carries
      on; the published segments were separate processes.
  """

  total_epochs: int
  batch_size: int
  eval_epochs: int
  optimizer: optim.Settings
  segments: int = 1
  microbatch: int = 0

  def __post_init__(self):
    at_least('total_epochs', self.total_epochs, 0)
    at_least('batch_size', self.batch_size, 1)
    at_least('eval_epochs', self.eval_epochs, 0)
    at_least('segments', self.segments, 1)
    at_least('microbatch', self.microbatch, 0)
    if self.microbatch and self.batch_size % self.microbatch:
      wanted = f'a divisor of batch_size, {self.batch_size}'
      raise FieldError('microbatch', self.microbatch, wanted)
    schedule = self.optimizer.schedule
    if self.segments > 1 and schedule not in schedules.PER_EPOCH:
      wanted = f'1: the schedule {schedule}, by step, can not start over'
      raise FieldError('segments', self.segments, wanted)
