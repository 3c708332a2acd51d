"""Group relative policy optimisation: pure functions, reward functions, and the module around them."""
