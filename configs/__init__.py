"""Shipped configurations; `grit fit --config NAME` finds them by name."""
