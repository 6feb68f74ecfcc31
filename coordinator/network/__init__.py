"""How a coordinator reaches its sites: signed messages over Flower's SuperLink, packages in the depot."""
