"""When things happen during training: schedules and logging, never the maths."""
