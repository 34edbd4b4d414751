"""Random CLIPs in torch: transformers' classes, and OpenAI's layout.

Both are oracles: what they compute does not depend on a line of the package.
"""

import torch
import transformers


def hf_config(**changes):
  """Returns a tiny CLIPConfig; changes are {"text"|"vision": {...}, ...}."""
  text = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "bos_token_id": 58,
    "eos_token_id": 59,
  }
  vision = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
  }
  return transformers.CLIPConfig(
    text_config=text | changes.pop("text", {}),
    vision_config=vision | changes.pop("vision", {}),
    **{"projection_dim": 20} | changes,
  )


def randomise(module, seed=0):
  """Gives every parameter, norms and biases too, numbers that matter."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      is_norm = "norm" in name or ".ln_" in name or name.startswith("ln_")
      offset = 1.0 if is_norm and name.endswith("weight") else 0.0
      parameter.copy_(offset + 0.3 * noise)
  return module.eval()


def save(module, folder, **kwargs):
  """Writes what transformers writes, and returns the module in float64."""
  randomise(module).save_pretrained(folder, **kwargs)
  return module.double()


class _QuickGelu(torch.nn.Module):
  def forward(self, x):
    return x * torch.sigmoid(1.702 * x)


class _Block(torch.nn.Module):
  def __init__(self, width, heads, act):
    super().__init__()
    self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    self.ln_1 = torch.nn.LayerNorm(width)
    self.mlp = torch.nn.Sequential()
    self.mlp.add_module("c_fc", torch.nn.Linear(width, 4 * width))
    self.mlp.add_module("act", act())
    self.mlp.add_module("c_proj", torch.nn.Linear(4 * width, width))
    self.ln_2 = torch.nn.LayerNorm(width)

  def forward(self, x, mask):
    y = self.ln_1(x)
    x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
    return x + self.mlp(self.ln_2(x))


class _Transformer(torch.nn.Module):
  def __init__(self, width, depth, heads, act):
    super().__init__()
    self.resblocks = torch.nn.ModuleList(
      _Block(width, heads, act) for _ in range(depth)
    )

  def forward(self, x, mask=None):
    for block in self.resblocks:
      x = block(x, mask)
    return x


class _Visual(torch.nn.Module):
  def __init__(self, width, depth, patch, grid, out, act):
    super().__init__()
    p = lambda *shape: torch.nn.Parameter(torch.empty(shape))
    self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
    self.class_embedding = p(width)
    self.positional_embedding = p(grid**2 + 1, width)
    self.ln_pre = torch.nn.LayerNorm(width)
    self.transformer = _Transformer(width, depth, width // 64, act)
    self.ln_post = torch.nn.LayerNorm(width)
    self.proj = p(width, out)

  def forward(self, x):
    x = self.conv1(x).flatten(2).transpose(1, 2)
    cls = self.class_embedding.expand(len(x), 1, -1)
    x = torch.cat([cls, x], 1) + self.positional_embedding
    x = self.transformer(self.ln_pre(x))
    return self.ln_post(x[:, 0]) @ self.proj


class OpenAIClip(torch.nn.Module):
  """A CLIP with OpenAI's names, on torch's own MultiheadAttention."""

  def __init__(self, *, act="quick_gelu", vocab=60, length=16, out=20):
    super().__init__()
    act = {"quick_gelu": _QuickGelu, "gelu": torch.nn.GELU}[act]
    p = lambda *shape: torch.nn.Parameter(torch.empty(shape))
    self.visual = _Visual(128, 2, 8, 4, out, act)
    self.token_embedding = torch.nn.Embedding(vocab, 64)
    self.positional_embedding = p(length, 64)
    self.transformer = _Transformer(64, 2, 1, act)
    self.ln_final = torch.nn.LayerNorm(64)
    self.text_projection = p(64, out)
    self.logit_scale = p()
    randomise(self)

  def text(self, ids):
    x = self.token_embedding(ids)
    n = x.shape[1]
    x = x + self.positional_embedding[:n]
    mask = torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)
    x = self.ln_final(self.transformer(x, mask))
    return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection
