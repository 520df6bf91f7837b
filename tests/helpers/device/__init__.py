"""A simulated device: another device's rules, in host memory."""
