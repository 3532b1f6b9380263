"""From a dataset to batches: slices, tokenised and packed shards, a manifest, the sample order.

Imports no torch, ray or mlflow; transformers, datasets, pyarrow and fsspec only inside functions.
"""
