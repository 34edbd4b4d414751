"""Person re-identification without photographs of people."""

from typing import Any


def __getattr__(name: str) -> Any:
  # Lazy: a tool that only reads file names need not wait for JAX.
  if name == "load_extractor":
    from dppp_jax.evals import extractor

    return extractor.load_extractor
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
