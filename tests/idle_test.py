"""Which keys do nothing beside the others, of every launcher with a config."""

import pytest

from dppp_jax import cli, training
from dppp_jax.geneperson import idle
from dppp_jax.pretraining import methods


def _change(config, changes):
  config = cli.load_config(config)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config.to_dict()


@pytest.mark.parametrize(
  ("changes", "keys"),
  [
    ({}, {"warmup_factor"}),
    ({"soft_margin": True}, {"margin"}),
    ({"psd_epochs": 0}, {"projector_hidden", "psd_reid_weight"}),
    ({"ptl_epochs": 0, "psd_sup_con_weight": 0.0}, {"prompt", "num_styles"}),
    ({"prompt": "content"}, {"num_styles", "style_dropout"}),
    ({"train_encoder": False}, {"encoder_lr"}),
    ({"decay_epochs": ()}, {"decay"}),
    ({"tri_txt_weight": 0.0}, {"text_margin", "text_squared"}),
    ({"reid_weight": 0.0, "psd_reid_weight": 0.0}, {"margin", "id_weight"}),
    ({"id_weight": 0.0}, {"label_smoothing"}),
  ],
)
def test_of_a_training(changes, keys):
  usual = {"config.eval.allow_partial", "config.eval.benchmarks"}
  usual |= {"config.eval.dtype", "config.dppp.warmup_factor"}
  found = training.idle(
    _change("dppp.py", {f"dppp.{k}": v for k, v in changes.items()})
  )
  assert usual | {f"config.dppp.{key}" for key in keys} <= found.keys()
  # The switches themselves are never idle.
  assert not {f"config.dppp.{key}" for key in changes} & (
    found.keys() - {"config.dppp.psd_sup_con_weight"}
  )


def test_paper_tables_are_not_refused():
  """The switches in the header of configs/dppp.py."""
  for switches in (
    {"reid_weight": 0.0, "tri_txt_weight": 0.0, "psd_epochs": 0},
    {"tri_txt_weight": 0.0, "psd_epochs": 0},
    {"psd_epochs": 0, "prompt": "generic", "tri_txt_weight": 0.0},
    {"psd_sup_con_weight": 0.0},
    {"num_selected": 24},
  ):
    config = _change("dppp.py", {f"dppp.{k}": v for k, v in switches.items()})
    found = training.idle(config)
    assert not {f"config.dppp.{key}" for key in switches} & found.keys()


def test_where_a_training_is_evaluated():
  root = {"eval.benchmark_root": "x"}
  assert "config.eval.dtype" not in training.idle(_change("dppp.py", root))
  found = training.idle(_change("dppp.py", root | {"eval.benchmarks": ()}))
  assert "config.eval.benchmark_root" in found
  found = training.idle(_change("dppp.py", {"data.data_dir": "x"}))
  assert "data_dir" in found


def test_of_a_generation():
  found = idle.keys(_change("geneperson.py", {}))
  assert "num_processes" in found and "config.loras.detail_scale" in found
  assert "config.canvas.canny" not in found
  changes = {"models.grid_controlnet": "", "loras.style": "x"}
  found = idle.keys(_change("geneperson.py", changes))
  assert {"config.canvas.canny", "config.control.grid_scale"} <= found.keys()
  assert "config.loras.style_scale" not in found
  found = idle.keys(_change("geneperson.py", {"sampler.guidance": 1.0}))
  assert "config.prompt.negative" in found
  assert "config.loras.allow_unmatched" in idle.keys(
    _change("geneperson.py", {})
  )
  changes = {"models.grid_controlnet": "", "models.pose_controlnet": ""}
  found = idle.keys(_change("geneperson.py", changes))
  wanted = {"config.sampler.guess", "config.models.union_kinds"}
  assert wanted <= found.keys()
  changes = {"loras.style": "x", "loras.style_scale": 0.0, "tries": 1}
  changes |= {"control.pose_scale": 0.0, "prompt.long": "truncate"}
  found = idle.keys(_change("geneperson.py", changes))
  wanted = {"loras.style", "control.pose_range", "min_images", "prompt.pooled"}
  assert {f"config.{key}" for key in wanted} <= found.keys()
  assert not idle.keys(_change("geneperson.py:paperdoll", {}))


def test_of_a_pretraining():
  assert not methods.idle(_change("pretrain_unet.py", {}))
  found = methods.idle(_change("pretrain_unet.py:more", {}))
  assert {"config.data.vae", "config.scheduler"} <= found.keys()
  assert not methods.idle(_change("pretrain_vae.py", {}))
