import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import torch
import transformers

import dppp_jax
from dppp_jax import checkpoints, cli, errors, paths, trees
from dppp_jax.data import images as images_lib
from dppp_jax.data import source as source_lib
from dppp_jax.evals import export, extractor
from dppp_jax.evals import spec as spec_lib
from dppp_jax.models import clip

SIDE, WIDTH, PROJECTED = 32, 16, 8


@pytest.fixture(scope="module")
def torch_clip():
  torch.manual_seed(0)
  tower = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=WIDTH)
  config = transformers.CLIPConfig(
    vision_config=dict(
      image_size=SIDE, patch_size=8, intermediate_size=24, **tower
    ),
    text_config=dict(
      vocab_size=40, max_position_embeddings=6, intermediate_size=8, **tower
    ),
    projection_dim=PROJECTED,
  )
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():  # Biases and norms that do something.
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  return model


@pytest.fixture(scope="module")
def clip_folder(torch_clip, tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip") / "tiny"
  torch_clip.save_pretrained(folder)
  preprocessor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  return folder


@pytest.fixture(scope="module")
def projector():
  rng = np.random.default_rng(5)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "fc1": {"kernel": draw(PROJECTED, 12), "bias": draw(12)},
    "fc2": {"kernel": draw(12, PROJECTED), "bias": draw(PROJECTED)},
  }


@pytest.fixture(scope="module")
def content(clip_folder, projector):
  """An extractor of the feature "content"."""
  plain = load(clip_folder)
  spec = dataclasses.replace(
    plain.spec,
    feature="content",
    projector={
      "features": PROJECTED,
      "hidden": 12,
      "act": "relu",
      "residual": False,
    },
  )
  params = plain.params | {"projector": projector}
  return extractor.Extractor(spec, params, batch_size=2)


def load(path, **kwargs):
  size = {} if "image_size" in kwargs else {"image_size": (SIDE, SIDE)}
  return dppp_jax.load_extractor(path, batch_size=4, **(size | kwargs))


def pictures(n, height=SIDE, width=SIDE, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def oracle(torch_clip, images, feature="projected", projector=None):
  """transformers' CLIP in float64, and NumPy."""
  pixels = (images / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float64)
  model = torch_clip.double()
  with torch.no_grad():
    cls = model.vision_model(pixels).pooler_output
    found = model.visual_projection(cls).numpy()
  torch_clip.float()
  if feature == "content":
    hidden = found @ projector["fc1"]["kernel"] + projector["fc1"]["bias"]
    hidden = np.maximum(hidden, 0)
    found = hidden @ projector["fc2"]["kernel"] + projector["fc2"]["bias"]
  if feature == "concat":
    found = np.concatenate([cls.numpy(), found], axis=1)
  return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("feature", ("projected", "concat"))
def test_equals_transformers(torch_clip, clip_folder, feature):
  images = pictures(6)
  run = load(clip_folder, feature=feature)
  found = run(images)
  assert found.dtype == np.float32
  assert found.shape == (6, run.spec.width)
  expected = oracle(torch_clip, images, feature)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_content_goes_through_the_projector(torch_clip, content, projector):
  images = pictures(3)
  expected = oracle(torch_clip, images, "content", projector)
  np.testing.assert_allclose(content(images), expected, rtol=0, atol=2e-6)


def test_one_program_for_all_batches(clip_folder):
  run = load(clip_folder)
  assert run.num_compilations == 0
  images = pictures(9)
  whole = run(images)
  for n in (0, 1, 3, 4, 5):
    np.testing.assert_array_equal(run(images[:n]), whole[:n])
  assert run([]).shape == (0, PROJECTED)
  assert run.num_compilations == 1


def test_files_and_arrays_of_all_kinds(clip_folder, tmp_path):
  run = load(clip_folder)
  rgb = pictures(1, 50, 20)[0]
  grey = rgb[:, :, 0]
  rgba = np.dstack([rgb, np.full_like(grey, 255)])
  PIL.Image.fromarray(rgb).save(tmp_path / "rgb.png")
  PIL.Image.fromarray(grey).save(tmp_path / "grey.bmp")
  PIL.Image.fromarray(rgba).save(tmp_path / "rgba.png")
  PIL.Image.fromarray(rgb).quantize(255).save(tmp_path / "palette.gif")
  PIL.Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
  small = PIL.Image.fromarray(rgb).resize(
    (SIDE, SIDE), PIL.Image.Resampling.BILINEAR
  )
  of_rgb = run(np.asarray(small)[None])[0]
  of_grey = run([np.dstack([grey] * 3)])[0]
  given = {
    "array": (rgb, of_rgb),
    "png": (tmp_path / "rgb.png", of_rgb),
    "str": (str(tmp_path / "rgb.png"), of_rgb),
    "rgba": (rgba, of_rgb),
    "rgba png": (tmp_path / "rgba.png", of_rgb),
    "grey": (grey, of_grey),
    "grey channel": (grey[:, :, None], of_grey),
    "grey bmp": (tmp_path / "grey.bmp", of_grey),
  }
  found = run([image for image, _ in given.values()])
  for row, (name, (_, expected)) in zip(found, given.items(), strict=True):
    np.testing.assert_array_equal(row, expected, err_msg=name)
  others = run([tmp_path / "palette.gif", tmp_path / "cmyk.jpg"])
  assert np.isfinite(others).all()
  assert np.abs(of_rgb - of_grey).max() > 1e-3


def test_corrupt_files(clip_folder, tmp_path):
  run = load(clip_folder)
  (tmp_path / "broken.jpg").write_bytes(
    images_lib.encode_jpeg(pictures(1)[0])[:300]
  )
  (tmp_path / "empty.jpg").write_bytes(b"")
  with pytest.raises(errors.UserError, match=r"broken\.jpg"):
    run([pictures(1)[0], tmp_path / "broken.jpg"])
  with pytest.raises(errors.UserError, match=r"empty\.jpg"):
    run([tmp_path / "empty.jpg"])
  with pytest.raises(errors.UserError, match=r"none\.jpg.*No such file"):
    run([tmp_path / "none.jpg"])
  assert run(pictures(1)).shape == (1, PROJECTED)  # It is not broken itself.

  class Source(source_lib.Arrays):
    def read(self, i):
      if i in (1, 5):
        raise images_lib.CorruptImageError(f"image {i}")
      return super().read(i)

  images = pictures(7)
  source = Source(images, np.zeros(7))
  with pytest.raises(errors.UserError, match="image 1"):
    run.extract(source)
  features, kept = run.extract(source, on_corrupt="skip")
  np.testing.assert_array_equal(kept, [0, 2, 3, 4, 6])
  np.testing.assert_array_equal(features, run(images[kept]))


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_arrays_of_other_libraries(clip_folder, kind):
  run = load(clip_folder)
  image = pictures(1)[0]
  to = jnp.asarray if kind == "jax" else torch.tensor
  expected = run([image])
  for several in ([to(image)], to(image)[None], iter([to(image)])):
    np.testing.assert_array_equal(run(several), expected)
  with pytest.raises(errors.UserError, match="not one image"):
    run(to(image))
  with pytest.raises(errors.UserError, match=r"image 0 is float32"):
    run([to(image) / 255])


def test_pictures_of_pillow_paths_bytes_and_home(
  clip_folder, tmp_path, monkeypatch
):
  run = load(clip_folder)
  image = PIL.Image.fromarray(pictures(1)[0])
  image.save(tmp_path / "a.png")
  monkeypatch.setenv("HOME", str(tmp_path))
  expected = run([np.asarray(image)])[0]
  data = (tmp_path / "a.png").read_bytes()
  found = run([image, "~/a.png", data, bytearray(data), image.convert("CMYK")])
  for row in found:
    np.testing.assert_array_equal(row, expected)
  np.testing.assert_array_equal(run(tmp_path.glob("*.png"))[0], expected)
  paths = np.array([str(tmp_path / "a.png")])
  np.testing.assert_array_equal(run(paths)[0], expected)
  assert run([]).shape == run(iter(())).shape == (0, PROJECTED)
  for one in (image, data, {"a": image}, {"~/a.png"}, None, 3):
    with pytest.raises(errors.UserError, match="list of images"):
      run(one)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"image_size": 224}, "image_size 224: give height and width"),
    ({"image_size": (96.0, 48.0)}, "image_size"),
    ({"image_size": ()}, "image_size"),
    ({"image_size": (10**9, 10**9)}, "image_size"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 2.0}, "batch_size=2.0"),
    ({"dtype": "fp16"}, "dtype 'fp16': choose one of float32, bfloat16"),
    ({"dtype": 3}, "dtype '3'"),
    ({"step": 1.5}, "step=1.5"),
    ({"step": 0}, "is no run folder"),
    ({"feature": ""}, "feature '' is unknown"),
  ],
)
def test_arguments_without_meaning(clip_folder, options, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    extractor.load_extractor(clip_folder, **options)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["", None, 3, "~nobody-of-that-name/x"])
def test_paths_that_are_none(path):
  with pytest.raises(errors.UserError):
    extractor.load_extractor(path)


@pytest.mark.parametrize(
  "images, message",
  [
    (np.zeros((2, 4, 4, 3), np.float32), "image 0 is float32"),
    ([np.zeros((4, 4, 5), np.uint8)], "5 channels"),
    ([np.zeros((0, 4, 3), np.uint8)], "image 0 is uint8"),
    (np.zeros((4, 4, 3), np.uint8), "not one image"),
    ("a.jpg", "not one image"),
  ],
)
def test_what_is_no_image(clip_folder, images, message):
  with pytest.raises(errors.UserError, match=message):
    load(clip_folder)(images)


def test_clip_is_given_people(clip_folder):
  spec = load(clip_folder, image_size=None).spec
  assert spec.image_size == (48, 24)
  assert spec.mean == (0.4, 0.5, 0.6)
  large = dataclasses.replace(spec.vision, image_size=224, patch_size=16)
  assert spec_lib.of_clip(clip_folder, large).image_size == (256, 128)


def test_run_folder(content, tmp_path):
  images = pictures(3)
  expected = content(images)
  manager = checkpoints.Manager(tmp_path)
  for step, scale in ((3, 1.0), (7, 2.0)):
    scaled = jax.tree.map(lambda x, s=scale: x * s, content.params["projector"])
    manager.save(
      step,
      params=content.params
      | {"projector": scaled, "neck_cls": {"b": np.ones(3)}},
      collections={},
      opt={"count": np.zeros(())},
      data={},
    )
  manager.close()
  (tmp_path / "extractor.json").write_text(json.dumps(content.spec.to_json()))
  found = load(tmp_path, step=3)(images)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
  newest = load(tmp_path)
  assert np.abs(newest(images) - expected).max() > 1e-3
  assert "step 7" in newest.where
  projected = load(tmp_path, feature="projected")(images)
  assert np.abs(projected - expected).max() > 1e-3
  with pytest.raises(errors.UserError, match=r"no step 4"):
    load(tmp_path, step=4)


_FRESH = """
import sys
import jax, numpy as np
folder, images = sys.argv[1], np.load(sys.argv[2])
data = open(folder + "/features.jaxexport", "rb").read()
exported = jax.export.deserialize(bytearray(data))
assert "dppp_jax" not in sys.modules
np.save(sys.argv[3], exported.call(images))
np.save(sys.argv[4], exported.call(images[:1]))
import dppp_jax
assert "dppp_jax.evals" not in sys.modules
np.save(sys.argv[5], dppp_jax.load_extractor(folder)(images))
"""


def test_export_in_a_fresh_process(content, tmp_path):
  folder = export.save(content, tmp_path / "out")
  values = json.loads((folder / "config.json").read_text())
  assert values["dppp_jax"] and values["feature"] == "content"
  names = safetensors.numpy.load_file(folder / "model.safetensors").keys()
  assert "clip/visual_projection/kernel" in names
  assert {name.split("/")[0] for name in names} == {"clip", "projector"}
  images = pictures(5)
  np.save(tmp_path / "images.npy", images)
  outs = [tmp_path / f"{name}.npy" for name in ("program", "one", "loaded")]
  subprocess.run(
    [sys.executable, "-c", _FRESH, folder, tmp_path / "images.npy", *outs],
    check=True,
  )
  program, one, loaded = map(np.load, outs)
  expected = content(images)
  np.testing.assert_allclose(program, expected, rtol=0, atol=1e-6)
  np.testing.assert_allclose(one, expected[:1], rtol=0, atol=1e-6)
  np.testing.assert_allclose(loaded, expected, rtol=0, atol=1e-6)
  again = export.load_program(folder / "features.jaxexport")
  assert again.platforms == ("cpu", "cuda")
  with pytest.raises(errors.UserError, match="exists already"):
    export.save(content, folder)
  (tmp_path / "junk").write_bytes(b"junk")
  with pytest.raises(errors.UserError, match="junk: not a program"):
    export.load_program(tmp_path / "junk")
  with pytest.raises(errors.UserError, match="none: cannot be read"):
    export.load_program(tmp_path / "none")


@pytest.fixture
def exported(content, tmp_path, monkeypatch):
  monkeypatch.setattr(export, "program", lambda extractor: b"")
  return export.save(content, tmp_path / "out")


def spoil(folder, **changes):
  path = folder / "config.json"
  values = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(feature="gone"), r"config.json: the key 'feature' is missing"),
    (dict(colour=1), r"config.json: the key 'colour' is unknown"),
    (dict(feature="best"), "feature 'best' is unknown"),
    (dict(projector=None), "needs the projector that stage psd trains"),
    (dict(image_size=5), "config.json: image_size 5"),
    (dict(image_size=[24.0, 12.0]), "config.json: image_size"),
    (dict(mean=[0.5, 0.5]), r"config.json: mean=.*three finite numbers"),
    (dict(std=[0.5, 0.0, 0.5]), "config.json: std=.*above 0"),
    (dict(std=0.5), "config.json: std=0.5"),
    (dict(projector={"features": 6}), "config.json: projector"),
    (dict(projector=7), "config.json: projector 7"),
    (dict(vision={"hidden": 3}), "config.json: .*hidden"),
    (dict(projection_dim=9), "do not fit the model"),
  ],
)
def test_spoilt_config(exported, changes, message):
  spoil(exported, **changes)
  with pytest.raises(errors.UserError, match=message):
    load(exported, image_size=None)


def test_spoilt_weights(exported):
  path = exported / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  name = "projector/fc1/bias"
  bias = tensors[name].copy()
  bias[2] = np.nan
  safetensors.numpy.save_file(tensors | {name: bias}, path)
  with pytest.raises(errors.UserError, match=f"{name} holds NaN") as caught:
    load(exported)
  assert "\n" not in str(caught.value)
  tensors.pop(name)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.UserError, match=f"- {name}"):
    load(exported)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(errors.UserError, match=r"model\.safetensors is trunc"):
    load(exported)


def test_nothing_to_load(tmp_path, clip_folder):
  with pytest.raises(errors.UserError, match="nowhere does not exist"):
    load(tmp_path / "nowhere")
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(errors.UserError, match=r"without extractor\.json"):
    load(tmp_path)
  with pytest.raises(errors.UserError, match="needs the projector"):
    load(clip_folder, feature="content")
  with pytest.raises(errors.UserError, match="less than one patch"):
    load(clip_folder, image_size=(4, 4))


def test_bfloat16_is_near(content):
  low = extractor.Extractor(content.spec, content.params, dtype=jnp.bfloat16)
  images = pictures(4)
  cosine = np.sum(low(images) * content(images), axis=1)
  assert low(images).dtype == np.float32
  assert (cosine > 0.995).all() and (cosine < 1 - 1e-7).any()


def test_parameters_are_only_those_used(content):
  names = trees.flatten(content.params).keys()
  assert not any("text" in name or "logit_scale" in name for name in names)
  expected = trees.flatten(clip.param_shapes(content.spec.vision)).keys()
  assert {n.removeprefix("clip/") for n in names if "clip" in n} == expected


@pytest.mark.parametrize("text", ["5", "null", "[" * 100_000])
def test_a_config_that_is_no_object_is_one_line(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(errors.UserError, match="holds no weights"):
    extractor.load_extractor(tmp_path)


def test_a_config_of_another_network_is_named():
  unet = cli.ROOT / "dppp_jax/assets/mini/sdxl/unet"
  with pytest.raises(errors.UserError, match=r"sdxl/unet/config\.json: config"):
    extractor.load_extractor(unet)


def test_a_path_may_be_of_bytes(tmp_path):
  class Place:
    def __fspath__(self):
      return bytes(tmp_path)

  assert paths.expand(Place()) == tmp_path
