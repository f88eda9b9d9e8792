"""Several processes: what they tell each other, and which strategies keep the adapter whole. Imports nothing by itself."""
