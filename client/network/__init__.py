"""How a site is reached: signed messages behind Flower's SuperNode, and packages from the depot."""
