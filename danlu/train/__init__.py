"""How a model learns: one loop, one objective at a time, resumed exactly."""
