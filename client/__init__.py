"""The data owner's side: policy of one site, its data, training, its part of a round."""
