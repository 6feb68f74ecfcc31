"""What training costs in privacy: per-example gradients, clip and noise, accountants."""
