"""Scaled dot-product attention, and the ways to compute it with less work."""

import functools

import jax
import jax.numpy as jnp

from dppp_jax import devices, types
from dppp_jax.models import layers

_HALVED_FROM = 1 << 22  # Multiplications of one product, in the whole stack.


def dot_product(
  query: types.Array,
  key: types.Array,
  value: types.Array,
  *,
  causal: bool = False,
  mask: types.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention, softmax in float32 or wider.

  Args:
    query: [B, N, heads, d].
    key: [B, M, heads, d].
    value: [B, M, heads, d].
    causal: row i sees columns 0..i only.
    mask: bool [B or 1, N, M], True where a row may look; not with `causal`.

  Returns:
    [B, N, heads, d] in the dtype of `value`.
  """
  if _has_flash_kernel(query, mask):
    return fused(query, key, value, causal)
  if not _is_halved(query, key):
    return _of_heads(query, key, value, causal, mask)
  halve = lambda x: jnp.split(x, [query.shape[0] // 2])
  masks = (mask, mask)
  if mask is not None and mask.shape[0] > 1:
    masks = halve(mask)
  halves = zip(*map(halve, (query, key, value)), masks, strict=True)
  return jnp.concatenate(
    [_of_heads(q, k, v, causal, m) for q, k, v, m in halves]
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused(
  query: types.Array,
  key: types.Array,
  value: types.Array,
  causal: bool,
  implementation: str = "cudnn",
) -> jax.Array:
  """`dot_product` by a kernel of JAX's that keeps no logits.

  JAX refuses to differentiate cuDNN's attention at odd lengths, PTL's 129
  among them: it takes the bias that is not there for one. For the gradient the
  rows are padded to even counts, and the kernel is told how many it may see.

  Args:
    query: [B, N, heads, d].
    key: [B, M, heads, d].
    value: [B, M, heads, d].
    causal: row i sees columns 0..i only.
    implementation: "cudnn", or "xla", which computes the same on any device
      (for tests).

  Returns:
    [B, N, heads, d].
  """
  return jax.nn.dot_product_attention(
    query, key, value, is_causal=causal, implementation=implementation
  )


def _fused_forward(query, key, value, causal, implementation):
  def padded(query, key, value):
    n, m = query.shape[1], key.shape[1]
    lengths = {}
    if n % 2 or m % 2:
      query, key, value = map(_to_even, (query, key, value))
      lengths = {
        "query_seq_lengths": jnp.full(len(query), n, jnp.int32),
        "key_value_seq_lengths": jnp.full(len(query), m, jnp.int32),
      }
    y = jax.nn.dot_product_attention(
      query,
      key,
      value,
      is_causal=causal,
      implementation=implementation,
      **lengths,
    )
    return y[:, :n]

  return jax.vjp(padded, query, key, value)


def _fused_backward(causal, implementation, gradients, dy):
  del causal, implementation
  return gradients(dy)


fused.defvjp(_fused_forward, _fused_backward)


def _to_even(x: types.Array) -> jax.Array:
  """Pads the rows of [B, N, heads, d] with zeros to an even count."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def _of_heads(
  query: types.Array,
  key: types.Array,
  value: types.Array,
  causal: bool,
  mask: types.Array | None,
) -> jax.Array:
  """`dot_product`, one product of matrices for each example and head."""
  # Heads before rows: XLA's CPU backend multiplies such stacks of matrices
  # without a detour.
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  logits = _wide_product(
    "bhnd,bhmd->bhnm", query * query.shape[-1] ** -0.5, key
  )
  if causal:
    n, m = logits.shape[-2:]
    mask = jnp.tril(jnp.ones((n, m), bool))[None]
  weights, total = _exponentials(logits, mask)
  y = (weights.astype(value.dtype) @ value) / total
  return jnp.swapaxes(y.astype(value.dtype), 1, 2)


def of_linear(
  query: types.Array,
  x: types.Array,
  key: layers.Linear,
  value: layers.Linear,
  *,
  causal: bool = False,
  mask: types.Array | None = None,
) -> jax.Array:
  """`dot_product` with the keys key(x) and the values value(x).

  Where few rows ask, neither is computed: for keys X K and values X V,

      q (X K)^T = (q K^T) X^T    and    w (X V) = (w X) V,

  whose products with K and V have the rows of the queries and not those of X.
  The bias of the keys adds the same to all logits of a row, which a softmax
  does not see; that of the values passes through, since weights sum to one.

  Args:
    query: [B, R, heads, d].
    x: [B, N, D].
    key: gives heads * d features.
    value: likewise.
    causal: as in `dot_product`.
    mask: as in `dot_product`.

  Returns:
    [B, R, heads, d] in the dtype of `value`.
  """
  _, rows, heads, d = query.shape
  n, width = x.shape[1:]
  # Multiplications a head's channel and example, without what both ways share.
  asked_first = rows * (width + n * width / d)
  if causal or asked_first >= n * (width + rows):
    split = lambda y: y.reshape(*y.shape[:-1], heads, d)
    return dot_product(
      query, split(key(x)), split(value(x)), causal=causal, mask=mask
    )
  x = x.astype(value.dtype)
  of_heads = lambda linear: linear.kernel.astype(x.dtype).reshape(-1, heads, d)
  asked = jnp.einsum("brhd,Dhd->bhrD", query * d**-0.5, of_heads(key))
  logits = _wide_product("bhrD,bnD->bhrn", asked, x)
  weights, total = _exponentials(logits, mask)
  weights = (weights / total).astype(x.dtype)  # x has more columns than rows.
  seen = jnp.einsum("bhrn,bnD->bhrD", weights, x)
  y = jnp.einsum("bhrD,Dhd->brhd", seen, of_heads(value))
  if value.bias is not None:
    y += value.bias.astype(y.dtype).reshape(1, 1, heads, d)
  return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_product(subscripts: str, a: types.Array, b: types.Array) -> jax.Array:
  """`jnp.einsum` of two arrays of one dtype, in float32 or wider.

  The derivative that JAX finds multiplies in float32 as well. Here its
  products are those of the operands' dtype.
  """
  return jnp.einsum(
    subscripts, a, b, preferred_element_type=layers.stream_dtype(a.dtype)
  )


def _wide_product_forward(subscripts, a, b):
  return _wide_product(subscripts, a, b), (a, b)


def _wide_product_backward(subscripts, saved, dy):
  _, gradients = jax.vjp(functools.partial(jnp.einsum, subscripts), *saved)
  return gradients(dy.astype(saved[0].dtype))


_wide_product.defvjp(_wide_product_forward, _wide_product_backward)


def _exponentials(
  logits: jax.Array, mask: types.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Returns a softmax and what it is still to be divided by.

  After the product with a head's values there is less to divide, and the
  gradient of the division needs no pass over all logits.

  Args:
    logits: [B, heads, N, M].
    mask: bool [B or 1, N, M], True where a row may look.

  Returns:
    (weights [B, heads, N, M], zero where a row may not look, their sums
    [B, heads, N, 1]).
  """
  if mask is not None:
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(mask[:, None], logits, lowest)
  highest = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - jax.lax.stop_gradient(highest))
  return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _has_flash_kernel(query: types.Array, mask: types.Array | None) -> bool:
  """Decides at trace time whether cuDNN has a kernel for these operands."""
  _, n, _, d = query.shape
  return (
    devices.platform() == "gpu"
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and mask is None
    and n > 1  # One row is a matrix-vector product: nothing to gain.
    and d % 8 == 0
    and d <= 128
  )


def _is_halved(query: types.Array, key: types.Array) -> bool:
  """Decides at trace time whether halves of the examples go side by side.

  XLA's CPU backend gives one core to a stack of small products. Two halves
  are two chains of operations, which it runs at the same time; small stacks
  are not worth the longer program.
  """
  examples, n, heads, d = query.shape
  return (
    devices.platform() == "cpu"
    and isinstance(examples, int)  # Not an exported program's free size.
    and examples > 1
    and examples * heads * n * key.shape[1] * d >= _HALVED_FROM
  )
