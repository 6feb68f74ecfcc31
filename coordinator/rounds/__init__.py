"""One round from top to bottom, and the loop over all of them."""
