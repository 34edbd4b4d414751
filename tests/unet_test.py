import copy

import diffusers
from diffusers.models import embeddings as torch_embeddings
from diffusers.models import resnet as torch_resnet
from diffusers.models.transformers import transformer_2d
import diffusers_twins as twins
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax import errors, trees
from dppp_jax.models import embeddings, resnet2d, transformer2d, unet
from dppp_jax.weights import diffusers_folder, diffusion_rules

# float64 on both sides: correct code stands at 1e-14, and the smallest of the
# known mistakes (an epsilon of a norm) at 4e-6.
TOLERANCE = 1e-11

# SD 1.x with two of its four levels.
SD1 = dict(
  block_out_channels=(32, 64),
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=24,
  attention_head_dim=4,
)
# Every branch that neither SDXL nor SD 1.x takes.
OTHER = dict(
  in_channels=5,
  out_channels=3,
  block_out_channels=(32, 64, 64),
  layers_per_block=(2, 1, 1),
  norm_num_groups=8,
  down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
  mid_block_type="UNetMidBlock2D",
  mid_block_scale_factor=2.0,
  only_cross_attention=(True, False, False),
  transformer_layers_per_block=((0, 2), (1,), 1),
  reverse_transformer_layers_per_block=(1, (1, 0), (1, 0, 1)),
  attention_head_dim=(2, 4, 4),
  cross_attention_dim=24,
  encoder_hid_dim=16,
  encoder_hid_dim_type="text_proj",
  class_embed_type="projection",
  class_embeddings_concat=True,
  projection_class_embeddings_input_dim=12,
  resnet_time_scale_shift="scale_shift",
  center_input_sample=True,
  conv_in_kernel=1,
  conv_out_kernel=5,
  time_embedding_dim=48,
  time_embedding_act_fn="gelu",
  timestep_post_act="silu",
  time_cond_proj_dim=8,
  downsample_padding=0,
  flip_sin_to_cos=False,
  freq_shift=1,
  act_fn="gelu",
  norm_eps=1e-3,
)


def twin(values, seed=0):
  """A diffusers UNet, and its configuration and parameters as ours."""
  net = twins.randomise(diffusers.UNet2DConditionModel(**values), seed)
  config = unet.Config.from_hf(dict(net.config))
  rules = diffusion_rules.unet(config)
  params = twins.params(net, rules, unet.param_shapes(config))
  return net, config, params


@pytest.fixture(scope="module")
def xl():
  return twin(twins.XL)


def test_unet_xl_hoisted_and_stacked_with_residuals(xl):
  net, config, params = xl
  params = diffusion_rules.stack_layers(params, stack_from=2)
  shapes = unet.param_shapes(config, stack_from=2)
  assert twins.flat_shapes(params) == twins.flat_shapes(shapes)
  module = unet.UNet(config, dtype=jnp.float64, stack_from=2)
  args, conditions = twins.inputs(config)
  rng = np.random.default_rng(3)
  sizes = [(25, 17, 32)] * 2 + [(13, 9, 32), (13, 9, 64), (7, 5, 64)]
  sizes += [(7, 5, 128)]
  down = [rng.normal(size=(2, *size)) for size in sizes]
  residuals = unet.Residuals(tuple(down), rng.normal(size=(2, 7, 5, 128)))

  def ours(params, sample, timesteps, context, residuals, **conditions):
    call = lambda *args, **kw: module.apply({"params": params}, *args, **kw)
    emb = call(timesteps, method="embed", **conditions)
    text = call(context, method="text")
    return call(sample, emb, text, residuals, method="denoise")

  with twins.float64():
    torch_args, added = twins.torch_inputs(args, conditions)
    want = net.double()(
      *torch_args,
      down_block_additional_residuals=[twins.nchw(x) for x in down],
      mid_block_additional_residual=twins.nchw(residuals.mid),
      **added,
    )
    got = twins.run(ours, twins.wide(params), *args, residuals, **conditions)
    net.float()
  assert got.dtype == np.float64
  assert twins.distance(got, twins.nhwc(want.sample)) < TOLERANCE


@pytest.mark.parametrize(
  "values, size", [(SD1, (16, 24)), (OTHER, (21, 14))], ids=["sd1", "other"]
)
def test_unet_equals_diffusers(values, size):
  net, config, params = twin(values)
  module = unet.UNet(config, dtype=jnp.float64)
  args, conditions = twins.inputs(config, size=size)
  added = {}
  if values is OTHER:
    rng = np.random.default_rng(5)
    conditions["class_labels"] = rng.normal(size=(2, 12))
    conditions["timestep_cond"] = rng.normal(size=(2, 8))
    added = {k: torch.from_numpy(v) for k, v in conditions.items()}
  ours = lambda params, *args, **kw: module.apply(
    {"params": params}, *args, **kw
  )
  with twins.float64():
    torch_args, _ = twins.torch_inputs(args, {})
    want = net.double()(*torch_args, **added).sample
    got = twins.run(ours, twins.wide(params), *args, **conditions)
  assert twins.distance(got, twins.nhwc(want)) < TOLERANCE


@pytest.mark.parametrize(
  "values, labels",
  [
    (dict(num_class_embeds=6), np.array([5, 2])),
    (dict(class_embed_type="timestep"), np.array([7.5, 20.0])),
    (dict(class_embed_type="identity"), np.ones((2, 128))),
    (
      dict(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=6,
      ),
      np.arange(12.0).reshape(2, 6),
    ),
  ],
  ids=["table", "timestep", "identity", "simple_projection"],
)
def test_class_embeddings_equal_diffusers(values, labels):
  small = dict(
    block_out_channels=(32,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    mid_block_type=None,
    norm_num_groups=8,
    layers_per_block=1,
    act_fn="gelu",
  )
  net, config, params = twin(small | values)
  times = np.array([500.45, 3.0])
  with twins.float64():
    net.double()
    like, t = torch.zeros(2, 1).double(), torch.from_numpy(times)
    classes = net.get_class_embed(like, torch.from_numpy(labels))
    want = net.time_embedding(net.get_time_embed(like, t)) + classes
    got = unet.UNet(config, dtype=jnp.float64).apply(
      {"params": twins.wide(params)}, times, class_labels=labels, method="embed"
    )
  assert twins.distance(got, want) < TOLERANCE


@pytest.mark.parametrize("dim, positions", [(320, 999.0), (256, 1536.0)])
def test_sinusoid_equals_torch_in_float32(dim, positions):
  positions = np.array([positions, 500.45, 0.0], np.float32)
  want = torch_embeddings.get_timestep_embedding(
    torch.from_numpy(positions), dim, True, 0
  )
  got = embeddings.sinusoid(positions, dim)
  # A last digit of the frequency, times the position.
  np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-4)


# diffusers' own notice, for a class that its networks use.
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")
def test_transformer_scan_loop_and_torch_agree():
  net = transformer_2d.Transformer2DModel(
    4, 8, 32, num_layers=2, norm_num_groups=8, cross_attention_dim=24,
    only_cross_attention=True,
  )  # fmt: skip
  net = twins.randomise(net)
  rng = np.random.default_rng(0)
  x, context = rng.normal(size=(2, 5, 3, 32)), rng.normal(size=(2, 7, 24))
  rules = diffusion_rules.unet(unet.Config.from_hf(SD1))
  found = diffusion_rules.convert.convert(
    {f"mid_block.attentions.0.{k}": v for k, v in twins.tensors(net).items()},
    rules,
    where="twin",
  )
  params = trees.unflatten(found)["mid_block"]["attentions_0"]
  with twins.float64():
    net.double()
    want = net(twins.nchw(x), encoder_hidden_states=torch.from_numpy(context))
    want = twins.nhwc(want.sample)
    for stacked in (False, True):
      module = transformer2d.Transformer2D(
        32, 4, 2, 8, False, True, stacked, remat=stacked, dtype=jnp.float64
      )
      if stacked:
        params = diffusion_rules.stack_layers(params, stack_from=2)
      call = lambda params, x, context, module=module: module.apply(
        {"params": params},
        x,
        context,
        method=lambda m, x, context: m(x, m.text(context)),
      )
      got = twins.run(call, twins.wide(params), x, context)
      assert twins.distance(got, want) < TOLERANCE


def test_resnet_block_in_float32_is_near_torch():
  # Far from zero, where a fast variance cancels.
  net = torch_resnet.ResnetBlock2D(
    in_channels=32, out_channels=64, temb_channels=16, groups=8, eps=1e-5
  )
  net = twins.randomise(net)
  rng = np.random.default_rng(0)
  x = (30 + rng.normal(size=(2, 6, 5, 32))).astype(np.float32)
  emb = rng.normal(size=(2, 16)).astype(np.float32)
  names = {f"mid_block.resnets.0.{k}": v for k, v in twins.tensors(net).items()}
  rules = diffusion_rules.unet(unet.Config.from_hf(SD1))
  flat = diffusion_rules.convert.convert(names, rules, where="twin")
  params = trees.unflatten(flat)["mid_block"]["resnets_0"]
  with torch.no_grad():
    want = twins.nhwc(net(twins.nchw(x), torch.from_numpy(emb)))
  module = resnet2d.ResnetBlock(64, 8)
  got = module.apply({"params": params}, x, emb)
  assert twins.distance(got, want) < 2e-6


@pytest.mark.parametrize("have, wanted", [((4, 7), (7, 13)), ((3, 5), (7, 10))])
def test_nearest_is_torchs(have, wanted):
  x = np.random.default_rng(0).normal(size=(1, *have, 2))
  want = torch.nn.functional.interpolate(twins.nchw(x), size=wanted)
  np.testing.assert_array_equal(
    resnet2d.nearest(x.astype(np.float32), wanted),
    twins.nhwc(want).astype(np.float32),
  )


def test_full_sdxl_has_every_tensor():
  with torch.device("meta"):
    net = diffusers.UNet2DConditionModel(**twins.SDXL)
  config = unet.Config.from_hf(dict(net.config))
  shapes = unet.param_shapes(config)
  assert trees.count(shapes) == 2_567_463_684
  assert len(net.state_dict()) == 1680
  assert twins.flat_shapes(shapes) == twins.shapes(
    net, diffusion_rules.unet(config)
  )


def test_full_sd1_has_every_tensor():
  with torch.device("meta"):
    net = diffusers.UNet2DConditionModel(cross_attention_dim=768)
  config = unet.Config.from_hf(dict(net.config))
  shapes = unet.param_shapes(config)
  assert trees.count(shapes) == 859_520_964
  assert twins.flat_shapes(shapes) == twins.shapes(
    net, diffusion_rules.unet(config)
  )


def test_bfloat16_answers_in_float32(xl):
  _, config, params = xl
  module = unet.UNet(config, dtype=jnp.bfloat16)
  args, conditions = twins.inputs(config)
  call = lambda *a, **kw: module.apply({"params": params}, *a, **kw)
  assert jax.eval_shape(call, *args, **conditions).dtype == jnp.float32
  emb = jax.eval_shape(
    lambda t, **kw: call(t, method="embed", **kw), args[1], **conditions
  )
  assert emb.dtype == jnp.float32
  text = jax.eval_shape(lambda c: call(c, method="text"), args[2])
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(text))


def test_cast_kernels_are_those_that_the_network_casts():
  _, config, params = twin(SD1 | dict(num_class_embeds=2))
  cast = resnet2d.cast_kernels(params, jnp.bfloat16)
  module = unet.UNet(config, dtype=jnp.bfloat16)
  (sample, times, context), _ = twins.inputs(config, size=(4, 2))
  call = lambda params: twins.run(
    lambda params, *args: module.apply(
      {"params": params}, *args, class_labels=jnp.array([0, 1])
    ),
    params,
    sample.astype(np.float32),
    times.astype(np.float32),
    context.astype(np.float32),
  )
  np.testing.assert_array_equal(call(cast), call(params))
  wide = {
    name.split("/")[0]
    for name, leaf in trees.flatten(cast).items()
    if leaf.ndim > 1 and leaf.dtype == np.float32
  }
  assert wide == {"time_embedding", "class_embedding", "conv_out"}


def test_stack_and_unstack_are_inverse(xl):
  _, _, params = xl
  stacked = diffusion_rules.stack_layers(params, stack_from=2)
  names = twins.flat_shapes(stacked)
  prefix = "mid_block/attentions_0/transformer_blocks"
  assert names[f"{prefix}/norm1/scale"] == (2, 128)
  shallow = "down_blocks_1/attentions_0/transformer_blocks_0/norm1/scale"
  assert names[shallow] == (64,)
  back = trees.flatten(diffusion_rules.unstack_layers(stacked))
  flat = trees.flatten(params)
  assert back.keys() == flat.keys()
  for name in flat:
    np.testing.assert_array_equal(back[name], flat[name])


def test_folder_variants_shards_and_pipelines(xl, tmp_path):
  net, config, params = xl
  net.save_pretrained(tmp_path / "unet")
  net.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
  half = copy.deepcopy(net).half()
  half.save_pretrained(tmp_path / "half", variant="fp16")
  half.save_pretrained(
    tmp_path / "both", variant="fp16", max_shard_size="400KB"
  )
  cases = [("", None, 0), ("shards", None, 0)]
  cases += [("half", "fp16", 1e-3), ("both", None, 1e-3)]
  flat = trees.flatten(params)
  name = "conv_in/kernel"
  for folder, variant, tolerance in cases:
    read, got = diffusers_folder.unet(tmp_path / folder, variant=variant)
    assert read == config
    got = trees.flatten(got)
    assert got.keys() == flat.keys()
    assert got[name].dtype == (np.float16 if tolerance else np.float32)
    np.testing.assert_allclose(got[name], flat[name], rtol=0, atol=tolerance)
    assert (got[name] == flat[name]).all() == (tolerance == 0)
  _, stacked = diffusers_folder.unet(tmp_path, stack_from=2)
  shapes = unet.param_shapes(config, stack_from=2)
  assert twins.flat_shapes(stacked) == twins.flat_shapes(shapes)
  with pytest.raises(errors.UserError, match="no variant 'bf16'"):
    diffusers_folder.unet(tmp_path, variant="bf16")
  with pytest.raises(errors.UserError, match=r"neither config.json nor vae/"):
    diffusers_folder.vae(tmp_path)
  with pytest.raises(errors.UserError, match="of a UNet2DConditionModel"):
    diffusers_folder.controlnet(tmp_path / "unet")


def test_what_is_saved_is_read_by_diffusers(xl, tmp_path):
  net, config, params = xl
  stacked = diffusion_rules.stack_layers(params, stack_from=2)
  folder = diffusers_folder.save(tmp_path / "ours", config, stacked)
  back = diffusers.UNet2DConditionModel.from_pretrained(
    folder, low_cpu_mem_usage=False
  )
  assert unet.Config.from_hf(dict(back.config)) == config
  want = net.state_dict()
  assert back.state_dict().keys() == want.keys()
  for name, value in back.state_dict().items():
    assert torch.equal(value, want[name]), name
  with pytest.raises(errors.UserError, match="exists already"):
    diffusers_folder.save(folder, config, params)


@pytest.mark.parametrize(
  "change, said",
  [
    (lambda t: t.pop("conv_in.bias"), r"- conv_in/bias \(32,\)"),
    (lambda t: t.update(extra=t["conv_in.bias"]), r"\+ extra \(32,\): no rule"),
    (
      lambda t: t.update({"conv_in.bias": t["conv_out.bias"]}),
      r"! conv_in/bias expects \(32,\), holds \(4,\)",
    ),
  ],
  ids=["missing", "extra", "shape"],
)
def test_wrong_weights_are_refused_with_a_diff(xl, tmp_path, change, said):
  import safetensors.torch

  net, _, _ = xl
  net.save_config(tmp_path)
  tensors = dict(net.state_dict())
  change(tensors)
  tensors = {k: v.clone() for k, v in tensors.items()}
  file = tmp_path / "any_name.safetensors"
  safetensors.torch.save_file(tensors, file)
  for path in (tmp_path, file):
    with pytest.raises(errors.UserError, match=said):
      diffusers_folder.unet(path)


@pytest.mark.parametrize(
  "change, said",
  [
    (dict(dual_cross_attention=True), "dual_cross_attention"),
    (dict(time_embedding_type="fourier"), "time_embedding_type"),
    (dict(addition_embed_type="image"), "addition_embed_type"),
    (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "mid_block_type"),
    (dict(down_block_types=["AttnDownBlock2D"] * 3), "down_block_types"),
    (dict(attention_head_dim=7), "7 heads"),
    (dict(cross_attention_dim=[8, 16, 8]), "different widths"),
    (dict(layers_per_block=[1, 2]), "layers_per_block has 2 entries"),
    (dict(addition_time_embed_dim=None), "addition_time_embed_dim"),
  ],
)
def test_configurations_not_built_are_refused(change, said):
  with pytest.raises(errors.UserError, match=said):
    unet.Config.from_hf(twins.XL | change)


def test_residuals_of_another_base_are_refused(xl):
  _, config, params = xl
  args, conditions = twins.inputs(config)
  few = unet.Residuals((jnp.zeros((2, 25, 17, 32)),), jnp.zeros((2, 7, 5, 128)))
  call = lambda *a, **kw: unet.UNet(config).apply({"params": params}, *a, **kw)
  with pytest.raises(errors.UserError, match=r"gives 1 residuals .* 6 skips"):
    jax.eval_shape(call, *args, residuals=few, **conditions)
