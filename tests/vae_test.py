import diffusers
import diffusers_twins as twins
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax import errors, trees
from dppp_jax.models import resnet2d, transformer2d, vae
from dppp_jax.weights import diffusers_folder, diffusion_rules

TOLERANCE = 1e-11  # See unet_test.

SMALL = dict(
  block_out_channels=(32, 64),
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
  layers_per_block=1,
  norm_num_groups=8,
)
PLAIN = dict(
  mid_block_add_attention=False,
  use_quant_conv=False,
  use_post_quant_conv=False,
  latent_channels=6,
  act_fn="gelu",
  layers_per_block=2,
)
SDXL = dict(
  block_out_channels=(128, 256, 512, 512),
  down_block_types=("DownEncoderBlock2D",) * 4,
  up_block_types=("UpDecoderBlock2D",) * 4,
  layers_per_block=2,
  scaling_factor=0.13025,
)


def twin(values):
  net = twins.randomise(diffusers.AutoencoderKL(**values))
  config = vae.Config.from_hf(dict(net.config))
  shapes = vae.param_shapes(config)
  return net, config, twins.params(net, diffusion_rules.autoencoder(), shapes)


@pytest.fixture(scope="module")
def small():
  return twin(SMALL)


@pytest.mark.parametrize("change", [{}, PLAIN], ids=["sdxl", "plain"])
def test_vae_equals_diffusers(small, change):
  net, config, params = small if not change else twin(SMALL | change)
  module = vae.VAE(config, dtype=jnp.float64)
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, size=(2, 20, 14, 3))
  latents = rng.normal(size=(2, 5, 7, config.latent_channels))

  def ours(params, images, latents):
    call = lambda x, method: module.apply({"params": params}, x, method=method)
    return call(images, "encode"), call(latents, "decode")

  with twins.float64():
    posterior = net.double().encode(twins.nchw(images)).latent_dist
    want = net.decode(twins.nchw(latents)).sample
    moments, got = twins.run(ours, twins.wide(params), images, latents)
    net.float()
  assert twins.distance(moments.mean, twins.nhwc(posterior.mean)) < TOLERANCE
  assert (
    twins.distance(moments.logvar, twins.nhwc(posterior.logvar)) < TOLERANCE
  )
  assert twins.distance(got, twins.nhwc(want)) < TOLERANCE


def test_moments_are_sampled_and_normalised():
  mean = jnp.full((4, 16, 16, 4), 2.0)
  moments = vae.Moments(mean, jnp.full_like(mean, 2 * np.log(3.0)))
  sample = moments.sample(jax.random.key(0))
  np.testing.assert_allclose(sample.mean(), 2, atol=0.2)
  np.testing.assert_allclose(sample.std(), 3, atol=0.2)
  plain = vae.Config.from_hf(SMALL | dict(scaling_factor=0.13025))
  np.testing.assert_allclose(vae.normalize(mean, plain), 0.2605, rtol=1e-6)
  shifted = vae.Config.from_hf(
    SMALL
    | dict(
      scaling_factor=0.5, latents_mean=[1, 2, 3, 4], latents_std=[1, 2, 4, 8]
    )
  )
  got = vae.normalize(mean, shifted)[0, 0, 0]
  np.testing.assert_allclose(got, [0.5, 0, -0.125, -0.125], rtol=1e-6)
  for config in (plain, shifted):
    back = vae.denormalize(vae.normalize(mean, config), config)
    np.testing.assert_allclose(back, mean, rtol=1e-6)


def test_row_by_row_is_attention(monkeypatch):
  """What a CPU does with logits that are larger than its cache."""
  rng = np.random.default_rng(2)
  draw = lambda n: jnp.asarray(rng.normal(size=(3, n, 2, 4)), jnp.float32)
  query, key, value = draw(7), draw(5), draw(5)
  whole = transformer2d.row_by_row(query, key, value)
  monkeypatch.setattr(transformer2d, "_LARGE", 0)
  assert "scan" in str(
    jax.make_jaxpr(transformer2d.row_by_row)(query, key, value)
  )
  found = transformer2d.row_by_row(query, key, value)
  np.testing.assert_allclose(found, whole, atol=1e-6)


def test_chunked_attention_is_attention():
  rng = np.random.default_rng(0)
  query, key, value = (
    rng.normal(size=(2, n, 1, 8)).astype(np.float32) for n in (11, 9, 9)
  )
  attend = lambda chunk: transformer2d.chunked_attention(
    query, key, value, chunk=chunk
  )
  logits = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(8)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum("bhnm,bmhd->bnhd", weights, value)
  for chunk in (4, 11):
    np.testing.assert_allclose(attend(chunk), want, rtol=1e-5, atol=1e-6)


def test_norms_stay_exact_in_bfloat16_and_far_from_zero():
  x = 30 + 0.1 * np.random.default_rng(0).normal(size=(1, 9, 7, 32))
  x = jnp.asarray(x, jnp.float32)
  norm = resnet2d.GroupNorm(8, epsilon=1e-6)
  variables = norm.init(jax.random.key(0), x)
  exact = lambda x: twins.nhwc(
    torch.nn.functional.group_norm(twins.nchw(np.float64(x)), 8, eps=1e-6)
  )
  assert twins.distance(norm.apply(variables, x), exact(x)) < 2e-4
  rounded = x.astype(jnp.bfloat16)
  got = norm.apply(variables, rounded)
  assert got.dtype == jnp.float32
  assert twins.distance(got, exact(rounded)) < 2e-4


def test_bfloat16_decodes_to_float32_and_float16_is_refused(small):
  _, config, params = small
  latents = np.random.default_rng(0).normal(size=(1, 5, 7, 4))
  latents = latents.astype(np.float32)
  # params is looked up at each call.
  call = lambda dtype: twins.run(
    lambda params, z: vae.VAE(config, dtype=dtype).apply(
      {"params": params}, z, method="decode"
    ),
    params,
    latents,
  )
  got = call(jnp.bfloat16)
  assert got.dtype == jnp.float32
  assert twins.distance(got, call(jnp.float32)) < 3e-2
  params = resnet2d.cast_kernels(params, jnp.bfloat16)
  assert params["decoder"]["conv_in"]["kernel"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, call(jnp.bfloat16))
  with pytest.raises(errors.UserError, match="force_upcast"):
    call(jnp.float16)


def test_full_vae_has_every_tensor():
  with torch.device("meta"):
    net = diffusers.AutoencoderKL(**SDXL)
  shapes = vae.param_shapes(vae.Config.from_hf(dict(net.config)))
  assert trees.count(shapes) == 83_653_863
  assert twins.flat_shapes(shapes) == twins.shapes(
    net, diffusion_rules.autoencoder()
  )


def test_folders_old_and_new(small, tmp_path):
  import safetensors.torch

  net, config, params = small
  net.save_pretrained(tmp_path / "vae")
  old = {}
  renamed = dict(to_q="query", to_k="key", to_v="value")
  for name, value in net.state_dict().items():
    for new, before in (renamed | {"to_out.0": "proj_attn"}).items():
      if f".{new}." in name:
        name = name.replace(new, before)
        value = value[..., None, None] if value.ndim == 2 else value
    old[name] = value.clone()
  net.save_config(tmp_path / "old")
  file = tmp_path / "old" / "diffusion_pytorch_model.safetensors"
  safetensors.torch.save_file(old, file)
  want = trees.flatten(params)
  ours = diffusers_folder.save(tmp_path / "ours", config, params)
  diffusers.AutoencoderKL.from_pretrained(ours, low_cpu_mem_usage=False)
  for folder in (tmp_path, tmp_path / "vae", tmp_path / "old", ours):
    read, got = diffusers_folder.vae(folder)
    assert read == config
    got = trees.flatten(got)
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize(
  "change, said",
  [
    (dict(down_block_types=["DownEncoderBlock2D"]), "down_block_types"),
    (dict(norm_num_groups=24), "norm_num_groups 24"),
    (dict(shift_factor=0.1), "sets shift_factor to 0.1"),
    (dict(_class_name="AutoencoderTiny"), "of a AutoencoderTiny"),
  ],
)
def test_configurations_not_built_are_refused(change, said):
  with pytest.raises(errors.UserError, match=said):
    vae.Config.from_hf(SMALL | change)
