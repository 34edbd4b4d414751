"""The drawn world of the embedded default: studio and street."""
