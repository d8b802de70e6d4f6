"""kvcfg inside other libraries: model weights, and the cache that transformers' `generate()` accepts."""
