"""Environment, timing and exactness: what everything that measures stands on."""
