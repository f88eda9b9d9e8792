"""What a checkpoint holds, how it is written and read, and what it refuses to load."""
