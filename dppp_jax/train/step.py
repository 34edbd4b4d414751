"""One pure step of a stage: gather, augment, differentiate, update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dppp_jax import devices, rngs, trees
from dppp_jax.data import transforms
from dppp_jax.train import optim
from dppp_jax.train import stage as stage_lib


def make_step(
  stage: stage_lib.Stage,
  rates: Mapping[str, float],
  *,
  seed: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> tuple[Callable[..., Any], list[str]]:
  """Builds the pure step of a stage.

  Args:
    stage: what is trained.
    rates: {name: lr} of the trainable parameters.
    seed: of the stage's random streams.
    mean: normalisation of a stage without augmentation.
    std: likewise.

  Returns:
    A function (state, frozen, dataset, feed, step, factor) -> (state, metrics
    [M] float32), and a list that its tracing fills with the M names. `state`
    is (trainable {name: leaf}, collections, opt) and may be donated; `dataset`
    holds per-example arrays that are gathered by feed["index"].
  """
  tx = make_tx(stage, rates)
  names: list[str] = []

  def loss_fn(trainable, frozen, collections, batch, key):
    params = trees.unflatten({**trainable, **frozen})
    loss, aux = stage.loss(params, collections, batch, key)
    return loss.astype(jnp.float32), aux

  def step_fn(state, frozen, dataset, feed, step, factor):
    trainable, collections, opt = state
    collections = dict(collections)
    average = collections.pop("ema", None)  # Not the loss' business.
    root = jax.random.key(seed)
    key = rngs.at_step(rngs.stream(root, stage.name), step)
    batch = {k: x[feed["index"]] for k, x in dataset.items()} | dict(feed)
    pictures = batch.get("image")
    if pictures is None:  # The stage's extras are all there is.
      pass
    elif stage.augment is None:
      batch["image"] = transforms.normalize(pictures, mean=mean, std=std)
    else:
      batch["image"] = transforms.augment(
        pictures, rngs.stream(key, "augment"), stage.augment
      )
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads = grad_fn(
      trainable, frozen, collections, batch, rngs.stream(key, "loss")
    )
    updates, opt = tx.update(grads, opt, trainable)
    norm = optim.norm(grads)
    metrics = {"loss": loss, **aux.metrics, "grad_norm": norm}
    names[:] = metrics
    values = jnp.stack([jnp.asarray(x, jnp.float32) for x in metrics.values()])
    trainable = optim.apply(trainable, updates, factor)
    collections = dict(aux.collections)
    if stage.ema is not None:
      collections["ema"] = optim.average(
        average, trainable, decay=stage.ema, step=step
      )
    return (trainable, collections, opt), values

  return step_fn, names


def compile_ahead(step_fn: Callable[..., Any], *arguments: Any) -> Any:
  """Compiles a step for arguments like these; its state is donated.

  XLA's CPU backend would copy each parameter at the start of a step: it does
  not see, unless it is told to look, that the last reading of a parameter
  comes before its update. For a ViT-B/16 that is half a gigabyte.

  Args:
    step_fn: of `make_step`.
    *arguments: of `step_fn`.

  Returns:
    The compiled function of the same arguments.
  """
  options = None
  if devices.platform() == "cpu":
    options = {"xla_cpu_copy_insertion_use_region_analysis": True}
  return (
    jax.jit(step_fn, donate_argnums=0, compiler_options=options)
    .lower(*arguments)
    .compile()
  )


def make_tx(
  stage: stage_lib.Stage, rates: Mapping[str, float]
) -> optax.GradientTransformation:
  """Returns the optimiser of a stage's trainable parameters."""
  return optim.make(
    rates,
    weight_decay=stage.weight_decay,
    decoupled=stage.decoupled,
    muon=stage.muon,
    bias_lr_multiplier=stage.bias_lr_multiplier,
    clip_norm=stage.clip_norm,
  )
