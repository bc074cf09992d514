"""The method: position-keyed noise, candidate tables, trees, masks and the accepting walk. Pure torch."""
