"""Loading a system: what it gives, what it refuses, and its digests."""

import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import time
import weakref

import diffusers
import diffusers_twins as twins
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from dppp_jax import errors, trees
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.geneperson import components, digests
from dppp_jax.models import unet_config
from dppp_jax.weights import (
  controlnet_file,
  diffusers_folder,
  load,
  lora,
  single_file,
  tokenizer,
)

# SDXL with small numbers and two levels.
UNET = dict(
  block_out_channels=(32, 64),
  layers_per_block=2,
  norm_num_groups=8,
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
  cross_attention_dim=48,
  transformer_layers_per_block=(1, 1),
  attention_head_dim=(1, 1),
  use_linear_projection=True,
  addition_embed_type="text_time",
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=6 * 8 + 24,
  sample_size=16,
)
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _text(cls, vocab, seed, **options):
  config = transformers.CLIPTextConfig(
    vocab_size=vocab,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=20,
    projection_dim=24,
    bos_token_id=vocab - 2,
    eos_token_id=vocab - 1,
    pad_token_id=0,
    **options,
  )
  return twins.randomise(cls(config), seed)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
  """A folder with a base, ControlNets and LoRAs, all written by diffusers."""
  root = tmp_path_factory.mktemp("shelf")
  words = tokenizer.train_tokenizer(["a red coat"], root / "t", vocab_size=530)
  tokenizers = [
    transformers.CLIPTokenizer.from_pretrained(
      root / "t", model_max_length=20, **options
    )
    for options in ({}, {"pad_token": "!"})
  ]
  unet = twins.randomise(diffusers.UNet2DConditionModel(**UNET), 2)
  vae = diffusers.AutoencoderKL(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.13025,
  )
  pipeline = diffusers.StableDiffusionXLPipeline(
    vae=twins.randomise(vae, 3),
    text_encoder=_text(transformers.CLIPTextModel, words, 0),
    text_encoder_2=_text(
      transformers.CLIPTextModelWithProjection, words, 1, hidden_act="gelu"
    ),
    tokenizer=tokenizers[0],
    tokenizer_2=tokenizers[1],
    unet=unet,
    scheduler=diffusers.EulerDiscreteScheduler(
      beta_start=0.00085,
      beta_end=0.012,
      beta_schedule="scaled_linear",
      timestep_spacing="leading",
      steps_offset=1,
    ),
    add_watermarker=False,
  )
  pipeline.save_pretrained(root / "xl")
  for name, seed in (("pose", 5), ("grid", 6)):
    net = diffusers.ControlNetModel.from_unet(
      unet, conditioning_embedding_out_channels=(4, 8)
    )
    twins.randomise(net, seed).save_pretrained(root / name)
  shutil.copy(root / "grid" / WEIGHTS, root / "Grid v2 (final).safetensors")
  small = {k: v for k, v in UNET.items() if "addition" not in k}
  del small["projection_class_embeddings_input_dim"]
  net = diffusers.ControlNetModel.from_unet(
    diffusers.UNet2DConditionModel(
      **small | dict(block_out_channels=(32, 96), cross_attention_dim=24)
    ),
    conditioning_embedding_out_channels=(4, 8),
  )
  net.save_pretrained(root / "sd1_pose")
  shutil.copy(root / "sd1_pose" / WEIGHTS, root / "sd1_pose.safetensors")
  _lora(root / "style.safetensors", {f"unet.{LAYER}": (64, 48)})
  texts = {f"text_encoder.{TEXT_LAYER}": (24, 24), f"unet.{LAYER}": (64, 48)}
  _lora(root / "light.safetensors", texts, seed=1)
  sd1 = {"unet.down_blocks.0.attentions.0.proj_in": (16, 16)}
  _lora(root / "sd1.safetensors", sd1)
  _lora(root / "mixed.safetensors", sd1 | {f"unet.{LAYER}": (64, 48)})
  return root


def _lora(path, shapes, seed=0):
  """Writes a LoRA of rank 2 for modules of [out, in]."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, (out, into) in shapes.items():
    tensors |= {
      f"{name}.lora_A.weight": rng.normal(size=(2, into)).astype(np.float32),
      f"{name}.lora_B.weight": rng.normal(size=(out, 2)).astype(np.float32),
    }
  safetensors.numpy.save_file(tensors, path)


@pytest.fixture(scope="module")
def folder_parts(shelf):
  return components.load_components(
    shelf / "xl", controlnets=[shelf / "pose", shelf / "grid"]
  )


@pytest.fixture(scope="module")
def configs(folder_parts):
  return single_file.Configs(
    folder_parts.unet, folder_parts.vae, *folder_parts.texts
  )


@pytest.fixture(scope="module")
def file(shelf, folder_parts, configs):
  """The same base in one file, in a folder without anything else."""
  (shelf / "one").mkdir()
  path = shelf / "one" / "some_merge_v9.safetensors"
  found = single_file.Checkpoint(configs, folder_parts.params)
  single_file.save(path, found)
  return path


def _equal(ours, theirs):
  ours, theirs = trees.flatten(ours), trees.flatten(theirs)
  assert ours.keys() == theirs.keys()
  for name, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def test_folder_and_file_are_the_same_system(
  shelf, folder_parts, file, configs
):
  found = components.load_components(
    file,
    configs=configs,
    tokenizers=[shelf / "xl" / "tokenizer"],
    controlnets=[shelf / "pose", shelf / "Grid v2 (final).safetensors"],
  )
  _equal(found.params, folder_parts.params)
  assert found.unet == folder_parts.unet and found.texts == folder_parts.texts
  # That of the bare file is read off its tensors and off the UNet.
  assert found.controlnets == folder_parts.controlnets
  assert found.zero_negative and found.is_xl
  assert found.scheduler.method == "euler_ancestral"
  folders = dataclasses.replace(
    folder_parts.scheduler, method="euler_ancestral"
  )
  assert folder_parts.scheduler.method == "euler"
  assert found.scheduler == folders
  encode = lambda parts: [
    tokenizer(["a red", "coat"], padding="max_length", max_length=9).input_ids
    for tokenizer in parts.tokenizers
  ]
  # The second one is filled with "!" although only the first was given.
  assert encode(found) == encode(folder_parts)
  assert encode(found)[0] != encode(found)[1]


@pytest.mark.parametrize("where", ["tokenizer", ""])
def test_tokenizer_is_found_beside_the_file(
  shelf, file, configs, where, monkeypatch
):
  def unreachable(*args, **kwargs):
    raise OSError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
  with pytest.raises(errors.UserError) as caught:
    components.load_components(file, configs=configs)
  assert str(file) in str(caught.value) and "\n" not in str(caught.value)
  assert "put its vocab.json and merges.txt beside" in str(caught.value)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    target = file.parent / where / name
    target.parent.mkdir(exist_ok=True)
    shutil.copy(shelf / "xl" / "tokenizer" / name, target)
  try:
    found = components.load_components(file, configs=configs)
    pads = [tokenizer.pad_token for tokenizer in found.tokenizers]
    assert pads == ["<|endoftext|>", "!"]
  finally:
    for name in ("tokenizer.json", "tokenizer_config.json"):
      (file.parent / where / name).unlink()


def test_marks_of_a_file_choose_its_noise(shelf, file, configs, tmp_path):
  found = single_file.load(file, configs=configs)
  path = tmp_path / "v.safetensors"
  marked = dataclasses.replace(
    found, prediction_type="v_prediction", zero_snr=True
  )
  single_file.save(path, marked)
  parts = components.load_components(
    path,
    configs=configs,
    tokenizers=[shelf / "t", shelf / "t"],
    scheduler="dpmpp_2m",
  )
  assert parts.scheduler.method == "dpmpp_2m"
  assert parts.scheduler.prediction_type == "v_prediction"
  assert parts.scheduler.zero_snr
  assert parts.scheduler.timestep_spacing == "trailing"


def test_loras_are_merged_and_said(shelf, folder_parts, capsys):
  loras = [
    lora.Lora(shelf / "style.safetensors", scale=0.5),
    lora.Lora(shelf / "light.safetensors", scale=-2.0),
  ]
  found = components.load_components(shelf / "xl", loras=loras, controlnets=[])
  said = capsys.readouterr().err.splitlines()
  assert [line for line in said if line.startswith("LoRA")] == [
    f"LoRA {shelf / 'style.safetensors'}: merged 1 unet (1 lora); 0 unmatched,"
    " 0 skipped, scale 0.5",
    f"LoRA {shelf / 'light.safetensors'}: merged 1 text_encoder, 1 unet"
    " (2 lora); 0 unmatched, 0 skipped, scale -2",
  ]
  want = trees.flatten(folder_parts.params)
  want = {k: np.array(v) for k, v in want.items() if "controlnet" not in k}
  unet = f"unet/{LAYER.replace('.', '/')}/kernel"
  unet = unet.replace("down_blocks/1", "down_blocks_1")
  unet = unet.replace("attentions/0", "attentions_0")
  unet = unet.replace("transformer_blocks/0", "transformer_blocks_0")
  text = f"text_encoder/{TEXT_LAYER.replace('.', '/')}/kernel"
  text = text.replace("layers/0", "layers_0")
  for one in loras:
    tensors = safetensors.numpy.load_file(one.path)
    for leaf, name in (
      (unet, "unet." + LAYER),
      (text, f"text_encoder.{TEXT_LAYER}"),
    ):
      if f"{name}.lora_A.weight" in tensors:
        down, up = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
        want[leaf] = want[leaf] + one.scale * (up @ down).T
  got = trees.flatten(found.params)
  assert got.keys() == want.keys()
  changed = {
    name
    for name, leaf in trees.flatten(folder_parts.params).items()
    if name in got and not np.array_equal(leaf, got[name])
  }
  assert changed == {unet, text}
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def half(shelf, tmp_path_factory):
  """The base and a ControlNet in float16."""
  root = tmp_path_factory.mktemp("half")
  for name in ("xl", "grid"):
    shutil.copytree(shelf / name, root / name)
  for path in root.rglob("*.safetensors"):
    tensors = safetensors.numpy.load_file(path)
    cast = {k: v.astype(np.float16) for k, v in tensors.items()}
    safetensors.numpy.save_file(cast, path)
  return root


def _is_in_file(array):
  while isinstance(array, np.ndarray) and array.base is not None:
    array = array.base
  return isinstance(array, mmap.mmap)


@pytest.mark.parametrize("stack_from", [0, 1])
def test_leaves_stay_in_the_file_until_they_are_placed(shelf, half, stack_from):
  """One leaf at a time is in memory, and no more than LoRAs touch is wide."""
  alive, wide = [], []

  def place(name, leaf):
    # All that was made for earlier leaves is gone.
    assert [ref for ref in alive if ref() is not None] == []
    if leaf.dtype == np.float32:
      wide.append(name)
    else:
      assert leaf.dtype == np.float16
      assert _is_in_file(leaf) or "/transformer_blocks/" in name
    if not _is_in_file(leaf):
      alive.append(weakref.ref(leaf))
    return jnp.asarray(leaf, jnp.bfloat16)

  options = dict(
    controlnets=[half / "grid"],
    loras=[lora.Lora(shelf / "light.safetensors", scale=0.3)],
    stack_from=stack_from,
  )
  components.load_components(half / "xl", place=place, **options)
  blocks = "transformer_blocks" + ("" if stack_from else "_0")
  assert wide == [
    f"unet/down_blocks_1/attentions_0/{blocks}/attn2/to_k/kernel",
    "text_encoder/text_model/encoder/layers_0/self_attn/q_proj/kernel",
  ]
  if not stack_from:
    assert len(alive) == 2  # All others were views of the file.


def test_placed_leaves_are_rounded_once(shelf, half):
  """They are float32(W) + delta, cast: for bfloat16, not over float16."""
  options = dict(
    controlnets=[half / "grid"],
    loras=[lora.Lora(shelf / "light.safetensors", scale=0.3)],
  )
  device = jax.devices()[:1]
  place = sampler_lib.Placement(jnp.bfloat16, jnp.float32, tuple(device))
  parts = components.load_components(half / "xl", place=place, **options)
  host = components.load_components(half / "xl", **options)
  got, from_host = trees.flatten(parts.params), trees.flatten(host.params)
  assert got.keys() == from_host.keys()
  narrow = 0
  for name, leaf in got.items():
    wide = np.asarray(from_host[name], np.float32)
    small = ("time_embedding", "add_embedding", "conv_out", "quant_conv")
    is_narrow = name.endswith("/kernel") and not name.startswith("vae/")
    is_narrow &= not any(part in name for part in small)
    assert leaf.dtype == (jnp.bfloat16 if is_narrow else jnp.float32), name
    np.testing.assert_array_equal(leaf, wide.astype(leaf.dtype), err_msg=name)
    narrow += is_narrow
  assert narrow > 100
  # One of them from the files themselves.
  with_lora = safetensors.numpy.load_file(shelf / "light.safetensors")
  down, up = (with_lora[f"unet.{LAYER}.lora_{x}.weight"] for x in "AB")
  weight = safetensors.numpy.load_file(half / "xl/unet" / WEIGHTS)
  weight = weight[f"{LAYER}.weight"].astype(np.float32)
  want = weight + np.float32(0.3) * (up @ down)
  name = "unet/down_blocks_1/attentions_0/transformer_blocks_0/attn2/to_k"
  found = np.asarray(got[f"{name}/kernel"]).T
  np.testing.assert_array_equal(found, want.astype(jnp.bfloat16))
  twice = want.astype(np.float16).astype(jnp.bfloat16)
  assert (found != twice).any()
  # What is placed is used as it is, not copied.
  used = sampler_lib.Sampler(
    parts, dtype=jnp.bfloat16, vae_dtype=jnp.float32
  ).params
  pointer = lambda x: x.unsafe_buffer_pointer()
  assert {k: pointer(v) for k, v in trees.flatten(used).items()} == {
    k: pointer(v) for k, v in got.items()
  }


def test_damage_is_found_before_anything_is_placed(half, tmp_path):
  shutil.copytree(half / "grid", tmp_path / "grid")
  path = tmp_path / "grid" / WEIGHTS
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.UserError, match="truncated"):
    components.load_components(
      half / "xl",
      controlnets=[tmp_path / "grid"],
      place=lambda name, leaf: pytest.fail(f"{name} was read"),
    )


def test_unmatched_modules_are_refused_or_said(shelf, capsys):
  loras = [lora.Lora(shelf / "mixed.safetensors")]
  with pytest.raises(errors.UserError, match=r"mixed\.safetensors: 1 of 2"):
    components.load_components(shelf / "xl", loras=loras)
  found = components.load_components(
    shelf / "xl", loras=loras, allow_unmatched=True
  )
  assert found.params
  said = capsys.readouterr().err
  assert "merged 1 unet (1 lora); 1 unmatched" in said
  assert "left out down_blocks.0.attentions.0.proj_in" in said.replace(
    "unet.down", "down"
  )


def test_union_is_a_controlnet(shelf, folder_parts):
  values = {
    k: v for k, v in UNET.items() if k not in ("up_block_types", "sample_size")
  }
  net = diffusers.ControlNetUnionModel(
    **values,
    conditioning_embedding_out_channels=(4, 8),
    num_trans_channel=32,
    num_trans_head=2,
    num_proj_channel=32,
  )
  twins.randomise(net, 7).save_pretrained(shelf / "union")
  found = components.load_components(
    shelf / "xl", controlnets=[shelf / "pose", shelf / "union"]
  )
  assert isinstance(found.controlnets[1], unet_config.UnionConfig)
  _, want = diffusers_folder.controlnet(shelf / "union")
  _equal(found.params["controlnet_1"], want)
  _equal(found.params["controlnet"], folder_parts.params["controlnet"])


def test_bare_controlnet_of_unheard_of_sizes_needs_its_config(shelf):
  with pytest.raises(errors.UserError, match=r"Grid v2.* put the config\.json"):
    controlnet_file.load(shelf / "Grid v2 (final).safetensors")


@pytest.fixture
def no_reading(monkeypatch):
  """Fails the test if any weights are read for good."""

  def read(*args, **kwargs):
    raise AssertionError("weights were read")

  for module, name in (
    (diffusers_folder, "unet"),
    (diffusers_folder, "vae"),
    (diffusers_folder, "controlnet"),
    (load, "clip_text"),
    (single_file, "load"),
    (controlnet_file, "load"),
    (lora, "merge"),
  ):
    monkeypatch.setattr(module, name, read)


def _copy(shelf, to, *, without=(), truncated=()):
  """Links a copy of the base, lacking files, or with their ends cut off."""
  shutil.copytree(shelf / "xl", to / "xl", copy_function=os.link)
  for name in without:
    (to / "xl" / name).unlink()
  for name in truncated:
    data = (to / "xl" / name).read_bytes()
    (to / "xl" / name).unlink()
    (to / "xl" / name).write_bytes(data[:-100])
  return to / "xl"


@pytest.mark.parametrize(
  "damage, words",
  [
    (dict(truncated=[f"unet/{WEIGHTS}"]), rf"unet/{WEIGHTS} is truncated"),
    (dict(truncated=[f"vae/{WEIGHTS}"]), rf"vae/{WEIGHTS} is truncated"),
    (
      dict(truncated=["text_encoder_2/model.safetensors"]),
      r"text_encoder_2/model\.safetensors is truncated .*: fetch it again",
    ),
    (dict(without=[f"unet/{WEIGHTS}"]), "xl/unet holds no weights"),
    (dict(without=["unet/config.json"]), r"unet.* has neither config\.json"),
    (
      dict(without=["scheduler/scheduler_config.json"]),
      r"scheduler_config\.json does not exist",
    ),
    (
      dict(without=["tokenizer_2/tokenizer.json"]),
      "xl/tokenizer_2 holds no tokenizer",
    ),
    (dict(without=["model_index.json"]), r"model_index\.json is missing"),
  ],
)
def test_incomplete_base_is_found_before_reading(
  shelf, tmp_path, damage, words, no_reading
):
  base = _copy(shelf, tmp_path, **damage)
  with pytest.raises(errors.UserError, match=words) as caught:
    components.load_components(base)
  assert "\n" not in str(caught.value) and str(base) in str(caught.value)


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(controlnets=["no_such"]), "no_such does not exist: give a folder"),
    (
      dict(controlnets=["pose", "sd1_pose"]),
      r"ControlNet .*/sd1_pose is for another base model"
      r" \(block_out_channels, text_dim differ\): use one",
    ),
    (
      dict(controlnets=["sd1_pose.safetensors"]),
      r"ControlNet .*/sd1_pose\.safetensors is for another base model",
    ),
    (dict(controlnets=["xl/unet"]), r"xl/unet.* UNet2DConditionModel"),
    (dict(controlnets=["style.safetensors"]), "style.* holds no ControlNet"),
    (dict(controlnets=["cut.safetensors"]), "cut.* is truncated .*: fetch it"),
    (dict(loras=["sd1.safetensors"]), r"sd1\.safetensors matches no module"),
    (dict(loras=["cut.safetensors"]), "cut.* is truncated .*: fetch it again"),
    (dict(loras=["none.safetensors"]), r"none\.safetensors does not exist"),
    (
      dict(loras=["Grid v2 (final).safetensors"]),
      "Grid v2.* matches no module of this base model .*: is it a LoRA",
    ),
    (dict(base="pose"), "pose is the folder of one ControlNetModel: give the"),
    (dict(base="t"), r"model_index\.json is missing"),
    (dict(base="one_file"), r"did you mean the file .*one_file/m\.safetensors"),
    (dict(base="flux"), "is of a FluxPipeline without a UNet"),
    (
      dict(base="sd1_pose.safetensors"),
      "is a ControlNet: give a whole checkpoint",
    ),
    (dict(base="cut.safetensors"), "cut.* is truncated .*: fetch it again"),
    (dict(base="none.safetensors"), r"none\.safetensors does not exist"),
    (dict(variant="fp16"), "xl/unet has no variant 'fp16'"),
    (dict(scheduler="heun"), "scheduler 'heun' is not built: choose one of"),
    (dict(tokenizers=["t"]), "xl has tokenizers of its own"),
  ],
)
def test_what_does_not_fit_is_found_before_reading(
  shelf, options, words, no_reading
):
  data = (shelf / "style.safetensors").read_bytes()
  (shelf / "cut.safetensors").write_bytes(data[:-1])
  (shelf / "one_file").mkdir(exist_ok=True)
  shutil.copy(shelf / "style.safetensors", shelf / "one_file/m.safetensors")
  (shelf / "flux").mkdir(exist_ok=True)
  index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "x"]}
  (shelf / "flux" / "model_index.json").write_text(json.dumps(index))
  given = {"base": "xl"} | options
  base = shelf / given.pop("base")
  for key in ("controlnets", "tokenizers"):
    if key in given:
      given[key] = [shelf / name for name in given[key]]
  given["loras"] = [lora.Lora(shelf / n) for n in given.get("loras", [])]
  with pytest.raises(errors.UserError, match=words) as caught:
    components.load_components(base, **given)
  assert "\n" not in str(caught.value)


def test_file_of_another_kind_is_refused(shelf, file, configs):
  load = components.load_components
  with pytest.raises(
    errors.UserError, match=r"3 tokenizers for .*: give 1 or 2"
  ):
    load(file, configs=configs, tokenizers=[shelf / "t"] * 3)


# Digests.


def _sha(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _age(root):
  """Makes files as old as those of a checkpoint are."""
  for path in root.rglob("*"):
    os.utime(path, (time.time() - 60,) * 2)


def test_digests_are_those_of_sha256sum(shelf, tmp_path):
  names = ("pose", "Grid v2 (final).safetensors")
  found = components.digests(
    shelf / "xl",
    controlnets=[shelf / name for name in names],
    loras=[lora.Lora(shelf / "style.safetensors", scale=3.0)],
    u2net=shelf / "light.safetensors",
    cache=tmp_path / "c.json",
  )
  assert set(found) == {"base", "controlnet", "controlnet_1", "lora", "u2net"}
  for role, name in (
    ("controlnet_1", "Grid v2 (final).safetensors"),
    ("lora", "style.safetensors"),
    ("u2net", "light.safetensors"),
  ):
    assert found[role] == {"name": name, "sha256": _sha(shelf / name)}
  parts = ("unet", "vae", "text_encoder", "text_encoder_2")
  files = ["model_index.json", "scheduler/scheduler_config.json"]
  files += [f"{part}/config.json" for part in parts]
  files += [f"{part}/{WEIGHTS}" for part in parts[:2]]
  files += [f"{part}/model.safetensors" for part in parts[2:]]
  for part in ("tokenizer", "tokenizer_2"):
    files += [f"{part}/tokenizer.json", f"{part}/tokenizer_config.json"]
  run = lambda command, folder: subprocess.run(
    command, cwd=folder, shell=True, capture_output=True, text=True, check=True
  ).stdout.split()[0]
  command = "sha256sum {} | LC_ALL=C sort -k2 | sha256sum"
  base = run(command.format(" ".join(files)), shelf / "xl")
  assert found["base"] == {"name": "xl", "sha256": base}
  pose = run(command.format(f"config.json {WEIGHTS}"), shelf / "pose")
  assert found["controlnet"] == {"name": "pose", "sha256": pose}


def test_digests_of_a_file_name_its_tokenizers(shelf, file, configs, tmp_path):
  found = components.digests(
    file, configs=configs, tokenizers=[shelf / "t"], cache=tmp_path / "c.json"
  )
  assert set(found) == {"base", "tokenizer", "tokenizer_2"}
  assert found["base"]["sha256"] == _sha(file)
  assert found["tokenizer"] == found["tokenizer_2"]


def test_digests_depend_on_what_is_read_and_on_nothing_else(shelf, tmp_path):
  of = lambda base: components.digests(base, cache=tmp_path / "c.json")
  before = of(shelf / "xl")
  moved = _copy(shelf, tmp_path)
  (moved / "README.md").write_text("read me")
  (moved / "unet" / "notes.json").write_text("{}")
  assert of(moved) == before
  file = moved / "unet" / "config.json"
  text = file.read_text()
  file.unlink()
  file.write_text(text + " ")
  assert of(moved)["base"]["sha256"] != before["base"]["sha256"]


def test_variant_is_what_is_digested(shelf, tmp_path):
  base = _copy(shelf, tmp_path)
  for part, stem in (
    ("unet", "diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model"),
    ("text_encoder", "model"),
  ):
    plain = base / part / f"{stem}.safetensors"
    shutil.copy(plain, base / part / f"{stem}.fp16.safetensors")
  plain = components.digests(base, cache=tmp_path / "c.json")
  half = components.digests(base, variant="fp16", cache=tmp_path / "c.json")
  assert plain == components.digests(shelf / "xl", cache=tmp_path / "c.json")
  assert half != plain
  (base / "text_encoder" / "model.safetensors").unlink()
  assert half == components.digests(
    base, variant="fp16", cache=tmp_path / "c.json"
  )


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "w" / "a.bin"
  path.parent.mkdir()
  path.write_bytes(b"a" * 100)
  _age(path.parent)
  return path


def _describe(path, cache):
  found = digests.describe({"x": digests.Source("n", {"": path})}, cache=cache)
  return found["x"]["sha256"]


def test_what_was_hashed_is_remembered(source, tmp_path, monkeypatch):
  cache = tmp_path / "deep" / "cache.json"
  want = _sha(source)
  assert _describe(source, cache) == want
  hashed = []
  hash_ = digests._hash
  monkeypatch.setattr(
    digests, "_hash", lambda path, *a: hashed.append(path) or hash_(path, *a)
  )
  assert _describe(source, cache) == want and not hashed
  # Another time of change, or another size, is another file.
  os.utime(source, (time.time() - 50,) * 2)
  assert _describe(source, cache) == want and len(hashed) == 1
  stat = source.stat()
  source.write_bytes(b"b" * 101)
  os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert _describe(source, cache) == _sha(source) and len(hashed) == 2
  # Damage costs time and nothing else.
  for text in ("{", "[]", json.dumps({str(source): "x"})):
    cache.write_text(text)
    assert _describe(source, cache) == _sha(source)
  assert len(hashed) == 5
  assert str(source) in json.loads(cache.read_text())


def test_file_that_was_just_written_is_not_remembered(source, tmp_path):
  cache = tmp_path / "c.json"
  os.utime(source)
  assert _describe(source, cache) == _sha(source)
  assert not cache.exists()


def test_cache_that_cannot_be_written_is_none(source, tmp_path):
  (tmp_path / "file").write_text("")
  assert _describe(source, tmp_path / "file" / "c.json") == _sha(source)


def test_cache_lies_in_the_users_folder(source, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  _describe(source, None)
  assert (tmp_path / "home" / "dppp_jax" / "digests.json").is_file()


def test_file_that_changes_or_goes_is_refused(source, tmp_path, monkeypatch):
  marks = iter([[100, 1], [100, 1], [100, 2]])
  with monkeypatch.context() as patch:
    patch.setattr(digests, "_mark", lambda path: next(marks))
    (tmp_path / "c.json").write_text(json.dumps({str(source): [0, 0, "x"]}))
    with pytest.raises(errors.UserError, match=r"a\.bin changed while it was"):
      _describe(source, tmp_path / "c.json")
  with pytest.raises(errors.UserError, match=r"gone\.bin cannot be read"):
    _describe(source.with_name("gone.bin"), tmp_path / "c.json")
