"""Target models, draft heads and side-cars, and how their checkpoints are read."""
