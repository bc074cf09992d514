"""Many requests at a time: arrivals, systems, interleaved rounds, and what is told of them."""
