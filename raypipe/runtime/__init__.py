"""The room that knows Ray and DeepSpeed: clusters, units over workers, sessions, training."""
