"""Fast ways of parts of the network, each with its slow reference."""
