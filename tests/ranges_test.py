"""Numbers without meaning, and that no number of a config escapes."""

import math

import numpy as np
import pytest

from dppp_jax import cli, errors, ranges
from dppp_jax import training as training_lib
from dppp_jax.data import source, transforms
from dppp_jax.methods import dppp_options
from dppp_jax.pretraining import methods
from dppp_jax.train import loop, stage


@pytest.mark.parametrize(
  ("allowed", "inside", "outside"),
  [
    (ranges.POSITIVE, (1e-9, 3, np.float32(2)), (0, -1, math.nan, math.inf)),
    (ranges.POSITIVE, (3e38,), (1e39, 10**400)),
    (ranges.NON_NEGATIVE, (0, 0.0), (-1e-9, "1", None, True)),
    (ranges.SHARE, (0, 0.999), (1, -0.1)),
    (ranges.UNIT, (0, 1), (1.001,)),
    (ranges.FACTOR, (1,), (0,)),
    (ranges.COUNT, (1, np.int64(7)), (0, 1.0, -1, 2**31, True)),
    (ranges.WHOLE, (0,), (-1,)),
    (ranges.PAIR, ((256, 128), [1, 1]), (224, (0, 1), (96.0, 48.0), (1,) * 3)),
    (ranges.COUNTS, ((), (3, 4)), ((0,), 3)),
    (ranges.SPREAD, ((1, 2, 3),), ((1, 0, 1), (1, 2), None)),
    (ranges.or_none(ranges.PAIR), (None, (1, 2)), ((0, 1), (None, 1))),
  ],
)
def test_ranges(allowed, inside, outside):
  assert all(map(allowed.holds, inside))
  assert not any(map(allowed.holds, outside))


def test_keys_are_found_by_their_ends_at_any_depth():
  table = {"lr": ranges.POSITIVE, "vision.size": ranges.COUNT, "w": ranges.UNIT}
  fine = {"lr": 1.0, "size": -5, "vision": {"size": 3}, "phases": ({"lr": 1},)}
  ranges.check(fine, table)
  for values, named in (
    ({"a": {"lr": 0.0}}, "x.a.lr=0.0: give a number above 0"),
    ({"phases": ({"lr": 1}, {"lr": -1})}, r"x.phases\[1\].lr=-1"),
    ({"vision": {"size": 0}}, "x.vision.size=0"),
    ({"other": math.nan}, "x.other=nan: give a finite number"),
    ({"other": (1.0, math.inf)}, "x.other=inf"),
    ({"w": {"kl": 2.0}}, "x.w.kl=2.0"),
  ):
    with pytest.raises(errors.UserError, match=named):
      ranges.check(values, table, where="x.")
  # What stands before a key is no part of it.
  with pytest.raises(errors.UserError, match=r"^config lr=0\.0"):
    ranges.check({"lr": 0.0}, table, where="config ")


@pytest.mark.parametrize(
  ("make", "named"),
  [
    # A text is true, whatever it says.
    (lambda: dppp_options.Options(squared="false"), "squared='false': give Tr"),
    (lambda: dppp_options.Options(full_stop=0), "full_stop=0: give True or"),
    (lambda: dppp_options.Options(new_lr=None), "new_lr=None: give a number"),
    (lambda: dppp_options.Options(new_lr=1e300), r"new_lr=1e\+300"),
    (lambda: transforms.Augment(std=(1e-60, 1, 1)), "std=.*three numbers"),
    (lambda: dppp_options.Options(decay_epochs=None), "decay_epochs=None"),
    (lambda: transforms.Augment(mean=None), "mean=None: give three"),
    (lambda: transforms.Augment(flip=None), "flip=None"),
    (lambda: loop.Options(placement=3), "placement=3: give a text"),
    (lambda: loop.Options(tensorboard=1), "tensorboard=1: give True"),
    (lambda: loop.Options(num_threads=None), "num_threads=None"),
  ],
)
def test_a_value_of_another_kind_is_refused(make, named):
  with pytest.raises(errors.UserError, match=named):
    make()
  assert transforms.Augment(contrast=None, gain=None).contrast is None


def _numbers(values, prefix=""):
  """Yields (dotted key, value) of every number of a configuration."""
  for key, value in values.items():
    items = value if isinstance(value, tuple) else (value,)
    for item in items:
      if isinstance(item, dict):
        yield from _numbers(item, f"{prefix}{key}.")
      elif isinstance(item, (int, float)) and not isinstance(item, bool):
        yield f"{prefix}{key}"


@pytest.mark.parametrize(
  "path", sorted((cli.ROOT / "configs").glob("*.py")), ids=lambda p: p.stem
)
def test_no_number_of_a_training_escapes(path):
  """A new option must say which numbers it takes."""
  if path.stem == "geneperson":
    pytest.skip("geneperson/checks.py and what it calls")
  config = cli.load_config(str(path)).to_dict()
  tables = {"": methods.RANGES}
  if path.stem == "dppp":
    tables = {
      "": training_lib.RANGES,
      "dppp.": dppp_options.RANGES,
      "augment.": transforms.RANGES,
    }
  known = {f"{where}{key}" for where, table in tables.items() for key in table}
  if path.stem != "dppp":
    ranges.check(config, methods.RANGES)  # What is shipped is itself taken.
  for name in _numbers(config):
    ends = [name.split(".", i)[-1] for i in range(name.count(".") + 1)]
    # The nets of a U2-Net are nested tuples, which its own module reads; what
    # stands below a key such as "weights" is held by that key.
    if name in ("model.encoder", "model.decoder"):
      continue
    held = {*ends, *(end.rsplit(".", 1)[0] for end in ends), name}
    held |= {part for end in ends for part in end.split(".")[:-1]}
    assert held & known, f"{path.name}: {name} has no range"


def test_library_calls_are_refused_as_flags_are():
  five = source.Arrays(
    np.zeros((10, 4, 4, 3), np.uint8), np.repeat(np.arange(5), 2)
  )
  assert len(np.unique(source.first_ids(five, 2).pids)) == 2
  assert len(source.first_ids(five, 0)) == 10
  for number in (-1, 1.5, True):
    with pytest.raises(errors.UserError, match="max_ids"):
      source.first_ids(five, number)
  with pytest.raises(errors.UserError, match="eval_every=-1"):
    loop.Options(eval_every=-1)
  with pytest.raises(errors.UserError, match="lr of a=-1"):
    _stage(rules=(("a", -1.0),))
  with pytest.raises(errors.UserError, match="s: ema=1"):
    _stage(ema=1.0)
  assert _stage(rules=(("a", None),), ema=0.9).ema == 0.9


def _stage(**changes):
  values = dict(
    name="s", init=None, loss=None, rules=(), batches=None, epochs=1
  )
  return stage.Stage(**values | changes)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"train": {"lr": -1.0}}, "config train.lr=-1.0"),
    ({"train": {"warmup": 1.0}}, "config train.warmup=1.0"),
    ({"data": {"num_canvases": 0}}, "config data.num_canvases=0"),
    ({"dtype": "float16"}, "config dtype 'float16'"),
  ],
)
def test_a_pretraining_is_refused_before_it_draws(tmp_path, changes, named):
  config = cli.load_config("pretrain_u2netp.py:smoke").to_dict()
  for key, value in changes.items():
    config[key] = config[key] | value if isinstance(value, dict) else value
  with pytest.raises(errors.UserError, match=named):
    methods.train(config, str(tmp_path / "run"))
  assert not list(tmp_path.iterdir())
