"""LoRAs and their kin in torch: a narrow way beside a frozen layer.

Each function draws the factors of one layer and returns them, by the names
that trainers give them, with a function of the layer's input: what its paper
adds to the layer's output. Nothing here merges weights but where the paper
does so itself (DoRA, whole differences).
"""

import numpy as np
import torch

F = torch.nn.functional
RANK = 3
ALPHA = 1.5


def random(rng, *shape):
  return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)


def low_rank(layer, rng):
  """LoRA and LoCon: a second, narrow way past the layer."""
  down = random(rng, RANK, *layer.weight.shape[1:])
  up = random(rng, layer.weight.shape[0], RANK)
  if isinstance(layer, torch.nn.Conv2d):
    up = up[..., None, None]
  parts = {"lora_down.weight": down, "lora_up.weight": up}

  def more(x):
    return ALPHA / RANK * like(layer, like(layer, x, down), up, last=True)

  return parts | {"alpha": np.float32(ALPHA)}, more


def like(layer, x, weight, last=False):
  """The layer's own operation with other weights, without bias."""
  weight = torch.from_numpy(np.asarray(weight)).double()
  if isinstance(layer, torch.nn.Linear):
    return F.linear(x, weight.reshape(weight.shape[:2]))
  if last:
    return F.conv2d(x, weight)
  return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)


def tucker(layer, rng):
  """LoCon with a core: 1x1 in, k x k among the ranks, 1x1 out."""
  if not is_wide(layer):
    return low_rank(layer, rng)
  out, inner, *kernel = layer.weight.shape
  down = random(rng, RANK, inner, 1, 1)
  core = random(rng, RANK + 1, RANK, *kernel)
  up = random(rng, out, RANK + 1, 1, 1)
  parts = {"lora_down.weight": down, "lora_up.weight": up}
  parts |= {"lora_mid.weight": core, "alpha": np.float32(ALPHA)}

  def more(x):
    x = like(layer, like(layer, x, down, last=True), core)
    return ALPHA / RANK * like(layer, x, up, last=True)

  return parts, more


def is_wide(layer):
  return layer.weight.ndim == 4 and layer.weight.shape[-1] > 1


def loha(layer, rng):
  out, inner, *kernel = layer.weight.shape
  n = inner * int(np.prod(kernel))
  w = [random(rng, out, RANK), random(rng, RANK, n)]
  w += [random(rng, out, RANK), random(rng, RANK, n)]
  parts = dict(zip(("w1_a", "w1_b", "w2_a", "w2_b"), w, strict=True))
  t = [torch.from_numpy(x).double() for x in w]
  delta = ((t[0] @ t[1]) * (t[2] @ t[3])).reshape(layer.weight.shape)
  parts = {f"hada_{k}": v for k, v in parts.items()}
  more = lambda x: ALPHA / RANK * like(layer, x, delta)
  return parts | {"alpha": np.float32(ALPHA)}, more


def loha_tucker(layer, rng):
  if not is_wide(layer):
    return loha(layer, rng)
  out, inner, *kernel = layer.weight.shape
  parts, delta = {"alpha": np.float32(ALPHA)}, 1
  for n in "12":
    a, b = random(rng, RANK, out), random(rng, RANK, inner)
    core = random(rng, RANK, RANK, *kernel)
    parts |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b, f"hada_t{n}": core}
    # Core first along its outputs, then along its inputs.
    half = np.tensordot(a.T.astype(np.float64), core, 1)
    half = np.moveaxis(np.tensordot(half, b.astype(np.float64), (1, 0)), -1, 1)
    delta = delta * half
  return parts, lambda x: ALPHA / RANK * like(layer, x, delta)


def lokr(layer, rng, *, whole=False):
  """(W1 (x) W2) x, for vectors by their two axes; convolutions whole."""
  out, inner, *kernel = layer.weight.shape
  first = random(rng, 2, 1 if inner % 2 else 2)
  rows, columns = out // 2, inner // first.shape[1]
  if out % 2:
    return low_rank(layer, rng)
  n = columns * int(np.prod(kernel))
  parts = {"lokr_w1": first, "alpha": np.float32(ALPHA)}
  if whole:
    second, factor = random(rng, rows, columns, *kernel), 1.0
    parts["lokr_w2"] = second
  else:
    a, b = random(rng, rows, RANK), random(rng, RANK, n)
    second, factor = (a @ b).reshape(rows, columns, *kernel), ALPHA / RANK
    parts |= {"lokr_w2_a": a, "lokr_w2_b": b}

  def more(x):
    axis = -1 if isinstance(layer, torch.nn.Linear) else 1
    halves = x.chunk(first.shape[1], axis)
    seen = [like(layer, half, second) for half in halves]
    w1 = torch.from_numpy(first).double()
    mixed = [sum(w * s for w, s in zip(row, seen, strict=True)) for row in w1]
    return factor * torch.cat(mixed, axis)

  return parts, more


def lokr_whole(layer, rng):
  return lokr(layer, rng, whole=True)


def lokr_tucker(layer, rng):
  if not is_wide(layer) or layer.weight.shape[0] % 2:
    return low_rank(layer, rng)
  out, inner, *kernel = layer.weight.shape
  w1_a, w1_b = random(rng, 2, 1), random(rng, 1, 1)
  a, b = random(rng, RANK, out // 2), random(rng, RANK, inner)
  core = random(rng, RANK, RANK, *kernel)
  second = torch.einsum(
    "ijhw,io,jn->onhw", *(torch.from_numpy(x) for x in (core, a, b))
  )
  first = torch.from_numpy(w1_a @ w1_b)
  parts = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_t2": core}
  parts |= {"lokr_w2_a": a, "lokr_w2_b": b, "alpha": np.float32(ALPHA)}
  more = lambda x: torch.cat(
    [ALPHA / RANK * w * like(layer, x, second) for w in first[:, 0].double()],
    1,
  )
  return parts, more


def full(layer, rng):
  parts = {"diff": 0.3 * random(rng, *layer.weight.shape)}
  more = lambda x: like(layer, x, parts["diff"])
  if layer.bias is None:
    return parts, more
  bias = random(rng, layer.weight.shape[0])
  tail = [1] * (layer.weight.ndim - 2)
  shaped = torch.from_numpy(bias).double()
  if tail:
    shaped = shaped.reshape(-1, *tail)
  return parts | {"diff_b": bias}, lambda x: more(x) + shaped


def ia3(layer, rng):
  on_input = bool(rng.integers(2))
  axis = 1 if on_input else 0
  factor = random(rng, layer.weight.shape[axis])
  tail = [1] * (layer.weight.ndim - 2)
  shaped = torch.from_numpy(factor).double().reshape(-1, *tail)
  if not tail:
    shaped = shaped.flatten()
  weight = layer.weight.detach().numpy()
  parts = {"weight": factor, "on_input": np.array(on_input)}
  if on_input:
    return parts, lambda x: like(layer, x * shaped, weight)
  return parts, lambda x: like(layer, x, weight) * shaped


def dora(layer, rng, *, by="out", key="dora_scale"):
  """m V / |V| with the norms over each output's (or each input's) numbers."""
  parts, _ = low_rank(layer, rng)
  weight = layer.weight.detach()
  up, down = (
    torch.from_numpy(parts[f"lora_{k}.weight"]).double() for k in ("up", "down")
  )
  delta = torch.einsum("or,r...->o...", up.flatten(1), down)
  v = weight + ALPHA / RANK * delta
  other = [n for n in range(v.ndim) if n != (0 if by == "out" else 1)]
  norm = torch.linalg.vector_norm(v, dim=other, keepdim=True)
  m = rng.uniform(0.5, 1.5, norm.shape).astype(np.float32)
  delta = torch.from_numpy(m).double() * v / norm - weight
  if key == "magnitude":  # peft: a vector, for convolutions [1, out, 1, 1].
    key = "lora_magnitude_vector.weight"
    m = m.swapaxes(0, 1) if m.ndim == 4 else m.ravel()
  return parts | {key: m}, lambda x: like(layer, x, delta)


def dora_of_inputs(layer, rng):
  return dora(layer, rng, by="in")


def dora_of_peft(layer, rng):
  parts, more = dora(layer, rng, key="magnitude")
  parts["lora_A.weight"] = parts.pop("lora_down.weight")
  parts["lora_B.weight"] = parts.pop("lora_up.weight")
  return parts, more


def layers(net):
  kinds = (torch.nn.Linear, torch.nn.Conv2d)
  return {k: m for k, m in net.named_modules() if isinstance(m, kinds)}


def kohya(name):
  return "lora_unet_" + name.replace(".", "_")
