"""U2-Net against a torch one written from the paper, and its file formats."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F

from dppp_jax import errors, trees
from dppp_jax.models import u2net
from dppp_jax.weights import u2net as weights

TINY = u2net.Config(
  ((2, 4), (3, 5), (3, 6), (4, 7), (4, 7), (5, 8)),
  ((4, 7), (4, 6), (3, 5), (2, 4), (2, 3)),
)


class TorchConv(torch.nn.Module):
  def __init__(self, features, out, dilation=1):
    super().__init__()
    self.conv_s1 = torch.nn.Conv2d(
      features, out, 3, padding=dilation, dilation=dilation
    )
    self.bn_s1 = torch.nn.BatchNorm2d(out)

  def forward(self, x):
    return F.relu(self.bn_s1(self.conv_s1(x)))


def _like(x, other):
  return F.interpolate(
    x, size=other.shape[2:], mode="bilinear", align_corners=False
  )


class TorchRsu(torch.nn.Module):
  """Fig. 2 of the paper: L convolutions down, the last dilated by two."""

  def __init__(self, levels, features, inside, out, flat=False):
    super().__init__()
    self.levels, self.flat = levels, flat
    rate = (lambda i: 2 ** (i - 1)) if flat else lambda i: 1 + (i == levels)
    self.rebnconvin = TorchConv(features, out)
    for i in range(1, levels + 1):
      width = out if i == 1 else inside
      setattr(self, f"rebnconv{i}", TorchConv(width, inside, rate(i)))
    for i in range(levels - 1, 0, -1):
      width = out if i == 1 else inside
      rate_up = rate(i) if flat else 1
      setattr(self, f"rebnconv{i}d", TorchConv(2 * inside, width, rate_up))

  def forward(self, x):
    x = first = self.rebnconvin(x)
    kept = []
    for i in range(1, self.levels + 1):
      if 1 < i < self.levels and not self.flat:
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
      x = getattr(self, f"rebnconv{i}")(x)
      kept.append(x)
    x = kept.pop()
    for i in range(self.levels - 1, 0, -1):
      skip = kept.pop()
      x = torch.cat([_like(x, skip), skip], 1)
      x = getattr(self, f"rebnconv{i}d")(x)
    return x + first


class TorchU2Net(torch.nn.Module):
  """Fig. 5 of the paper, with the state-dict names of its authors."""

  def __init__(self, config):
    super().__init__()
    features, widths = 3, []
    plan = [(7, False), (6, False), (5, False), (4, False), (4, True)]
    for i, (inside, out) in enumerate(config.encoder):
      levels, flat = [*plan, (4, True)][i]
      stage = TorchRsu(levels, features, inside, out, flat)
      setattr(self, f"stage{i + 1}", stage)
      features = out
      widths.append(out)
    sides = [widths.pop()]
    for i, (inside, out) in zip(range(5, 0, -1), config.decoder):
      levels, flat = plan[i - 1]
      stage = TorchRsu(levels, features + widths.pop(), inside, out, flat)
      setattr(self, f"stage{i}d", stage)
      features = out
      sides.append(out)
    for i, width in enumerate(reversed(sides)):
      conv = torch.nn.Conv2d(width, 1, 3, padding=1)
      setattr(self, f"side{i + 1}", conv)
    self.outconv = torch.nn.Conv2d(6, 1, 1)

  def forward(self, image):
    x, kept = image, []
    for i in range(1, 7):
      if i > 1:
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
      x = getattr(self, f"stage{i}")(x)
      kept.append(x)
    levels = [kept.pop()]
    for i in range(5, 0, -1):
      skip = kept.pop()
      x = torch.cat([_like(x, skip), skip], 1)
      x = getattr(self, f"stage{i}d")(x)
      levels.append(x)
    sides = [
      _like(getattr(self, f"side{i + 1}")(x), image)
      for i, x in enumerate(reversed(levels))
    ]
    sides = torch.cat(sides, 1)
    return self.outconv(sides), sides


@pytest.fixture(scope="module")
def oracle():
  """A network with random weights, norms and running statistics."""
  torch.manual_seed(0)
  net = TorchU2Net(TINY)
  for module in net.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      torch.nn.init.uniform_(module.weight, 0.5, 1.5)
      torch.nn.init.normal_(module.bias, std=0.3)
      module.running_mean.normal_(std=0.5)
      module.running_var.uniform_(0.3, 2)
  return net.eval()


# 119 convolutions: most of the time of these tests is the compiler's.
_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


def _distance(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def _images(seed=0, size=(2, 51, 38, 3)):
  return np.random.default_rng(seed).standard_normal(size)


def _expect(oracle, images):
  with torch.no_grad():
    fused, sides = oracle(
      torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    )
  return fused.numpy()[:, 0], sides.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def saved(oracle, tmp_path_factory):
  path = tmp_path_factory.mktemp("u2net") / "u2net.pth"
  torch.save(oracle.state_dict(), path)
  return path


def test_equals_torch_in_float64(oracle, saved):
  """Odd sizes: pools round up, ups meet their skip and not twice the size."""
  config, variables = weights.load(saved.parent)  # A folder with the file.
  assert config == TINY
  images = _images()
  double = TorchU2Net(TINY).double().eval()
  double.load_state_dict(oracle.state_dict())
  fused, sides = _expect(double, images)
  with jax.enable_x64(True):
    net = u2net.U2Net(config, dtype=jnp.float64)
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    ours = jax.jit(net.apply, compiler_options=_QUICK)(variables, images)
    assert ours.fused.dtype == jnp.float64
    for i in range(6):
      assert _distance(ours.sides[..., i], sides[..., i]) < 1e-9, i
    assert _distance(ours.fused, fused) < 1e-9


@pytest.fixture(scope="module")
def apply():
  return jax.jit(u2net.U2Net(TINY).apply, compiler_options=_QUICK)


def test_float32_is_near_torch(oracle, saved, apply):
  images = _images(1).astype(np.float32)
  _, variables = weights.load(saved)
  fused, sides = _expect(oracle, images)
  ours = apply(variables, images)
  assert ours.fused.dtype == jnp.float32
  assert _distance(ours.sides, sides) < 2e-6
  assert _distance(ours.fused, fused) < 2e-6


@pytest.mark.parametrize("training", ["EVAL", "TRAINING"])
def test_onnx_of_torchs_exporter(
  oracle, tmp_path, apply, monkeypatch, training
):
  """In eval mode the exporter folds the norms; otherwise it keeps them."""
  from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

  # What it would do with the onnx package, which is not needed here.
  monkeypatch.setattr(
    onnx_proto_utils, "_add_onnxscript_fn", lambda model, *args: model
  )
  path = tmp_path / "u2net.onnx"
  images = _images(2).astype(np.float32)
  example = torch.from_numpy(images).permute(0, 3, 1, 2)
  with pytest.warns():
    torch.onnx.export(
      oracle,
      (example,),
      str(path),
      dynamo=False,
      opset_version=17,
      do_constant_folding=training == "EVAL",
      training=getattr(torch.onnx.TrainingMode, "EVAL")
      if training == "EVAL"
      else torch.onnx.TrainingMode.PRESERVE,
    )
  config, variables = weights.load(path)
  assert config == TINY
  fused, _ = _expect(oracle, images)
  assert _distance(apply(variables, images).fused, fused) < 3e-6
  # Cut anywhere, it is refused.
  data = path.read_bytes()
  for size in (0, 10, len(data) // 3, len(data) - 7):
    path.write_bytes(data[:size])
    with pytest.raises(errors.UserError, match="is truncated"):
      weights.load(path)


def test_safetensors_round_trip_into_torch(oracle, saved, tmp_path):
  _, variables = weights.load(saved)
  weights.save(tmp_path / "model.safetensors", variables)
  config, again = weights.load(tmp_path)
  assert config == TINY
  jax.tree.map(np.testing.assert_array_equal, variables, again)
  from safetensors import torch as st

  tensors = st.load_file(tmp_path / "model.safetensors")
  missing, extra = TorchU2Net(TINY).load_state_dict(tensors, strict=False)
  assert not extra
  assert all(name.endswith("num_batches_tracked") for name in missing)


@pytest.mark.parametrize(
  "config,millions,tensors",
  [(u2net.FULL, 44.010, 798), (u2net.SMALL, 1.131, 798)],
)
def test_published_sizes(config, millions, tensors):
  """Counts of the published models, and every name and shape."""
  shapes = weights.shapes(config)
  assert round(trees.count(shapes["params"]) / 1e6, 3) == millions
  with torch.device("meta"):
    state = TorchU2Net(config).state_dict()
  assert len(state) == tensors
  names = {
    name: tuple(value.shape)
    for name, value in state.items()
    if not name.endswith("num_batches_tracked")
  }
  moved = weights.convert.convert(
    # Broadcast views: the shapes without the memory.
    {
      name: np.broadcast_to(np.float32(0), shape)
      for name, shape in names.items()
    }
    if config == u2net.SMALL
    else {},
    weights.rules(),
    where="meta",
  )
  flat = trees.flatten(shapes)
  assert len(flat) == len(names)
  for path, value in moved.items():
    assert flat[path].shape == value.shape


@pytest.fixture(scope="module")
def block():
  """One RSU-4F with what it needs: compiled quickly."""
  images = _images(4, (2, 32, 32, 3)).astype(np.float32)
  net = u2net.Rsu(4, 2, 4, True)
  key = jax.random.key(0)
  shapes = jax.eval_shape(lambda key: net.init(key, images, False), key)
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda leaf: rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32), shapes
  )
  return images, state


def test_bfloat16_is_near_float32(block):
  images, state = block
  run = lambda dtype: jax.jit(
    lambda state: u2net.Rsu(4, 2, 4, True, dtype).apply(state, images, False)
  )(state)
  fine, coarse = run(jnp.float32), run(jnp.bfloat16)
  assert coarse.dtype == jnp.bfloat16
  assert _distance(coarse, fine) < 0.02


def test_enlarging_in_bfloat16_keeps_its_places():
  """Positions are computed in float32, or 320 columns would blur together."""
  ramp = np.linspace(0, 1, 161, dtype=np.float32)[None, None, :, None]
  like = np.zeros((1, 1, 320, 1))
  fine = u2net._upsample(ramp, like)
  coarse = u2net._upsample(ramp.astype(jnp.bfloat16), like)
  assert np.abs(np.asarray(coarse, np.float32) - fine).max() < 0.01


def test_training_moves_the_statistics(block):
  images, state = block
  net = u2net.Rsu(4, 2, 4, True)
  _, moved = jax.jit(
    lambda state: net.apply(state, images, True, mutable=["batch_stats"])
  )(state)
  leaf = lambda tree: tree["rebnconvin"]["bn_s1"]["mean"]
  weights_in = state["params"]["rebnconvin"]["conv_s1"]
  y = F.conv2d(
    torch.from_numpy(images).permute(0, 3, 1, 2),
    torch.from_numpy(np.array(weights_in["kernel"])).permute(3, 2, 0, 1),
    padding=1,
  )
  bias = np.asarray(weights_in["bias"])
  expected = 0.9 * leaf(state["batch_stats"])
  expected += 0.1 * (y.mean((0, 2, 3)).numpy() + bias)
  np.testing.assert_allclose(leaf(moved["batch_stats"]), expected, atol=1e-5)


def test_hostile_pickle_runs_nothing(tmp_path):
  class Bomb:
    def __reduce__(self):
      return (open, (str(tmp_path / "exploded"), "w"))

  path = tmp_path / "u2net.pth"
  path.write_bytes(pickle.dumps({"stage1": Bomb()}))
  with pytest.raises(errors.UserError):
    weights.load(path)
  assert not (tmp_path / "exploded").exists()


def _field(number, value):
  """One field of a protobuf message: a varint below 128, or bytes."""
  if isinstance(value, int):
    return bytes([number << 3, value])
  return bytes([number << 3 | 2, len(value)]) + value


def _onnx(*tensor):
  node = (
    _field(1, b"x") + _field(1, b"w") + _field(2, b"y") + _field(4, b"Conv")
  )
  graph = _field(1, node) + _field(5, b"".join(tensor))
  return _field(7, graph)


@pytest.mark.parametrize(
  "fields,words",
  [
    ((_field(2, 1), _field(9, 3)), "a number where bytes were expected"),
    ((_field(2, 1), _field(4, 3)), "a number where bytes were expected"),
    ((_field(2, 16), _field(9, b"12")), "Conv of numbers that are no float32"),
    ((_field(2, 1), _field(9, b"1234")), r"Conv with a kernel of shape \(\)"),
  ],
)
def test_malformed_onnx_is_refused(tmp_path, fields, words):
  path = tmp_path / "u2net.onnx"
  path.write_bytes(_onnx(_field(8, b"w"), *fields))
  with pytest.raises(errors.UserError, match=words):
    weights.load(path)


def test_other_networks_are_refused(oracle, tmp_path):
  state = oracle.state_dict()
  torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "a.pth")
  with pytest.raises(errors.UserError, match="no U2-Net"):
    weights.load(tmp_path / "a.pth")
  odd = state | {"stage1.rebnconvin.conv_s1.weight": torch.zeros(())}
  torch.save(odd, tmp_path / "a.pth")
  with pytest.raises(errors.UserError, match=r"no U2-Net .*stage1\.rebnconvin"):
    weights.load(tmp_path / "a.pth")
  cut = {k: v for k, v in state.items() if not k.startswith("side3")}
  torch.save(cut, tmp_path / "b.pth")
  with pytest.raises(errors.UserError, match="- params/side3/kernel"):
    weights.load(tmp_path / "b.pth")
  torch.save(state | {"head.weight": torch.zeros(1)}, tmp_path / "c.pth")
  with pytest.raises(errors.UserError, match=r"head\.weight"):
    weights.load(tmp_path / "c.pth")
  (tmp_path / "d.onnx").write_bytes(b"not an onnx file at all")
  with pytest.raises(errors.UserError, match="is a text that begins 'not an"):
    weights.load(tmp_path / "d.onnx")


def _node(op, *inputs):
  return b"".join(
    [*(_field(1, name) for name in inputs), _field(2, b"y"), _field(4, op)]
  )


@pytest.mark.parametrize(
  "op", [b"QLinearConv", b"ConvInteger", b"DequantizeLinear"]
)
def test_8_bits_are_not_said_to_be_truncated(tmp_path, op):
  path = tmp_path / "silueta.ONNX"
  graph = _field(1, _node(op, b"x", b"w")) + _field(1, _node(b"Conv", b"x"))
  path.write_bytes(_field(7, graph))
  with pytest.raises(errors.UserError, match="is quantised") as caught:
    weights.load(path)
  assert op.decode() in str(caught.value)
  assert "truncated" not in str(caught.value)


def _plain(op, tensor, *, is_constant=False):
  """A graph of one convolution, whose kernel is stored or made by a node."""
  constant = _node(b"Constant") + _field(5, _field(5, tensor))
  constant = constant.replace(_field(2, b"y"), _field(2, b"w"))
  graph = _field(1, constant) if is_constant else _field(5, tensor)
  return _field(7, graph + _field(1, _node(op, b"x", b"w")))


@pytest.mark.parametrize("is_constant", [False, True])
def test_other_networks_of_onnx_are_named(tmp_path, is_constant):
  from dppp_jax.weights import onnx

  kernel = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)
  tensor = b"".join(_field(1, n) for n in kernel.shape) + _field(2, 1)
  tensor += _field(8, b"w") + _field(9, kernel.tobytes())
  path = tmp_path / "birefnet.onnx"
  path.write_bytes(_plain(b"Conv", tensor, is_constant=is_constant))
  (conv,) = onnx.read_convs(path)
  np.testing.assert_array_equal(conv.weight, kernel)
  with pytest.raises(errors.UserError, match=r"another network .*1 convol"):
    weights.load(path)
  path.write_bytes(_plain(b"MatMul", tensor))
  with pytest.raises(errors.UserError, match=r"another network .*0 convol"):
    weights.load(path)


@pytest.mark.parametrize(
  "names, said",
  [
    (("conv_in.weight", "stage1.rebnconvin.conv_s1.weight"), "an ISNet"),
    (("bb.patch_embed.proj.weight",), "a BiRefNet"),
    (("backbone.model.features.0.0.weight",), "a MODNet"),
    (
      ("outconv.weight", "stage1.rebnconvin.conv_s1.weight"),
      "a U2-Net of 4 classes",
    ),
  ],
)
def test_networks_of_the_same_purpose_are_named(tmp_path, names, said):
  path = tmp_path / "x.safetensors"
  tensors = {name: np.ones((4, 1, 1, 1), np.float32) for name in names}
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.UserError, match=f"is {said}.*, no U2-Net"):
    weights.load(path)


def test_a_folder_of_several_onnx_files_asks_for_one(tmp_path):
  for name in ("u2net.onnx", "u2netp.onnx"):
    (tmp_path / name).write_bytes(b"\x08\x07")
  said = r"holds 2 \.onnx files \(u2net.onnx, u2netp.onnx\): name one"
  with pytest.raises(errors.UserError, match=said):
    weights.load(tmp_path)
  (tmp_path / "u2netp.onnx").unlink()
  (tmp_path / "._u2net.onnx").write_bytes(b"x")
  assert weights.locate(tmp_path).name == "u2net.onnx"
