"""Checkpoints in and out: every layout, every kind of damage."""

import json
import os
import pathlib
import pickle
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch_clip
import transformers

from dppp_jax import errors, trees
from dppp_jax.models import clip
from dppp_jax.weights import convert, export, hub, load, rules, tokenizer

CAPTIONS = [
  "a photo of a woman in a red coat, walking at dusk",
  "a photo of a man in blue trousers and a white shirt, day",
  "a photo of a boy in a striped shirt. Night, 2 lamps!",
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
  """A folder as transformers writes it, and the model in it."""
  folder = tmp_path_factory.mktemp("hf") / "clip"
  model = transformers.CLIPModel(torch_clip.hf_config())
  torch_clip.randomise(model).save_pretrained(folder)
  return folder, model


@pytest.fixture
def folder(hf, tmp_path):
  """A copy of it to spoil: (folder, its tensors)."""
  (tmp_path / "clip").mkdir()
  config = (hf[0] / "config.json").read_bytes()
  (tmp_path / "clip/config.json").write_bytes(config)
  return tmp_path / "clip", safetensors.numpy.load_file(
    hf[0] / "model.safetensors"
  )


def write(folder, tensors, name="model.safetensors"):
  safetensors.numpy.save_file(tensors, folder / name)


def same(a, b, rtol=0.0, dtype="float32"):
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype.name == dtype
    found, wanted = (np.asarray(x[name], np.float32) for x in (a, b))
    np.testing.assert_allclose(found, wanted, rtol=rtol, err_msg=name)


def test_every_container_gives_the_same_parameters(hf, tmp_path):
  source, model = hf
  config, params = load.clip(source)
  state = model.state_dict()

  def check(name, rtol=0.0, dtype="float32"):
    (tmp_path / name).mkdir(exist_ok=True)
    text = (source / "config.json").read_text()
    (tmp_path / name / "config.json").write_text(text)
    again, loaded = load.clip(tmp_path / name)
    assert again == config
    same(loaded, params, rtol, dtype)

  model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
  check("shards")

  (tmp_path / "bin").mkdir()
  torch.save(state, tmp_path / "bin/pytorch_model.bin")
  check("bin")

  for name, dtype, rtol in (
    ("half", torch.float16, 2e-3),
    ("brain", torch.bfloat16, 2e-2),
    ("double", torch.float64, 0),
  ):
    (tmp_path / name).mkdir()
    kind = str(dtype).removeprefix("torch.")  # Loaded is what the file has.
    cast = {k: v.to(dtype).contiguous() for k, v in state.items()}
    # Early checkpoints hold this buffer too.
    cast["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    safetensors.torch.save_file(cast, tmp_path / name / "model.safetensors")
    same(
      load.trees.unflatten(
        convert.convert(
          hub.read_tensors(tmp_path / name), rules.hf_clip(), where=name
        )
      ),
      params,
      rtol,
      kind,
    )
    check(name, rtol, kind)
    if rtol:
      # The very numbers of the file, not merely close ones.
      exact = cast["logit_scale"].float().numpy()
      assert load.clip(tmp_path / name)[1]["logit_scale"] == exact

  (tmp_path / "train").mkdir()
  inside = {f"module.{k}": v.to(torch.bfloat16) for k, v in state.items()}
  torch.save(
    {"epoch": 3, "state_dict": inside}, tmp_path / "train/pytorch_model.bin"
  )
  check("train", 2e-2, "bfloat16")


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_openai_names(tmp_path, act):
  """Weights under OpenAI's names give what OpenAI's network gives."""
  oracle = torch_clip.OpenAIClip(act=act)
  state = {k: v.contiguous() for k, v in oracle.state_dict().items()}
  if act == "quick_gelu":
    state["input_resolution"] = torch.tensor(32)
    state["context_length"] = torch.tensor(16)
    state["vocab_size"] = torch.tensor(60)
    path = tmp_path / "ViT.pt"
    torch.save(state, path)
  else:
    path = tmp_path
    safetensors.torch.save_file(state, path / "open_clip_model.safetensors")
    values = {"model_cfg": {"embed_dim": 20, "vision_cfg": {}, "text_cfg": {}}}
    (path / "open_clip_config.json").write_text(json.dumps(values))
  config, params = load.clip(path)
  assert config.vision.hidden_act == config.text.hidden_act == act
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
  ids = np.array([[58, 3, 59, 0], [58, 3, 4, 59]])
  with torch.no_grad():
    oracle.double()
    image = oracle.visual(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    text = oracle.text(torch.tensor(ids)).numpy()
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    vision = clip.VisionTower(config.vision, dtype=jnp.float64)
    output = jax.jit(vision.apply)({"params": params}, images)
    np.testing.assert_allclose(output.projected, image, rtol=1e-9, atol=1e-9)
    tower = clip.TextTower(config.text, dtype=jnp.float64)
    output = jax.jit(tower.apply)({"params": params}, ids)
    np.testing.assert_allclose(output.projected, text, rtol=1e-9, atol=1e-9)


def test_open_clip_beside_other_files(hf, tmp_path):
  oracle = torch_clip.OpenAIClip(act="gelu")
  state = {k: v.contiguous() for k, v in oracle.state_dict().items()}
  file = tmp_path / "open_clip_model.safetensors"
  safetensors.torch.save_file(state, file)
  values = {"model_cfg": {"embed_dim": 20, "vision_cfg": {}, "text_cfg": {}}}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
  # As timm's repositories: its own tower under the usual name.
  write(tmp_path, {"patch_embed.proj.weight": np.ones((2, 3, 4, 4), "f")})
  (tmp_path / "config.json").write_text('{"architecture": "vit_tiny"}')
  from_folder, from_file = load.clip(tmp_path), load.clip(file)
  assert from_folder[0] == from_file[0]
  assert from_file[0].vision.hidden_act == "gelu"
  same(from_folder[1], from_file[1])
  # As converted ones: Hugging Face's configuration says more than the tensors.
  values = from_file[0].to_hf()
  values["vision_config"]["layer_norm_eps"] = 1e-6
  (tmp_path / "config.json").write_text(json.dumps(values))
  assert load.clip(file)[0].vision.layer_norm_eps == 1e-6


def test_openai_names_with_a_text_prefix_and_no_activation(tmp_path):
  state = torch_clip.OpenAIClip(act="gelu").state_dict()
  text = ("transformer.", "token_", "positional_", "ln_final", "text_proj")
  moved = {
    ("text." + k if k.startswith(text) else k): v.contiguous()
    for k, v in state.items()
  }
  safetensors.torch.save_file(state, tmp_path / "a.safetensors")
  safetensors.torch.save_file(moved, tmp_path / "b.safetensors")
  with pytest.raises(errors.UserError, match=r"quick_gelu .OpenAI. or"):
    load.clip(tmp_path / "a.safetensors")
  a = load.clip(tmp_path / "a.safetensors", hidden_act="gelu")
  b = load.clip(tmp_path / "b.safetensors", hidden_act="gelu")
  assert a[0] == b[0]
  same(a[1], b[1])


def test_text_tower_of_a_whole_clip_and_both_key_styles(hf, tmp_path):
  source, model = hf
  config, params = load.clip(source)
  text, loaded = load.clip_text(source)
  assert text == config.text
  same(loaded, {k: v for k, v in params.items() if k.startswith("text")})
  vision, loaded = load.clip_vision(source)
  assert vision == config.vision
  same(loaded, {k: v for k, v in params.items() if k.startswith("vis")})

  # Older files have the prefix that transformers 5 leaves out.
  state = model.text_model.state_dict()
  for name, prefix in (("new", ""), ("old", "text_model.")):
    (tmp_path / name).mkdir()
    model.text_model.config.save_pretrained(tmp_path / name)
    safetensors.torch.save_file(
      {prefix + k: v for k, v in state.items()},
      tmp_path / name / "model.safetensors",
    )
    text, loaded = load.clip_text(tmp_path / name)
    assert text.projection_dim is None
    same(loaded, {"text_model": params["text_model"]})


def test_what_is_exported_transformers_loads(hf, tmp_path):
  source, model = hf
  config, params = load.clip(source)
  tokenizer.train_tokenizer(CAPTIONS, tmp_path / "bpe", vocab_size=560)
  bpe = load.tokenizer(tmp_path / "bpe")
  target = tmp_path / "new" / "export"
  export.clip(target, config, params, tokenizer=bpe, mean=[0.5] * 3)
  assert sorted(p.name for p in target.iterdir()) == [
    "config.json",
    "merges.txt",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
  ]
  loaded, info = transformers.CLIPModel.from_pretrained(
    target, output_loading_info=True
  )
  assert not any(info.values()), info
  for name, value in model.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], value), name
  assert loaded.config.vision_config.patch_size == 8
  assert loaded.config.text_config.eos_token_id == 59
  again, repeated = load.clip(target)
  assert again == config
  same(repeated, params)
  same_ids = load.tokenizer(target)("a red Coat").input_ids
  assert same_ids == bpe("a red Coat").input_ids
  processor = transformers.CLIPImageProcessor.from_pretrained(target)
  assert list(processor.image_mean) == [0.5] * 3

  export.clip(tmp_path / "half", config, params, dtype="float16")
  loaded = load.clip(tmp_path / "half")[1]
  same(
    loaded,
    jax.tree.map(lambda x: x.astype(np.float16), params),
    dtype="float16",
  )
  size = lambda p: (p / "model.safetensors").stat().st_size
  assert size(tmp_path / "half") < 0.7 * size(target)


def test_others_may_read_what_is_exported(hf, tmp_path):
  config, params = load.clip(hf[0])
  folder = export.clip(tmp_path / "new", config, params)
  files = [folder, *folder.iterdir()]
  assert [path.name for path in files if not path.stat().st_mode & 0o4] == []


def test_export_overwrites_nothing_and_leaves_nothing_half_done(hf, tmp_path):
  config, params = load.clip(hf[0])
  (tmp_path / "there").mkdir()
  (tmp_path / "there/mine.txt").write_text("mine")
  with pytest.raises(errors.UserError, match="there exists already"):
    export.clip(tmp_path / "there", config, params)
  huge = params | {"logit_scale": np.float32(1e6)}
  with pytest.raises(errors.UserError, match="logit_scale is not finite in fl"):
    export.clip(tmp_path / "new", config, huge, dtype="float16")
  with pytest.raises(errors.UserError, match="dtype 'int8'"):
    export.clip(tmp_path / "new", config, params, dtype="int8")
  extra = params | {"neck": {"scale": np.zeros(3, np.float32)}}
  with pytest.raises(errors.UserError, match=r"\+ neck/scale"):
    export.clip(tmp_path / "new", config, extra)
  with pytest.raises(errors.UserError, match=r"mine\.txt/new cannot be made"):
    export.clip(tmp_path / "there/mine.txt/new", config, params)
  assert [p.name for p in tmp_path.iterdir()] == ["there"]
  assert (tmp_path / "there/mine.txt").read_text() == "mine"


def test_missing_extra_and_misshapen_tensors_are_listed(folder):
  path, tensors = folder
  tensors.pop("visual_projection.weight")
  write(path, tensors)
  with pytest.raises(
    errors.UserError, match=r"clip: 1 tensors.*\n  - visual_projection/kernel"
  ):
    load.clip(path)
  tensors["visual_projection.weight"] = np.zeros((20, 31), np.float32)
  write(path, tensors)
  with pytest.raises(
    errors.UserError, match=r"! visual_projection/kernel expects \(32, 20\)"
  ):
    load.clip(path)
  tensors["visual_projection.bias"] = np.zeros(20, np.float32)
  write(path, tensors)
  with pytest.raises(
    errors.UserError, match=r"\+ visual_projection\.bias \(20,\): no rule"
  ):
    load.clip(path)


def test_configuration_and_tensors_must_agree(folder):
  path, tensors = folder
  write(path, tensors)
  values = json.loads((path / "config.json").read_text())
  values["vision_config"]["num_hidden_layers"] = 4
  (path / "config.json").write_text(json.dumps(values))
  with pytest.raises(errors.UserError, match=r"- vision_model/.*layers_3"):
    load.clip(path)
  values["vision_config"] |= {"num_hidden_layers": 3, "image_size": 64}
  (path / "config.json").write_text(json.dumps(values))
  with pytest.raises(errors.UserError, match=r"expects \(65, 32\), holds \(17"):
    load.clip(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(folder, value):
  path, tensors = folder
  tensors["text_model.final_layer_norm.bias"][3] = value
  write(path, tensors)
  with pytest.raises(
    errors.UserError, match=r"tensor text_model\.final_layer_norm\.bias holds"
  ):
    load.clip(path)


@pytest.mark.parametrize(
  "dtype",
  ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"],
)
def test_what_is_finite_is_known_of_every_type(dtype, monkeypatch):
  """All patterns of bits, against NumPy in float32; the last of many blocks."""
  monkeypatch.setattr(convert, "_BLOCK", 7)
  dtype = jnp.dtype(dtype)
  if dtype.itemsize > 2:
    patterns = np.array([0, 1, -2, 1e-40, 3e38, np.nan, np.inf, -np.inf], dtype)
  else:
    bits = np.arange(256**dtype.itemsize)
    patterns = bits.astype(f"uint{8 * dtype.itemsize}").view(dtype)
  good = np.isfinite(patterns.astype(np.float32))
  assert good.any() and not good.all()
  assert convert.is_finite(patterns[good])
  some = np.resize(patterns[good], (10, 2))
  for bad in patterns[~good][:: max(1, (~good).sum() // 50)]:
    whole = some.copy()
    whole[-1, -1] = bad
    assert not convert.is_finite(whole)
    assert not convert.is_finite(whole.T)


def test_trees_become_float32_on_the_device(tmp_path):
  half = np.arange(6, dtype=np.float16).reshape(2, 3) / 7
  tree = {
    "half": half.T,
    "brain": half.astype(jnp.bfloat16),
    "small": half.astype(jnp.float8_e4m3fn),
    "wide": half.astype(np.float32),
    "counts": np.arange(3),
  }
  got = trees.to_float32(tree)
  for name, leaf in got.items():
    assert isinstance(leaf, jax.Array)
    if name != "counts":
      assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, tree[name].astype(leaf.dtype))
  # A file that changes later changes nothing.
  path = tmp_path / "x"
  path.write_bytes(np.zeros(1024, np.float32).tobytes())
  mapped = np.memmap(path, np.float32, "r+")
  leaf = trees.to_float32([mapped])[0]
  mapped[:] = 1
  np.testing.assert_array_equal(leaf, 0)


def test_integers_in_the_place_of_floats_are_refused(folder):
  path, tensors = folder
  bias = "text_model.final_layer_norm.bias"
  tensors[bias] = tensors[bias].astype(np.int8)
  write(path, tensors)
  with pytest.raises(errors.UserError, match="int8, not floats"):
    load.clip(path)


def test_damaged_files_are_told_from_missing_ones(folder, tmp_path):
  path, tensors = folder
  file = path / "model.safetensors"

  def refused(match, spec=path):
    with pytest.raises(errors.UserError, match=match) as caught:
      load.clip(spec)
    assert len(str(caught.value).splitlines()) == 1

  refused("clip holds no weights")
  refused("nowhere does not exist", tmp_path / "nowhere")
  refused("nowhere/model.safetensors does not", "nowhere/model.safetensors")
  (path / "weights.npz").write_bytes(b"")
  refused("is no checkpoint that can be read", path / "weights.npz")
  write(path, tensors)
  whole = file.read_bytes()
  for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:size])
    refused("model.safetensors is truncated")
  file.write_bytes(b"\x08" + b"\0" * 7 + b"not json")
  refused("header cannot be read")
  file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  refused("git lfs pull")
  header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
  refused("another size than its shape")
  header["x"]["dtype"] = "F4"
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
  refused("type F4, which is not supported")
  file.write_bytes(whole)
  (path / "config.json").write_text("{")
  refused("config.json is not JSON")
  (path / "config.json").unlink()
  refused("config.json does not exist")


def test_damaged_shards(hf, tmp_path):
  path = tmp_path / "shards"
  hf[1].save_pretrained(path, max_shard_size="40KB")
  index = path / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  name = sorted(values["weight_map"])[0]
  shard = values["weight_map"][name]

  def refused(match):
    with pytest.raises(errors.UserError, match=match):
      load.clip(path)

  (path / shard).rename(path / "away")
  refused(f"{shard} is missing")
  (path / "away").rename(path / shard)
  index.write_text(json.dumps({"weight_map": {name: f"../{shard}"}}))
  refused("not a file name")
  del values["weight_map"][name]
  index.write_text(json.dumps(values))
  refused(f"differ in 1 tensors, first {name}")


class _Bomb:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_damaged_torch_file_is_refused_in_one_line(tmp_path, is_zip):
  path = tmp_path / "model.pt"
  torch.save(
    {f"{i}.weight": torch.ones(4, 4) for i in range(3)},
    path,
    _use_new_zipfile_serialization=is_zip,
  )
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  refused = 0
  for trial in range(150):
    data = bytearray(whole)
    if trial % 2:
      data = data[: rng.integers(1, len(data))]
    else:
      for place in rng.integers(len(data), size=10):
        data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
      hub.read_tensors(path)  # Damage may lie in the numbers alone.
    except errors.UserError as error:
      assert str(path) in str(error) and "\n" not in str(error)
      refused += 1
  assert refused > 75


def test_torch_tensors_of_any_kind_are_read_or_named(tmp_path):
  path = tmp_path / "model.pt"
  values = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
  for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
    torch.save({"w": values.to(dtype)}, path)
    np.testing.assert_array_equal(
      hub.read_tensors(path)["w"].astype(np.float32), values
    )
  torch.save({"w": torch._neg_view(values)}, path)
  np.testing.assert_array_equal(hub.read_tensors(path)["w"], -values)
  for tensor in (
    values.to_sparse(),
    values.to("meta"),
    torch.complex(values, values),
  ):
    torch.save({"w": tensor}, path)
    with pytest.raises(errors.UserError, match="tensor w"):
      hub.read_tensors(path)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_never_runs(folder, tmp_path, writer):
  path, _ = folder
  content = {"logit_scale": _Bomb(tmp_path / "ran")}
  if writer == "torch":
    torch.save(content, path / "pytorch_model.bin")
  else:
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
  with pytest.raises(errors.UserError, match="nothing of it was run"):
    load.clip(path)
  assert not (tmp_path / "ran").exists()


def test_torch_files_that_cannot_be_read(folder, monkeypatch):
  path, _ = folder
  file = path / "pytorch_model.bin"
  torch.save({"x": torch.zeros(2000)}, file)
  file.write_bytes(file.read_bytes()[:3000])
  with pytest.raises(errors.UserError, match=r"_model\.bin is trunc"):
    load.clip(path)
  torch.save([1, 2], file)
  with pytest.raises(errors.UserError, match="no tensors by name"):
    load.clip(path)
  # What torch.jit.save writes has this member.
  import zipfile

  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("model/constants.pkl", b"")
  with pytest.raises(errors.UserError, match=r"TorchScript.*torch\.jit\.load"):
    load.clip(path)
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(errors.UserError, match="torch is not installed: conv"):
    load.clip(path)


def test_hub_ids_without_a_network(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  assert os.environ["HF_HUB_OFFLINE"] == "1"
  with pytest.raises(
    errors.UserError, match="owner/name-1 is no local path and could not be"
  ) as caught:
    load.clip("owner/name-1")
  assert len(str(caught.value).splitlines()) == 1
  (tmp_path / "owner").mkdir()  # Now it looks like a mistyped folder.
  with pytest.raises(errors.UserError, match="owner/name-1 does not exist"):
    load.clip("owner/name-1")
  for wrong in ("a/b/c", "plain", "./a/b", "/a/b"):
    with pytest.raises(errors.UserError, match=f"{wrong} does not exist"):
      load.clip(wrong)


def test_hub_ids_with_a_network(hf, monkeypatch):
  """Files older than safetensors are fetched only where there are no others."""
  import huggingface_hub

  asked = []

  def download(name, *, allow_patterns):
    asked.append((name, "pytorch_model.bin" in allow_patterns))
    return str(hf[0])

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  same(load.clip("owner/clip")[1], load.clip(hf[0])[1])
  assert asked == [("owner/clip", False)]
  monkeypatch.setattr(hub.files, "visible", lambda *a: [])
  hub.resolve("owner/clip")
  assert asked[1:] == [("owner/clip", False), ("owner/clip", True)]


def test_tables_read_both_ways():
  table = [
    convert.Rule("a.{i}.{w:q|k}.weight", "a_{i}/{w}/kernel", convert.LINEAR),
    convert.Rule(
      "a.{i}.fused", ("a_{i}/x", "a_{i}/y"), convert.split(2, convert.LINEAR)
    ),
    convert.Rule("c.weight", "c/kernel", convert.CONV),
    convert.Rule("{any:.*}.position_ids", None),
    convert.Rule("scale", "scale", convert.SCALAR),
  ]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tensors = {
    "a.0.q.weight": draw(2, 3),
    "a.10.k.weight": draw(2, 3),
    "a.10.fused": draw(4, 3),
    "c.weight": draw(5, 4, 3, 2),
    "scale": draw(1),
  }
  given = tensors | {"b.position_ids": np.arange(3)}
  params = convert.convert(given, table, where="x")
  assert {k: v.shape for k, v in params.items()} == {
    "a_0/q/kernel": (3, 2),
    "a_10/k/kernel": (3, 2),
    "a_10/x": (3, 2),
    "a_10/y": (3, 2),
    "c/kernel": (3, 2, 4, 5),
    "scale": (),
  }
  np.testing.assert_array_equal(params["a_10/y"], tensors["a.10.fused"][2:].T)
  np.testing.assert_array_equal(
    params["c/kernel"][1, 0, 3, 2], tensors["c.weight"][2, 3, 1, 0]
  )
  back = convert.invert(trees.unflatten(params), table, where="x")
  assert back.keys() == tensors.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value, tensors[name].reshape(value.shape))

  def refused(match, call, *args):
    with pytest.raises(errors.UserError, match=match):
      call(*args, where="x")

  one = np.zeros((2, 2), np.float32)
  refused(
    r"\+ a\.b\.q\.weight .2, 2.: no rule",
    convert.convert,
    {"a.b.q.weight": one},
    table,
  )
  twice = [*table, convert.Rule("scale", "other")]
  refused(r"\+ scale .*: 2 rules", convert.convert, {"scale": one}, twice)
  clash = [convert.Rule("{x:p|q}", "same")]
  refused(
    "q: same is already filled by p",
    convert.convert,
    {"p": one, "q": one},
    clash,
  )
  refused(
    r"! c\.weight \(2, 2\): a wrong number of dimensions",
    convert.convert,
    {"c.weight": one},
    table,
  )
  refused(r"\+ z \(2, 2\): no rule", convert.invert, {"z": one}, table)
  refused(
    r"- a\.1\.fused: 1 of 2 parts", convert.invert, {"a_1": {"x": one}}, table
  )


def test_every_clip_table_reads_both_ways(hf):
  params = trees.flatten(load.clip(hf[0])[1])
  for table in (
    rules.hf_clip(),
    rules.openai_clip(),
    rules.openai_clip("text."),
    [*rules.hf_text(""), *rules.hf_vision("v."), rules.hf_clip()[-1]],
  ):
    tensors = convert.invert(params, table, where="x")
    assert len(tensors) in (len(params), len(params) - 6 * 4)
    same(convert.convert(tensors, table, where="x"), params)


def test_tokenizer_is_trained_alike_and_reads_back(tmp_path):
  reach = lambda name, captions: tokenizer.train_tokenizer(
    captions, tmp_path / name, vocab_size=580
  )
  assert reach("a", CAPTIONS) == reach("b", CAPTIONS[::-1]) <= 580
  for name in ("vocab.json", "merges.txt"):
    first = (tmp_path / "a" / name).read_bytes()
    assert first == (tmp_path / "b" / name).read_bytes()
  vocab = json.loads((tmp_path / "a/vocab.json").read_text())
  assert list(vocab.values()) == list(range(len(vocab)))
  assert [*vocab][-2:] == [tokenizer.BOS, tokenizer.EOS]
  assert [*vocab][:2] == ["!", '"'] and [*vocab][256] == "!</w>"
  bpe = load.tokenizer(tmp_path / "a")
  assert isinstance(bpe, transformers.CLIPTokenizer)
  assert (bpe.bos_token_id, bpe.eos_token_id) == (
    len(vocab) - 2,
    len(vocab) - 1,
  )
  # Frequent words are one token; unknown ones are spelled, never lost.
  assert bpe.tokenize("A photo of") == ["a</w>", "photo</w>", "of</w>"]
  text = "a zebra in größe 42, at dusk!"
  ids = bpe(text).input_ids
  assert ids[0] == bpe.bos_token_id and ids[-1] == bpe.eos_token_id
  assert bpe.unk_token_id not in ids[1:-1]
  decoded = bpe.decode(ids, skip_special_tokens=True)
  assert decoded.replace(" ", "") == text.replace(" ", "")
  small = tokenizer.train_tokenizer(["ab"], tmp_path / "c", vocab_size=9999)
  assert small == 515


def test_tokenizer_merges_the_most_frequent_pair_first(tmp_path):
  """The worked example by hand: aab x3, ab x2, counted with their ends."""
  tokenizer.train_tokenizer(["aab aab aab ab ab"], tmp_path, vocab_size=514 + 2)
  lines = (tmp_path / "merges.txt").read_text().splitlines()
  assert lines == ["#version: 0.2", "a b</w>", "a ab</w>"]


def test_tokenizers_that_cannot_be_made_or_read(tmp_path):
  with pytest.raises(errors.UserError, match="vocab_size 513 is too small"):
    tokenizer.train_tokenizer(["a"], tmp_path, vocab_size=513)
  with pytest.raises(errors.UserError, match="no word"):
    tokenizer.train_tokenizer([" "], tmp_path, vocab_size=600)
  with pytest.raises(errors.UserError, match=r"no tokenizer: tokenizer\.json"):
    load.tokenizer(tmp_path)
  tokenizer.train_tokenizer(CAPTIONS, tmp_path, vocab_size=600)
  (tmp_path / "model.safetensors").write_bytes(b"")
  whole = load.tokenizer(tmp_path).get_vocab()
  assert load.tokenizer(tmp_path / "model.safetensors").get_vocab() == whole
  (tmp_path / "vocab.json").write_text("[1, 2")
  with pytest.raises(errors.UserError, match="cannot be read"):
    load.tokenizer(tmp_path)
  (tmp_path / "merges.txt").unlink()
  with pytest.raises(errors.UserError, match="holds no tokenizer"):
    load.tokenizer(tmp_path)
