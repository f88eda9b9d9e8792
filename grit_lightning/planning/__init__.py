"""What a run will take before it is started: bytes of tensors that have shapes and no values."""
