import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
import torch

from dppp_jax import errors
from dppp_jax.data import transforms

B, H, W = 6, 24, 12
OFF = dict(flip=0.0, pad=0, contrast=None)
augment = jax.jit(transforms.augment, static_argnums=2)


def make_images(seed=0, batch=B):
  """Smooth pictures over the whole range, so that contrast clips some."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (batch, 4, 3, 3), dtype=np.uint8)
  return np.stack(
    [np.asarray(PIL.Image.fromarray(s).resize((W, H))) for s in small]
  )


def oracle(images, draws, spec):
  """The same in NumPy, float64, one picture after the other."""
  out = []
  for i, image in enumerate(images):
    if "flip" in draws and draws["flip"][i]:
      image = np.fliplr(image)
    if "top" in draws:
      canvas = np.zeros((H + 2 * spec.pad, W + 2 * spec.pad, 3), np.uint8)
      canvas[spec.pad : spec.pad + H, spec.pad : spec.pad + W] = image
      top, left = draws["top"][i], draws["left"][i]
      image = canvas[top : top + H, left : left + W]
    image = image / 255
    if "contrast" in draws:
      factor = float(draws["contrast"][i])
      r, g, b = np.moveaxis(image, -1, 0)
      grey = np.mean(0.2989 * r + 0.587 * g + 0.114 * b)
      image = np.clip(factor * image + (1 - factor) * grey, 0, 1)
    if "gain" in draws:
      image = np.clip(image * draws["gain"][i].astype(np.float64), 0, 1)
    if spec.normalize == "instance":
      image = torch.nn.functional.instance_norm(
        torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
      )[0].numpy().transpose(1, 2, 0)  # fmt: skip
    else:
      image = (image - np.array(spec.mean)) / np.array(spec.std)
    if "box" in draws:
      top, left, height, width = draws["box"][i]
      image[top : top + height, left : left + width] = draws["noise"][
        i, top : top + height, left : left + width
      ]
    out.append(image)
  return np.stack(out)


SPECS = {
  "dppp": transforms.Augment(pad=3),
  "clip_reid": transforms.Augment(pad=3, contrast=None, erasing=0.9),
  "all": transforms.Augment(
    pad=2,
    erasing=0.7,
    mean=(0.48, 0.45, 0.40),
    std=(0.26, 0.27, 0.28),
  ),
  "instance": transforms.Augment(pad=2, normalize="instance"),
  "cameras": transforms.Augment(pad=2, gain=(0.5, 1.5)),
}


@pytest.mark.parametrize("name", SPECS)
def test_augment_is_the_oracle_given_the_same_numbers(name):
  spec, images, key = SPECS[name], make_images(), jax.random.key(3)
  draws = jax.tree.map(np.asarray, transforms.draw(key, images.shape, spec))
  result = augment(images, key, spec)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(
    result, oracle(images, draws, spec), rtol=2e-6, atol=3e-6
  )
  # Every branch was taken by some picture and left by another.
  assert 0 < draws["flip"].sum() < B
  assert len(set(draws["top"].tolist()) | set(draws["left"].tolist())) > 2
  if spec.erasing:
    assert (draws["box"][:, 2] > 0).any()


def test_contrast_is_that_of_pillow():
  # Pillow rounds the mean and every pixel: two grey levels apart at most.
  images, spec = make_images(5), transforms.Augment(flip=0.0, pad=0)
  factors = np.linspace(0, 2, B).astype(np.float32)
  ours = transforms.apply(images, {"contrast": factors}, spec)
  ours = np.asarray(ours) * 0.5 + 0.5
  for i, factor in enumerate(factors):
    image = PIL.Image.fromarray(images[i])
    theirs = PIL.ImageEnhance.Contrast(image).enhance(float(factor))
    np.testing.assert_allclose(ours[i] * 255, np.asarray(theirs), atol=2)


def test_normalize():
  images = make_images()
  expected = (images / 255 - 0.5) / 0.5
  np.testing.assert_allclose(transforms.normalize(images), expected, atol=1e-6)
  mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
  expected = (images / 255 - np.array(mean)) / np.array(std)
  ours = transforms.normalize(images, mean=mean, std=std)
  np.testing.assert_allclose(ours, expected, atol=1e-6)
  from_floats = transforms.normalize(
    images / np.float32(255), mean=mean, std=std
  )
  np.testing.assert_allclose(from_floats, expected, atol=1e-6)


def test_normalize_by_instance_is_torchs():
  images = make_images()
  images[0] = 7  # An even picture: epsilon decides.
  ours = transforms.normalize(images, mean=None, std=None, mode="instance")
  tensor = torch.from_numpy(images / 255).permute(0, 3, 1, 2)
  theirs = torch.nn.functional.instance_norm(tensor).permute(0, 2, 3, 1)
  np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-5)
  np.testing.assert_allclose(ours[1:], theirs.numpy()[1:], atol=3e-6)


def test_all_off_is_normalize_and_draws_nothing():
  images, spec = make_images(), transforms.Augment(**OFF)
  assert transforms.draw(jax.random.key(0), images.shape, spec) == {}
  np.testing.assert_array_equal(
    transforms.augment(images, jax.random.key(0), spec),
    transforms.normalize(images),
  )


def test_a_picture_does_not_depend_on_its_neighbours():
  spec, key = SPECS["all"], jax.random.key(1)
  images = make_images()
  others = make_images(9, batch=4)
  others[2] = images[2]
  np.testing.assert_allclose(
    augment(images, key, spec)[2], augment(others, key, spec)[2], atol=1e-6
  )


def test_a_switch_does_not_shift_the_numbers_of_others():
  key, shape = jax.random.key(1), (B, H, W, 3)
  whole = transforms.draw(key, shape, transforms.Augment(erasing=0.5))
  for off in (dict(flip=0.0), dict(pad=0), dict(contrast=None), {}):
    part = transforms.draw(key, shape, transforms.Augment(**off))
    assert len(part) < len(whole)
    for name, values in part.items():
      np.testing.assert_array_equal(values, whole[name])


def test_keys_and_places_differ():
  spec, shape = transforms.Augment(), (64, H, W, 3)
  one = transforms.draw(jax.random.key(1), shape, spec)
  two = transforms.draw(jax.random.key(2), shape, spec)
  assert len(np.unique(one["contrast"])) == 64
  assert not np.intersect1d(one["contrast"], two["contrast"]).size


def test_draws_have_the_distributions_asked_for():
  n = 8192
  spec = transforms.Augment(
    flip=0.3, pad=2, contrast=(0.5, 1.5), gain=(0.5, 1.5)
  )
  draws = jax.jit(transforms.draw, static_argnums=(1, 2))(
    jax.random.key(0), (n, H, W, 3), spec
  )
  assert abs(draws["flip"].mean() - 0.3) < 0.02
  for name in ("top", "left"):
    shares = np.bincount(draws[name]) / n  # 0 to 2 * pad, both included.
    np.testing.assert_allclose(shares, [0.2] * 5, atol=0.02)
  assert abs(np.corrcoef(draws["top"], draws["left"])[0, 1]) < 0.04
  for values in (draws["contrast"], *draws["gain"].T):
    shares, _ = np.histogram(values, 10, (0.5, 1.5))
    np.testing.assert_allclose(shares / n, [0.1] * 10, atol=0.015)
  # Each channel has its own.
  assert np.abs(np.corrcoef(draws["gain"].T) - np.eye(3)).max() < 0.04


def naive_box(rng, height, width, spec):
  """timm's loop, in Python: the box, or zeros."""
  if rng.random() >= spec.erasing:
    return 0, 0, 0, 0
  for _ in range(10):
    area = rng.uniform(*spec.erasing_area) * height * width
    aspect = math.exp(rng.uniform(*map(math.log, spec.erasing_aspect)))
    h = round(math.sqrt(area * aspect))
    w = round(math.sqrt(area / aspect))
    if h < height and w < width:
      top, left = rng.randint(0, height - h), rng.randint(0, width - w)
      return top, left, h, w
  return 0, 0, 0, 0


# The second: a narrow picture, where most attempts fail.
@pytest.mark.parametrize(
  ("height", "width", "area"), [(32, 16, (0.02, 1 / 3)), (40, 6, (0.2, 0.9))]
)
def test_boxes_are_distributed_as_timms(height, width, area):
  spec, n = transforms.Augment(erasing=0.8, erasing_area=area), 8192
  keys = jax.random.split(jax.random.key(0), n)
  ours = np.asarray(
    jax.jit(jax.vmap(lambda k: transforms._draw_box(k, height, width, spec)))(
      keys
    )
  )
  rng = random.Random(0)
  theirs = np.array([naive_box(rng, height, width, spec) for _ in range(n)])
  is_erased = ours[:, 2] > 0
  assert abs(is_erased.mean() - (theirs[:, 2] > 0).mean()) < 0.02
  ours, theirs = ours[is_erased], theirs[theirs[:, 2] > 0]
  assert (ours[:, 0] + ours[:, 2]).max() == height
  assert (ours[:, 1] + ours[:, 3]).max() == width
  for column in range(4):
    np.testing.assert_allclose(
      np.quantile(ours[:, column], np.linspace(0, 1, 6)[1:-1]),
      np.quantile(theirs[:, column], np.linspace(0, 1, 6)[1:-1]),
      atol=1,
    )
    np.testing.assert_allclose(
      ours[:, column].mean(), theirs[:, column].mean(), rtol=0.04, atol=0.1
    )


def test_noise_is_standard_normal_per_pixel_and_channel():
  spec = transforms.Augment(**OFF, erasing=1.0)
  draws = transforms.draw(jax.random.key(0), (16, H, W, 3), spec)
  noise = np.asarray(draws["noise"])
  assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
  assert len(np.unique(noise[0])) > 0.99 * noise[0].size


def test_one_program_for_all_steps():
  traces = []

  def counted(images, key, spec):
    traces.append(spec)
    return transforms.augment(images, key, spec)

  program = jax.jit(counted, static_argnums=2)
  for step in range(3):
    key = jax.random.fold_in(jax.random.key(0), step)
    program(make_images(step), key, transforms.Augment(pad=1))
  assert len(traces) == 1


def test_lists_of_a_config_become_tuples():
  spec = transforms.Augment(contrast=[0.5, 1.5], mean=[0.5, 0.5, 0.5])
  assert spec == transforms.Augment() and hash(spec) is not None


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    (dict(flip=1.5), "augment.flip=1.5: give a number from 0 to 1"),
    (dict(erasing=-0.1), "augment.erasing=-0.1"),
    (dict(pad=-1), "augment.pad=-1"),
    (dict(contrast=(1.5, 0.5)), "augment.contrast"),
    (dict(gain=(-0.1, 0.5)), "augment.gain"),
    (dict(erasing_aspect=(0.0, 3.0)), "augment.erasing_aspect"),
    (dict(normalize="batch"), "use one of constants, instance"),
    (dict(std=(0.5, 0.0, 0.5)), "augment.std=.*above 0"),
    (dict(mean=(0.5, float("nan"), 0.5)), "augment.mean=.*finite"),
    (dict(gain=(0.5, float("inf"))), "augment.gain"),
    (dict(gain=()), "augment.gain"),
  ],
)
def test_bad_specs_are_named(fields, says):
  with pytest.raises(errors.UserError, match=says):
    transforms.Augment(**fields)
