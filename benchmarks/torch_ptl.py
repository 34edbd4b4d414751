"""DPPP's first stage in PyTorch, to measure against: the same mathematics.

The towers are transformers' CLIP. Inversion networks, heads and losses are
written here as a PyTorch user would write them, from the equations; `Side` is
a training step of it all, with what makes PyTorch fast: scaled dot-product
attention, fused Adam, autocast on a GPU, torch.compile as a variant.
"""

from collections.abc import Mapping, Sequence
import os
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional
import transformers

_LENGTH = 77  # What CLIP pads all prompts to, and CLIP-ReID with it.


class Mlp3(torch.nn.Module):
  """f_theta and f_phi: three linear layers."""

  def __init__(self, given: int, hidden: int, out: int, act: Any):
    super().__init__()
    self.fc1 = torch.nn.Linear(given, hidden)
    self.fc2 = torch.nn.Linear(hidden, hidden)
    self.fc3 = torch.nn.Linear(hidden, out)
    self.act = act

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns [..., out] for x [..., given]."""
    return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


class StyleLayer(torch.nn.Module):
  """A pre-norm transformer layer with ReLU."""

  def __init__(self, width: int, heads: int, hidden: int):
    super().__init__()
    self.heads = heads
    self.layer_norm1 = torch.nn.LayerNorm(width)
    self.q_proj = torch.nn.Linear(width, width, bias=False)
    self.k_proj = torch.nn.Linear(width, width, bias=False)
    self.v_proj = torch.nn.Linear(width, width, bias=False)
    self.out_proj = torch.nn.Linear(width, width)
    self.layer_norm2 = torch.nn.LayerNorm(width)
    self.fc1 = torch.nn.Linear(width, hidden)
    self.fc2 = torch.nn.Linear(hidden, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns [B, N, D] for x [B, N, D]."""
    split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    y = self.layer_norm1(x)
    y = functional.scaled_dot_product_attention(
      split(self.q_proj(y)), split(self.k_proj(y)), split(self.v_proj(y))
    )
    x = x + self.out_proj(y.transpose(1, 2).flatten(2))
    return x + self.fc2(functional.relu(self.fc1(self.layer_norm2(x))))


class Style(torch.nn.Module):
  """Gathers style features from patches and keeps the best (Eq. 2 to 4)."""

  def __init__(self, width: int, out: int, options: Any):
    super().__init__()
    self.kept = options.num_selected
    self.depth = options.style_layers
    self.tokens = torch.nn.Parameter(torch.empty(options.num_styles, width))
    hidden = options.style_mlp_ratio * width
    for i in range(self.depth):
      layer = StyleLayer(width, options.style_heads, hidden)
      self.add_module(f"layers_{i}", layer)
    self.fc = torch.nn.Linear(width, out)

  def forward(self, patches: torch.Tensor, v_g: torch.Tensor) -> torch.Tensor:
    """Returns [B, k, E] for patches [B, P, D] and v_g [B, E]."""
    count = len(self.tokens)
    tokens = self.tokens.expand(len(patches), -1, -1)
    x = torch.cat([tokens, patches], dim=1)
    for i in range(self.depth):
      x = self.get_submodule(f"layers_{i}")(x)
    x = self.fc(x[:, :count])
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
      scores = (x.float() * v_g.float()[:, None]).sum(-1)
      best = scores.topk(self.kept, dim=1).indices
    return x.gather(1, best[:, :, None].expand(-1, -1, x.shape[-1]))


class Neck(torch.nn.Module):
  """Batch normalisation without a shift, and a classifier without a bias."""

  def __init__(self, width: int, num_classes: int):
    super().__init__()
    self.norm = torch.nn.BatchNorm1d(width)
    self.norm.bias.requires_grad_(False)
    self.classifier = torch.nn.Linear(width, num_classes, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns logits [B, K] for x [B, D]."""
    return self.classifier(self.norm(x))


class Ptl(torch.nn.Module):
  """All networks of PTL, and its loss (Eq. 13), at the paper's options.

  Attributes:
    clip: a transformers.CLIPModel, whose text tower is frozen here.
    options: `dppp.Options`, of which the sizes are read.
    num_classes: of the two classifiers.
    templates: (style and content, content) prompts.
  """

  def __init__(
    self,
    clip: transformers.CLIPModel,
    options: Any,
    num_classes: int,
    templates: Sequence[Any],
  ):
    super().__init__()
    word, width = clip.text_embed_dim, clip.vision_embed_dim
    out = clip.projection_dim
    self.clip, self.options, self.templates = clip, options, templates
    for part in (clip.text_model, clip.text_projection):
      part.requires_grad_(False)
    clip.logit_scale.requires_grad_(False)
    self.content_inversion = Mlp3(
      out, options.content_hidden, word, functional.relu
    )
    self.style = Style(width, out, options)
    self.style_inversion = Mlp3(
      out, options.style_hidden, word, functional.gelu
    )
    self.neck_cls = Neck(width, num_classes)
    self.neck_projected = Neck(out, num_classes)
    longest = clip.text_model.config.max_position_embeddings
    for i, template in enumerate(templates):
      ids = torch.full((min(_LENGTH, longest),), template.ids[-1])
      ids[: len(template.ids)] = torch.tensor(template.ids)
      self.register_buffer(f"ids_{i}", ids, persistent=False)

  def load_new(self, params: Mapping[str, np.ndarray]) -> None:
    """Copies {"style/fc/kernel": array ...} into all but the CLIP."""
    own = {
      name: p
      for name, p in self.named_parameters()
      if not name.startswith("clip.") and p.requires_grad
    }
    given = {}
    for name, value in params.items():
      name = name.replace("/", ".").replace(".kernel", ".weight")
      name = name.replace(".scale", ".weight")
      is_matrix = name.endswith(".weight") and value.ndim == 2
      given[name] = np.ascontiguousarray(value.T if is_matrix else value)
    if own.keys() != given.keys():
      raise ValueError(
        f"parameters differ: {sorted(own.keys() ^ given.keys())}"
      )
    with torch.no_grad():
      for name, parameter in own.items():
        parameter.copy_(torch.tensor(given[name]))

  def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns class tokens of blocks L-1 and L, v_g, and patches of L-1."""
    tower = self.clip.vision_model
    embeddings = tower.embeddings
    x = embeddings.patch_embedding(images)
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    table = embeddings.position_embedding.weight
    side = round((len(table) - 1) ** 0.5)
    square = table[1:].T.reshape(1, -1, side, side)
    square = functional.interpolate(
      square, tuple(grid), mode="bilinear", align_corners=False
    )
    positions = torch.cat([table[:1], square[0].flatten(1).T])
    cls = embeddings.class_embedding.expand(len(x), 1, -1)
    x = tower.pre_layrnorm(torch.cat([cls, x], dim=1) + positions)
    for layer in tower.encoder.layers:
      before, x = x, layer(x, None)
    cls = tower.post_layernorm(x[:, 0])
    v_g = self.clip.visual_projection(cls)
    return before[:, 0], cls, v_g, before[:, 1:]

  def read(self, number: int, words: torch.Tensor, pad: bool) -> torch.Tensor:
    """Returns text features [B, E] of a prompt with words [B, S, D]."""
    template, tower = self.templates[number], self.clip.text_model
    ids = self.get_buffer(f"ids_{number}")
    ids = ids if pad else ids[: len(template.ids)]
    table = tower.embeddings.token_embedding
    pieces, end = [], 0
    for i, slot in enumerate(template.slots):
      pieces.append(table(ids[end:slot]).expand(len(words), -1, -1))
      pieces.append(words[:, i : i + 1])
      end = slot + 1
    pieces.append(table(ids[end:]).expand(len(words), -1, -1))
    x = tower.embeddings(inputs_embeds=torch.cat(pieces, dim=1))
    x = tower.encoder(
      inputs_embeds=x, attention_mask=None, is_causal=True
    ).last_hidden_state
    x = tower.final_layer_norm(x[:, template.eot])
    return self.clip.text_projection(x)

  def forward(
    self, images: torch.Tensor, labels: torch.Tensor, pad: bool
  ) -> torch.Tensor:
    """Returns L_PTL for uint8 images [B, H, W, 3] and labels int [B]."""
    images = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    penultimate, cls, v_g, patches = self.encode_images(images)
    logits = (self.neck_cls(cls), self.neck_projected(v_g))
    content = self.content_inversion(v_g)[:, None]
    styles = self.style_inversion(self.style(patches, v_g))
    words = torch.cat([styles, content], dim=1)
    text = self.read(0, words, pad)
    text_content = self.read(1, content, pad)
    options = self.options
    with torch.autocast(images.device.type, enabled=False):
      wide = lambda x: x.float()
      id_loss = sum(
        functional.cross_entropy(
          wide(x), labels, label_smoothing=options.label_smoothing
        )
        for x in logits
      )
      tri_img = sum(
        triplet(wide(x), labels, options.margin, False)
        for x in (penultimate, cls, v_g)
      )
      sup_con = symmetric_sup_con(wide(v_g), wide(text), labels)
      tri_txt = triplet(
        wide(text_content), labels, options.text_margin, options.text_squared
      )
      return sup_con + tri_img + options.id_weight * id_loss + tri_txt


def symmetric_sup_con(
  a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
  """Eq. 6 with dot products and tau 1, for features [B, E]."""
  same = (labels[:, None] == labels[None]).float()
  same = same / same.sum(1, keepdim=True)
  logits = a @ b.T
  forth = -(same * logits.log_softmax(1)).sum(1).mean()
  return forth - (same * logits.T.log_softmax(1)).sum(1).mean()


def triplet(
  x: torch.Tensor, labels: torch.Tensor, margin: float, squared: bool
) -> torch.Tensor:
  """Batch-hard triplets (Eq. 9, 11) of x [B, D]; P and K are above 1."""
  same = labels[:, None] == labels[None]
  with torch.no_grad():
    y = x - x.mean(0)
    squares = (y * y).sum(1)
    distances = squares[:, None] + squares[None] - 2 * y @ y.T
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    hide = lambda mask, value: distances.masked_fill(mask, value)
    positive = hide(~same | itself, -torch.inf).argmax(1)
    negative = hide(same, torch.inf).argmin(1)

  def distance(other):
    found = (x - other).square().sum(1)
    return found if squared else found.clamp(min=1e-12).sqrt()

  gap = distance(x[positive]) - distance(x[negative])
  return functional.relu(gap + margin).mean()


class Side:
  """PyTorch's training step, in the variants that a user may choose from.

  A variant is a text that holds "77" where prompts are padded, and "compiled"
  for torch.compile.
  """

  def __init__(
    self,
    folder: str,
    new: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    setting: Any,
  ):
    """Loads the CLIP in `folder`, and the new modules' parameters.

    Args:
      folder: in the Hugging Face layout.
      new: of `ptl.Side.new_modules`.
      batch: of `ptl.Setting.batch`.
      setting: `ptl.Setting`.
    """
    if setting.gpu and not torch.cuda.is_available():
      raise RuntimeError(f"torch {torch.__version__} has no CUDA device here")
    torch.set_num_threads(os.cpu_count() or 1)
    self.device = torch.device("cuda" if setting.gpu else "cpu")
    clip = transformers.CLIPModel.from_pretrained(
      folder, attn_implementation="sdpa"
    )
    self._model = Ptl(
      clip, setting.options, setting.num_classes, setting.templates
    )
    self._model.load_new(new)
    self._model.to(self.device).train()
    put = lambda x, dtype: torch.tensor(x, dtype=dtype, device=self.device)
    self._images = put(batch["image"], torch.uint8)
    self._labels = put(batch["label"], torch.int64)
    self._optimiser = self._adam(setting.options)
    self.bfloat16 = setting.gpu
    self._compiled = None

  def _adam(self, options: Any) -> torch.optim.Optimizer:
    groups: dict[float, list[torch.Tensor]] = {}
    for name, parameter in self._model.named_parameters():
      if not parameter.requires_grad:
        continue
      lr = options.encoder_lr if name.startswith("clip.") else options.new_lr
      if name.endswith("bias"):
        lr *= options.bias_lr_multiplier
      groups.setdefault(lr, []).append(parameter)
    return torch.optim.Adam(
      [{"params": params, "lr": lr} for lr, params in groups.items()],
      weight_decay=options.weight_decay,
      fused=True,
    )

  def step(
    self, variant: str, *, bfloat16: bool | None = None
  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one step; returns its loss and gradient norm, on the device."""
    model = self._model
    if "compiled" in variant:
      if self._compiled is None:  # Its truth would be asked of a length.
        self._compiled = torch.compile(model)
      model = self._compiled
    use = self.bfloat16 if bfloat16 is None else bfloat16
    with torch.autocast(self.device.type, torch.bfloat16, enabled=use):
      loss = model(self._images, self._labels, "77" in variant)
    self._optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.get_total_norm(
      [p.grad for p in self._model.parameters() if p.grad is not None]
    )
    self._optimiser.step()
    return loss.detach(), norm

  def check(self, variant: str, steps: int) -> list[tuple[float, float]]:
    """Returns (loss, gradient norm) of the first steps, in float32."""
    made = (self.step(variant, bfloat16=False) for _ in range(steps))
    return [(loss.item(), norm.item()) for loss, norm in made]

  def prepare(self, variant: str) -> float:
    """Runs a step; returns its seconds, compilation included."""
    return self.time(variant, 1)[0]

  def time(self, variant: str, steps: int) -> tuple[float, float]:
    """Returns seconds and seconds of CPU time per step."""
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
      self.step(variant)
    self._wait()
    seconds = time.perf_counter() - begin
    return seconds / steps, (time.process_time() - cpu) / steps

  def matmul_flops(self, size: int = 2048, repeats: int = 5) -> float:
    """Returns FLOP/s of a square float32 product, the best of some."""
    a = torch.randn(size, size, device=self.device)
    seconds = []
    for _ in range(repeats):
      begin = time.perf_counter()
      a @ a
      self._wait()
      seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)

  def device_name(self) -> str:
    """Returns what runs the steps."""
    if self.device.type == "cpu":
      return "cpu"
    return torch.cuda.get_device_name(self.device)

  def device_memory(self) -> int | None:
    """Returns the most bytes that tensors took on a GPU so far."""
    if self.device.type != "cuda":
      return None
    return torch.cuda.max_memory_allocated()

  def _wait(self) -> None:
    if self.device.type == "cuda":
      torch.cuda.synchronize()
