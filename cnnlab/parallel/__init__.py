"""How ranks work together: data parallelism, asynchronous updates, a simulated network."""
