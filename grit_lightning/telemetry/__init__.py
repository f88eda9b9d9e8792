"""What is measured of a model while it trains, as numbers and as pictures."""
