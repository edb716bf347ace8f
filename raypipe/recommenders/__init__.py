"""Sequential recommenders in plain torch: prefixes in, states and scores out."""
