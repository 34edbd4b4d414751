"""One file a method: each a short list of training stages."""
