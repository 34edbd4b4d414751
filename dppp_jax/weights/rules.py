"""The tables of CLIP's checkpoints: Hugging Face's names and OpenAI's."""

from dppp_jax.weights import convert

Rule = convert.Rule


def hf_clip() -> list[Rule]:
  """Returns the table of transformers' CLIPModel."""
  return [
    *hf_text(),
    *hf_vision(),
    Rule("logit_scale", "logit_scale", convert.SCALAR),
  ]


def hf_text(prefix: str = "text_model.") -> list[Rule]:
  """Returns the table of a text tower, with or without projection.

  Args:
    prefix: before the names of the tower; empty in what transformers 5 writes
      for a CLIPTextModel.
  """
  return [
    # Early files saved this buffer, 0..76, as if it were a weight.
    Rule(prefix + "embeddings.position_ids", None),
    Rule(
      prefix + "embeddings.{table:token|position}_embedding.weight",
      "text_model/embeddings/{table}_embedding/embedding",
    ),
    *_hf_encoder(prefix, "text_model/"),
    *_norm(prefix + "final_layer_norm", "text_model/final_layer_norm"),
    Rule("text_projection.weight", "text_projection/kernel", convert.LINEAR),
  ]


def hf_vision(prefix: str = "vision_model.") -> list[Rule]:
  """Returns the table of a vision tower, with or without projection."""
  return [
    Rule(prefix + "embeddings.position_ids", None),
    Rule(
      prefix + "embeddings.class_embedding",
      "vision_model/embeddings/class_embedding",
    ),
    Rule(
      prefix + "embeddings.patch_embedding.weight",
      "vision_model/embeddings/patch_embedding/kernel",
      convert.CONV,
    ),
    Rule(
      prefix + "embeddings.position_embedding.weight",
      "vision_model/embeddings/position_embedding/embedding",
    ),
    *_norm(prefix + "pre_layrnorm", "vision_model/pre_layrnorm"),
    *_hf_encoder(prefix, "vision_model/"),
    *_norm(prefix + "post_layernorm", "vision_model/post_layernorm"),
    Rule(
      "visual_projection.weight", "visual_projection/kernel", convert.LINEAR
    ),
  ]


def openai_clip(text_prefix: str = "") -> list[Rule]:
  """Returns the table of OpenAI's files and of OpenCLIP's.

  Args:
    text_prefix: before the names of the text tower; "text." in OpenCLIP's
      models with a text tower of its own.
  """
  return [
    # Numbers that OpenAI's archives carry, and a mask that older OpenCLIP
    # versions saved.
    Rule("{size:input_resolution|context_length|vocab_size}", None),
    Rule(text_prefix + "attn_mask", None),
    *openai_text(text_prefix),
    Rule(
      "visual.conv1.weight", _vision("patch_embedding/kernel"), convert.CONV
    ),
    Rule("visual.class_embedding", _vision("class_embedding")),
    Rule(
      "visual.positional_embedding", _vision("position_embedding/embedding")
    ),
    *_norm("visual.ln_pre", "vision_model/pre_layrnorm"),
    *_openai_encoder("visual.", "vision_model/"),
    *_norm("visual.ln_post", "vision_model/post_layernorm"),
    # Both projections are stored as OpenAI multiplies them: x @ projection.
    Rule("visual.proj", "visual_projection/kernel"),
    Rule("logit_scale", "logit_scale", convert.SCALAR),
  ]


def openai_text(prefix: str = "") -> list[Rule]:
  """Returns the table of OpenAI's text tower, also SDXL's second one."""
  return [
    Rule(
      prefix + "token_embedding.weight",
      "text_model/embeddings/token_embedding/embedding",
    ),
    Rule(
      prefix + "positional_embedding",
      "text_model/embeddings/position_embedding/embedding",
    ),
    *_openai_encoder(prefix, "text_model/"),
    *_norm(prefix + "ln_final", "text_model/final_layer_norm"),
    Rule(prefix + "text_projection", "text_projection/kernel"),
  ]


def _vision(name: str) -> str:
  return f"vision_model/embeddings/{name}"


def _norm(source: str, target: str) -> list[Rule]:
  return [
    Rule(source + ".weight", target + "/scale"),
    Rule(source + ".bias", target + "/bias"),
  ]


def _hf_encoder(source: str, target: str) -> list[Rule]:
  source += "encoder.layers.{i}."
  target += "encoder/layers_{i}/"
  linear = "{part:self_attn|mlp}.{name:q_proj|k_proj|v_proj|out_proj|fc1|fc2}"
  return [
    Rule(
      f"{source}{linear}.weight",
      f"{target}{{part}}/{{name}}/kernel",
      convert.LINEAR,
    ),
    Rule(f"{source}{linear}.bias", f"{target}{{part}}/{{name}}/bias"),
    *_norm(source + "layer_norm{n:1|2}", target + "layer_norm{n}"),
  ]


def _openai_encoder(source: str, target: str) -> list[Rule]:
  source += "transformer.resblocks.{i}."
  target += "encoder/layers_{i}/"
  fused = lambda leaf: tuple(
    f"{target}self_attn/{name}_proj/{leaf}" for name in "qkv"
  )
  linear = lambda a, b: [
    Rule(f"{source}{a}.weight", f"{target}{b}/kernel", convert.LINEAR),
    Rule(f"{source}{a}.bias", f"{target}{b}/bias"),
  ]
  return [
    Rule(
      source + "attn.in_proj_weight",
      fused("kernel"),
      convert.split(3, convert.LINEAR),
    ),
    Rule(
      source + "attn.in_proj_bias",
      fused("bias"),
      convert.split(3, convert.SAME),
    ),
    *linear("attn.out_proj", "self_attn/out_proj"),
    *linear("mlp.c_fc", "mlp/fc1"),
    *linear("mlp.c_proj", "mlp/fc2"),
    *_norm(source + "ln_{n:1|2}", target + "layer_norm{n}"),
  ]
