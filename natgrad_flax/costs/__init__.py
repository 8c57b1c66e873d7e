"""What a step costs, counted in the traced program, and the formula of every layer."""
