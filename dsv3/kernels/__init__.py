"""Tensor-to-tensor operations: each a plain torch reference beside a fast path. Knows no config, no module, no model."""
