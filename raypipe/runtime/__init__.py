"""The layer that knows Ray and DeepSpeed: clusters, units on workers, sessions, training."""
