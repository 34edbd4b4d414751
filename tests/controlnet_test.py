import diffusers
import diffusers_twins as twins
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax import errors, trees
from dppp_jax.models import controlnet, controlnet_union, unet_config
from dppp_jax.weights import diffusers_folder, diffusion_rules

TOLERANCE = 1e-11  # See unet_test.

# One level of SDXL with text, one without; the others add nothing here.
SMALL = twins.XL | dict(
  block_out_channels=(32, 64),
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
  transformer_layers_per_block=(1, 2),
  attention_head_dim=(1, 2),
)
SMALL.pop("up_block_types")
EMBEDDING = dict(conditioning_embedding_out_channels=(4, 8, 12))
UNION = dict(
  num_control_type=4, num_trans_channel=32, num_proj_channel=32
) | dict(num_trans_head=4, num_trans_layer=2)


def twin(values):
  """A diffusers ControlNet, and its configuration and parameters as ours."""
  is_union = "num_trans_channel" in values
  if is_union:
    net = twins.randomise(diffusers.ControlNetUnionModel(**values))
    config = unet_config.UnionConfig.from_hf(dict(net.config))
    shapes = controlnet_union.param_shapes(config)
    rules = diffusion_rules.controlnet_union(config)
  else:
    net = twins.randomise(diffusers.ControlNetModel(**values))
    config = controlnet.Config.from_hf(dict(net.config))
    shapes = controlnet.param_shapes(config)
    rules = diffusion_rules.controlnet(config)
  return net, config, twins.params(net, rules, shapes)


def images(batch, count=1, size=(25, 17), channels=3):
  rng = np.random.default_rng(9)
  shape = (batch, 4 * size[0], 4 * size[1], channels)
  return [rng.uniform(size=shape) for _ in range(count)]


def assert_equal(ours, theirs):
  down, mid = theirs
  assert len(ours.down) == len(down)
  for got, want in zip((*ours.down, ours.mid), (*down, mid), strict=True):
    assert got.dtype == np.float64
    assert twins.distance(got, twins.nhwc(want)) < TOLERANCE


@pytest.mark.parametrize(
  "change, guess",
  [
    (dict(controlnet_conditioning_channel_order="bgr"), True),
    (
      dict(
        mid_block_type="UNetMidBlock2D",
        global_pool_conditions=True,
        transformer_layers_per_block=(1, 0),
        conditioning_channels=2,
        addition_embed_type=None,
        num_class_embeds=5,
      ),
      False,
    ),
  ],
  ids=["bgr_guess", "pooled_plain_mid"],
)
def test_controlnet_equals_diffusers(change, guess):
  net, config, params = twin(SMALL | EMBEDDING | change)
  # Deep transformers stacked, where there are any.
  params = diffusion_rules.stack_layers(params, stack_from=2)
  module = controlnet.ControlNet(config, dtype=jnp.float64, stack_from=2)
  args, conditions = twins.inputs(config)
  (image,) = images(2, channels=config.conditioning_channels)

  def ours(params, sample, timesteps, context, image, scale, **conditions):
    call = lambda *args, **kw: module.apply({"params": params}, *args, **kw)
    return call(
      sample,
      call(timesteps, method="embed", **conditions),
      call(context, method="text"),
      call(image, method="hint"),
      scale=scale,
      guess=guess,
      method="control",
    )

  with twins.float64():
    torch_args, added = twins.torch_inputs(args, conditions)
    if config.num_class_embeds:
      conditions["class_labels"] = np.array([4, 1])
      added["class_labels"] = torch.tensor([4, 1])
    want = net.double()(
      *torch_args,
      twins.nchw(image),
      conditioning_scale=0.7,
      guess_mode=guess,
      return_dict=False,
      **added,
    )
    got = twins.run(
      ours, twins.wide(params), *args, image, np.float64(0.7), **conditions
    )
  assert_equal(got, want)


@pytest.mark.parametrize("count, batch", [(1, 1), (2, 2)])
def test_union_equals_diffusers(count, batch):
  net, config, params = twin(SMALL | EMBEDDING | UNION)
  # One sample alone must be right without looking at a batch.
  module = controlnet_union.build(
    config, dtype=jnp.float64, mix_batch=batch > 1
  )
  args, conditions = twins.inputs(config, batch=batch)
  hints = images(batch, count)
  kinds = [3, 0][:count]
  scales = [0.6, 1.3][:count]
  used = np.zeros((batch, 4))
  used[:, kinds] = 1
  ours = lambda params, *args, **kw: module.apply(
    {"params": params}, *args, kinds=kinds, **kw
  )
  with twins.float64():
    torch_args, added = twins.torch_inputs(args, conditions)
    want = net.double()(
      *torch_args,
      [twins.nchw(image) for image in hints],
      control_type=torch.from_numpy(used),
      control_type_idx=kinds,
      conditioning_scale=scales,
      guess_mode=count > 1,
      return_dict=False,
      **added,
    )
    got = twins.run(
      lambda params, *args, **kw: ours(params, *args, guess=count > 1, **kw),
      twins.wide(params),
      *args,
      hints,
      scale=np.array(scales),
      **conditions,
    )
  assert_equal(got, want)


def test_a_unions_sample_does_not_depend_on_its_batch():
  x = np.random.default_rng(0).normal(size=(3, 2, 32)).astype(np.float32)
  block = controlnet_union.FusionBlock(4)
  variables = block.init(controlnet_union.jax.random.key(0), x)
  whole = block.apply(variables, x)
  for i in range(3):
    alone = block.apply(variables, x[i : i + 1])
    np.testing.assert_allclose(whole[i : i + 1], alone, rtol=1e-5, atol=1e-5)
  # Equal samples, as in classifier-free guidance: what torch computes.
  twice = np.repeat(x[:1], 2, axis=0)
  mixed = controlnet_union.FusionBlock(4, mix_batch=True)
  np.testing.assert_allclose(
    block.apply(variables, twice),
    mixed.apply(variables, twice),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  "cls, count, shapes, rules",
  [
    (
      "ControlNetModel",
      1_251_014_160,
      controlnet.param_shapes,
      diffusion_rules.controlnet,
    ),
    (
      "ControlNetUnionModel",
      None,
      controlnet_union.param_shapes,
      diffusion_rules.controlnet_union,
    ),
  ],
)
def test_full_sdxl_controlnets_have_every_tensor(cls, count, shapes, rules):
  values = {k: v for k, v in twins.SDXL.items() if k != "up_block_types"}
  with torch.device("meta"):
    net = getattr(diffusers, cls)(**values)
  read = unet_config.UnionConfig if count is None else controlnet.Config
  config = read.from_hf(dict(net.config))
  tree = shapes(config)
  total = sum(p.numel() for p in net.parameters())
  assert trees.count(tree) == total
  assert count in (None, total)
  assert twins.flat_shapes(tree) == twins.shapes(net, rules(config))


def test_folders_of_both_kinds(tmp_path):
  first, config, params = twin(SMALL | EMBEDDING)
  second, union, _ = twin(SMALL | EMBEDDING | UNION)
  first.save_pretrained(tmp_path / "controlnet")
  second.save_pretrained(tmp_path / "controlnet_1")
  found = diffusers_folder.controlnets(tmp_path)
  assert [c for c, _ in found] == [config, union]
  flat, want = trees.flatten(found[0][1]), trees.flatten(params)
  assert flat.keys() == want.keys()
  np.testing.assert_array_equal(
    flat["controlnet_mid_block/kernel"], want["controlnet_mid_block/kernel"]
  )
  # In one precision only, beside a base in several.
  assert (
    diffusers_folder.controlnet(tmp_path / "controlnet", variant="fp16")[0]
    == config
  )
  # As some are published: another file name beside config.json.
  folder = tmp_path / "controlnet"
  file = folder / "OpenPoseXL2.safetensors"
  (folder / "diffusion_pytorch_model.safetensors").rename(file)
  for path in (file, folder):
    assert diffusers_folder.controlnet(path)[0] == config
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])
  with pytest.raises(errors.UserError, match=r"OpenPoseXL2.*truncated"):
    diffusers_folder.controlnet(folder)


def test_what_is_saved_is_read_again(tmp_path):
  for i, values in enumerate((SMALL | EMBEDDING, SMALL | EMBEDDING | UNION)):
    net, config, params = twin(values)
    folder = diffusers_folder.save(tmp_path / str(i), config, params)
    back = type(net).from_pretrained(folder, low_cpu_mem_usage=False)
    want = net.state_dict()
    assert back.state_dict().keys() == want.keys()
    for name, value in back.state_dict().items():
      assert torch.equal(value, want[name]), name
    assert diffusers_folder.controlnet(folder)[0] == config


def test_a_net_of_the_wrong_kind_is_refused():
  with pytest.raises(errors.UserError, match="channel_order is 'gbr'"):
    controlnet.Config.from_hf(
      SMALL | dict(controlnet_conditioning_channel_order="gbr")
    )
  with pytest.raises(errors.UserError, match="sets encoder_hid_dim to 8"):
    controlnet.Config.from_hf(SMALL | dict(encoder_hid_dim=8))
