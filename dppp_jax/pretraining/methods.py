"""Which module trains what: the table that launch/pretrain.py dispatches by."""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any

from dppp_jax import errors
from dppp_jax.pretraining import (
  autoencoder,
  clip,
  controlnet,
  lora,
  matting,
  unet,
)

# (resolved configuration, run folder) -> the folder with the network, or None
# where a signal stopped the training.
Train = Callable[[Mapping[str, Any], str], pathlib.Path | None]

METHODS: dict[str, Train] = {
  "autoencoder": autoencoder.train,
  "clip_pretrain": clip.train,
  "controlnet": controlnet.train,
  "lora": lora.train,
  "matting": matting.train,
  "unet": unet.train,
}


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Trains what `config["method"]` names.

  Args:
    config: the resolved configuration as a nested dict.
    workdir: run folder.

  Returns:
    The folder with the network, its card in README.md; None where a signal
    stopped the training.

  Raises:
    errors.UserError: no such method, or see the method.
  """
  method = METHODS.get(config.get("method"))
  if method is None:
    raise errors.UserError(
      f"config method {config.get('method')!r}: choose"
      f" {', '.join(sorted(METHODS))}"
    )
  return method(config, workdir)
