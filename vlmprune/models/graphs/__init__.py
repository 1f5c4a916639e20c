"""The fast path: a pruned prefill captured once for a bucket of shapes, and replayed as one launch."""
