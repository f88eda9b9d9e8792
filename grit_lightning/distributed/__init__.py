"""Training on several processes: what they exchange, and strategies that shard the backbone and keep the adapter whole."""
