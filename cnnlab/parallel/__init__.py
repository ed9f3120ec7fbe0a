"""How ranks work together: data-parallel training, asynchronous updates, a simulated network."""
