"""What sits on a feature while it is trained: BNNeck, and DPPP's projector."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import layers


def linear(
  given: int,
  features: int,
  *,
  use_bias: bool = True,
  dtype: jax.typing.DTypeLike = jnp.float32,
  name: str | None = None,
) -> layers.Linear:
  """Returns a linear layer that begins as torch.nn.Linear does.

  Kernel and bias are U(-1/sqrt(D), 1/sqrt(D)): a third of the variance of
  flax's default. Three of them bring a CLIP feature to the scale of token
  embeddings, where pseudo-words have to live.

  Args:
    given: input width D.
    features: output width.
    use_bias: whether there is a bias.
    dtype: of the matrix product.
    name: of the parameters.
  """
  bound = 1 / math.sqrt(given)

  def uniform(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return layers.Linear(
    given,
    features,
    use_bias=use_bias,
    kernel_init=uniform,
    bias_init=uniform,
    dtype=dtype,
    name=name,
  )


class BatchNorm(nn.Module):
  """torch.nn.BatchNorm1d: flax's running variance is the biased one.

  Statistics are the collection "batch_stats" (mean, var), which is only
  written where it is mutable. Computes in float32 or wider.

  Attributes:
    use_bias: whether there is a learned shift.
    momentum: share of the old running statistics (torch's 1 - momentum).
    epsilon: added to the variance.
  """

  use_bias: bool = True
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: types.Array, *, train: bool) -> jax.Array:
    """Normalises x [B, D] by the batch (train) or by running statistics."""
    width = x.shape[-1]
    x = x.astype(layers.stream_dtype(x.dtype))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
    var = self.variable("batch_stats", "var", jnp.ones, (width,))
    scale = self.param("scale", nn.initializers.ones, (width,))
    if train:
      batch_mean = x.mean(0)
      batch_var = jnp.square(x - batch_mean[None]).mean(0)
      if not self.is_initializing() and self.is_mutable_collection(
        "batch_stats"
      ):
        size = x.shape[0]
        unbiased = batch_var * (size / max(size - 1, 1))
        keep = self.momentum
        mean.value = keep * mean.value + (1 - keep) * batch_mean
        var.value = keep * var.value + (1 - keep) * unbiased
    else:
      batch_mean, batch_var = mean.value, var.value
    y = (x - batch_mean[None]) * jax.lax.rsqrt(batch_var + self.epsilon)[None]
    y = y * scale[None]
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (width,))[None]
    return y


class BNNeck(nn.Module):
  """Batch normalisation without a shift, then a classifier without a bias.

  The triplet loss pulls at the feature before it, the identity loss at the
  normalised one. Both layers compute in float32, whatever the encoder does.

  Attributes:
    num_classes: number of identities K.
  """

  num_classes: int

  @nn.compact
  def __call__(
    self, x: types.Array, *, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (normalised feature [B, D], logits [B, K]) for x [B, D]."""
    x = BatchNorm(use_bias=False, name="norm")(x, train=train)
    logits = nn.Dense(
      self.num_classes,
      use_bias=False,
      kernel_init=nn.initializers.normal(0.001),
      name="classifier",
    )(x)
    return x, logits


class Projector(nn.Module):
  """DPPP's de-stylisation projector P_s (Eq. 14): two linear layers.

  Attributes:
    features: output width (512: the width of v_g).
    hidden: width between the two layers.
    act: activation between them.
    residual: add the input to the output; the widths must then agree.
    dtype: of the matrix products.
  """

  features: int
  hidden: int = 512
  act: str = "relu"
  residual: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns v_c [*b, features] for v_g [*b, D]."""
    y = linear(x.shape[-1], self.hidden, dtype=self.dtype, name="fc1")(x)
    y = layers.activation(self.act)(y)
    y = linear(self.hidden, self.features, dtype=self.dtype, name="fc2")(y)
    return x.astype(y.dtype) + y if self.residual else y
