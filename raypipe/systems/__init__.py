"""The published methods (examples in, a trained part out, answers judged) and the summaries that they all read."""
