"""The shape alphabet and the array aliases of the whole project.

Letters in docstrings: B batch, N tokens, P patches, D width, E embedding
(projection), H W C image, K ids, V vocabulary, T timesteps, Q queries,
G gallery. Arrays are NHWC; trailing axes are named from the right.
"""

from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = dict[str, Any]  # Nested dict of float32 arrays.
Collections = dict[str, Any]  # Flax collections other than "params".
Metrics = dict[str, Any]  # Flat dict of scalars.
