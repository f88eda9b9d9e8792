"""From a source of rows to batches of token ids: the plumbing that all tasks share."""
